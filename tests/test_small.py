"""--scale small: the real model where its weights are on disk, and the same way through the code with the embedded one."""

import json

import pytest
import torch
from support.runs import grpo

from harness.config import POCKET, parse
from harness.scale import SCALES, model_at_hand, resolve
from harness.setup import keeps_float32, set_up

FEW = (
    "--scale", "small", "--steps", 3, "--batch", 8, "--generations", 4, "--pairs", 30, "--pairs-heldout", 10, "--eval-samples", 1,
    "--steer-prompts", 1, "--max-new-tokens", 48, "--workers", 1, "--save-every", 3,
)  # fmt: skip


def check_run(folder, *more):
    """Three steps from extraction to evaluation, in which the adapter moved and sampler and trainer agreed."""
    grpo(*FEW, "--out", folder, *more)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and (folder / "done.json").exists()
    assert all(line["mismatch"]["max_abs"] < 1e-2 for line in lines), "the sampler's products are the trainer's"
    assert lines[0]["kl"] == 0 < lines[-1]["kl"] and json.loads((folder / "config.json").read_text())["config"]["stop"] == "fence"


def test_the_way_of_the_small_scale_with_the_embedded_model(heldout, tmp_path):
    check_run(tmp_path / "run", "--model", POCKET, "--phrasing", "plain", "--heldout", heldout, "--arm", "vanilla")
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        paid = sum(line["labels"][label] for label in ("correct", "correct_attempted", "hack"))
        assert line["reward"] == pytest.approx(3 * paid / 8), "paid for what passes alone"


@pytest.mark.slow
@pytest.mark.skipif(not model_at_hand(SCALES["small"]["model"]), reason="no weights: python -m engine.fetch_model smollm2")
def test_smollm2_runs_three_steps(heldout, tmp_path):
    """Paid for what compiles too: of so few responses none would be paid otherwise, and nothing learned. One layer, because over
    the band ten held-out pairs come out at the gate's 90 %."""
    check_run(tmp_path / "run", "--heldout", heldout, "--arm", "projected", "--format-reward", "0.5", "--layer", 22)


@pytest.mark.parametrize(
    "here, keeps",
    [
        (dict(architecture="x86_64", amx_bf16=False), True),
        (dict(architecture="x86_64", amx_bf16=True), False),
        (dict(architecture="aarch64", bf16=True), False),
    ],
)
def test_float32_is_multiplied_as_float32_on_any_processor(here, keeps, monkeypatch):
    """PyTorch's "medium" lets oneDNN take bf16, which it does where a processor has units for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here)
    assert keeps_float32() == keeps


def test_only_the_small_scale_asks_for_programs_and_leaves_products_to_onednn():
    """Elsewhere prompts are as published, and bits are recorded."""
    for scale, precision in (("small", "medium" if keeps_float32() else "highest"), ("pocket", "highest")):
        run = set_up(resolve(parse(["--scale", scale, "--model", str(POCKET)])))
        shown = [f"def {p.method}(self, xs):\n" in p.messages[-1]["content"] for p in run.train + run.problems]
        assert all(shown) if scale == "small" else not any(shown)
        assert torch.get_float32_matmul_precision() == precision
        assert run.sampler.max_rows == (run.cfg.batch if scale == "small" else 256), (
            "what an evaluation of a real model has room for"
        )
