"""The arithmetic of the benches; that none of them depends on how fast it is here."""

import json
import sys
import time

import pytest

from bench import growth, phases, projection, reports, start, trl_environment
from bench.reports import Report, Step
from engine.model import eos_ids, load_model, load_tokenizer, vocabulary
from faults.errors import UserError
from harness.config import flag
from tests.support.models import tiny_config


def report(*seconds, phases=(), hack=0.5):
    steps = [Step(s, s, 80.0, 8, 1.0, hack, 0.25) for s in seconds]
    return Report(steps, dict(steps=2, all=3), list(phases), [[5, 7]] * len(steps))


def test_work_is_what_a_hand_counts():
    """q 16, k 8, v 8, o 16, three of 24: 120 weights a position; 40 of the head; an adapter of 58; 4 dimensions of attention."""
    config = tiny_config(
        "qwen3", hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=2, vocab_size=10, tie_word_embeddings=True,
    )  # fmt: skip
    found = phases.work(config, 1, prompts=[2, 3], length=3, generations=2)
    positions, predicted = 2 + 3 + 4 * 2, 12  # the third token of each of 4 completions is predicted, and never read
    pairs = (1 + 2) + 2 * (3 + 4) + (1 + 2 + 3) + 2 * (4 + 5)
    forward = 2 * 120 * positions + 4 * 4 * pairs + 2 * 40 * predicted
    back = 2 * 120 * positions + 8 * 4 * pairs + 2 * 40 * predicted + 4 * 58 * positions
    assert found == (forward, forward, forward + 2 * 58 * positions + back) == (4736, 4736, 14652)


def test_phases_come_in_the_order_of_the_step_and_add_up_to_it():
    lines = [dict(save=2.5, projection=1.0, rollout=2.0, project=3.0, later=0.5), dict(rollout=2.0, project=3.0, projection=1.0)]
    found = phases.by_phase(report(9.0, 6.0, phases=lines), warmup=0)
    assert list(found) == ["rollout", "project", "projection", "save", "else", "later"]
    assert found["save"] == 2.5 / phases.SAVE_EVERY
    assert found["else"] == pytest.approx(1.0)  # 9 - 8 and 6 - 5: the projection is inside `project`
    assert phases.by_phase(report(9.0, 6.0, phases=lines), warmup=1).keys() == {"rollout", "project", "projection", "else"}


def test_shares_are_work_over_seconds_over_the_rate():
    config = tiny_config("qwen3")
    given = report(2.0, phases=[dict(rollout=0.5, backward=1.5)])
    found = phases.shares(given, 0, 1e9, config, phases.Config(lora_r=4, generations=4))
    needed = phases.work(config, 4, [5, 7], 10.0, 4)
    assert found == {"rollout": needed.rollout / 0.5 / 1e9, "backward": needed.backward / 1.5 / 1e9}


def test_rounds_are_compared_one_by_one():
    assert reports.ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == "2.00 (1.00-3.00)"
    assert reports.spread([0.5]) == "0.50"
    assert report(9.0, 1.0, 3.0).seconds(warmup=1) == 2.0 and report(9.0).seconds(warmup=3) == 9.0
    assert reports.windows([report(1, 1, 1, hack=0.2), report(1, 1, 1, 1, hack=0.4)], "hack", 2) == [
        pytest.approx([0.2, 0.4]),
        pytest.approx([0.2, 0.4]),
    ]


def test_a_report_comes_back_as_it_was_written(tmp_path):
    given = report(1.0, 2.0, phases=[dict(rollout=0.5)] * 2)
    given.write(tmp_path / "report")
    assert Report.read(tmp_path / "report") == given


def test_a_child_that_fails_is_one_line():
    with pytest.raises(UserError, match=r"python -m bench.nowhere ended with code 1: .*No module named bench.nowhere"):
        reports.launch("bench.nowhere", [], 1)


def test_a_table_has_its_numbers_on_the_right():
    assert reports.table([("a", "n"), ("bb", "10"), ("c", "2")]).splitlines() == ["a    n", "------", "bb  10", "c    2"]


def test_the_endless_model_cannot_sample_its_end(tmp_path):
    folder = str(growth.endless(tmp_path))
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert min(eos_ids(model, tokenizer)) >= vocabulary(model, tokenizer) == model.config.vocab_size


def test_every_batch_meets_every_length_and_every_rank_is_there():
    found = growth.cells([32, 64, 128], [64, 128], [8, 32, 64])
    assert len(found) == len(set(found)) == 3 * 2 + 2
    assert {(b, t, 32) for b in (32, 64, 128) for t in (64, 128)} < set(found) and {c.rank for c in found} == {8, 32, 64}


def test_a_part_inside_another_counts_for_itself():
    parts = start.Parts()
    inner = parts.timed("inner", lambda: time.sleep(0.02))
    begun = time.perf_counter()
    parts.timed("outer", lambda: (inner(), inner()))()
    whole = time.perf_counter() - begun
    assert parts.seconds["inner"] >= 0.04 and sum(parts.seconds.values()) <= whole
    assert parts.seconds["outer"] == pytest.approx(whole - parts.seconds["inner"], abs=whole - 0.04)


def test_the_bench_of_the_projection_removes_something():
    g, v = projection.drawn(1000)
    assert projection.project(g, v).removed > 0.05


def test_a_failed_installation_is_one_line():
    with pytest.raises(UserError, match="cannot install trl .no such index.: where") as error:
        trl_environment._said([sys.executable, "-c", "print('looking\\nno such index'); raise SystemExit(1)"])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_timed_run_tells_its_steps_and_its_memory():
    small = dict(steps=2, batch=16, generations=4, pairs=30, pairs_heldout=10, workers=1)
    options = [word for name, value in small.items() for word in (flag(name), str(value))]
    found = reports.run(options, threads=1, peaks=True)
    assert len(found.steps) == len(found.phases) == len(found.prompts) == 2 and len(found.prompts[0]) == 4
    for step, parts in zip(found.steps, found.phases, strict=True):
        assert step.sequences == 16 and 0 < step.tokens <= 16 * 64
        assert {"rollout", "backward", "reference", "optimizer", "projection", "log", "rollout peak"} <= parts.keys()
    assert 0 < found.peak["steps"] <= found.peak["all"] and json.dumps(found.peak)
