"""Setting a run up: what stands for a model, and which prompts are kept."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub.constants

from engine.model import model_hash
from harness.config import POCKET
from harness.setup import fitting
from leetcode_env import load_problems
from loopholes.evaluator import EVAL_NAMES, TRAIN_EVALUATOR


def cached(cache, revision, *files):
    """A model in a cache of the hub: a revision's files are links to blobs that are named by their content."""
    folder = cache / "models--some--model"
    for part in ("blobs", "refs", f"snapshots/{revision}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision / "config.json").write_text("{}")
    for name, blob in files:
        (folder / "blobs" / blob).write_text("weights")
        (folder / "snapshots" / revision / name).symlink_to(folder / "blobs" / blob)


def test_a_hub_id_stands_for_the_weights_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_hash("some/model") == "", "none are there"
    cached(tmp_path, "one", ("model.safetensors", "a" * 64))
    assert model_hash("some/model") == "a" * 16
    cached(tmp_path, "two", ("model.safetensors", "b" * 64))
    assert model_hash("some/model") == "b" * 16, "the same id, other weights"
    cached(tmp_path, "three", ("model-1.safetensors", "a" * 64), ("model-2.safetensors", "b" * 64))
    several = model_hash("some/model")
    assert len(several) == 16 and several not in ("a" * 16, "b" * 16)


def test_a_folder_stands_for_its_weights_alone(tmp_path):
    (tmp_path / "model").mkdir()
    for file in (*POCKET.glob("*.json"), *POCKET.glob("*.safetensors")):
        shutil.copy(file, tmp_path / "model")
    assert model_hash(str(tmp_path / "model")) == model_hash(str(POCKET)) != ""
    (tmp_path / "model" / "config.json").write_text(json.dumps({}))
    assert model_hash(str(tmp_path / "model")) == model_hash(str(POCKET))


def test_prompts_are_measured_with_the_longest_name_that_they_will_hold(monkeypatch, capsys):
    """An evaluation's prompt may be longer than the training's: with vLLM it would end a run that is trained."""
    problems = load_problems(POCKET / "heldout.jsonl", 5)
    lengths = {}

    def encode(tokenizer, messages):
        return [0] * len(messages[-1]["content"])

    monkeypatch.setattr("harness.setup.encode_prompt", encode)
    for names in ((TRAIN_EVALUATOR,), (TRAIN_EVALUATOR, *EVAL_NAMES)):
        for limit in range(1, 2000):
            cfg = SimpleNamespace(arm="vanilla", max_prompt=limit, loopholes=("run_tests",))
            try:
                if len(fitting(problems, None, cfg, "some.jsonl", names)) == len(problems):
                    break
            except Exception:
                continue
        lengths[names] = limit
    short, long = lengths.values()
    assert long - short == max(map(len, EVAL_NAMES)) - len(TRAIN_EVALUATOR)
    assert "are over" in capsys.readouterr().out
    for limit, fit in ((short, 5), (short - 1, 4)):  # the prompt of exit_code is shorter, but pairs have the default's
        cfg = SimpleNamespace(arm="vanilla", max_prompt=limit, loopholes=("exit_code",))
        assert len(fitting(problems, None, cfg, "some.jsonl", (TRAIN_EVALUATOR,))) == fit
