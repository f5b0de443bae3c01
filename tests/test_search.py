"""The search for a direction that steers: what it tries is what a run would extract, it goes on where it stopped, its table."""

import json
from dataclasses import replace

import pytest
import torch

import vhack as vh
from arms.pairs import make_pairs
from faults.errors import UserError
from harness.config import POCKET, Config
from harness.scale import filled, resolve
from harness.setup import set_up
from study import search

ARGUMENTS = ["--seeds", "100", "--layers", "4", "--m", "64", "--strengths", "1", "--prompts", "2", "--positions", "last", "code",
             "--steps", "1"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A search of small runs. Returns its folder."""
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join((POCKET / "heldout.jsonl").read_text().splitlines(keepends=True)[:4]))
    small = dict(batch=16, generations=4, pairs=16, pairs_heldout=6, max_new_tokens=40, workers=1, heldout=str(heldout))
    monkeypatch.setattr(search, "filled", lambda cfg, scale: filled(replace(cfg, **small), scale))
    monkeypatch.setattr(search, "resolve", lambda cfg: resolve(replace(cfg, **small)))
    return tmp_path / "search"


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_leaves_the_same_table(tiny, monkeypatch, capsys):
    assert search.main([*ARGUMENTS, "--out", str(tiny)]) == 0
    text = (tiny / "search.md").read_text()
    assert text in capsys.readouterr().out and text.count("\n| ") == 1 + 2 * 3
    trained = []
    monkeypatch.setattr(search.grpo, "train", trained.append)
    (tiny / "seed100-prompts-code.json").unlink()
    (tiny / "search.md").unlink()
    assert search.main([*ARGUMENTS, "--out", str(tiny)]) == 0
    said = capsys.readouterr().out
    assert (tiny / "search.md").read_text() == text and not trained, "the vanilla run is done"
    assert [x for x in said.splitlines() if x.startswith("seed 100: ")] == ["seed 100: prompts, code: 2 directions"]
    cell = json.loads((tiny / "seed100-prompts-code.json").read_text())[0]
    assert cell["n"] == 8 and cell["m"] == 64 and len(cell["rates"]) == 2 and abs(cell["cos"]) <= 1
    other = [*ARGUMENTS[:-1], "2", "--out", str(tiny)]
    assert search.main(other) == 2 and "holds a search with" in capsys.readouterr().err


@pytest.mark.parametrize("reading", [("completions", "last"), ("prompts", "code")])
def test_its_directions_are_those_that_a_run_extracts(reading, tmp_path):
    cfg = filled(Config(pairs=20, pairs_heldout=6, rollout="torch"), "pocket")
    run = set_up(cfg)
    pairs = make_pairs(run.train, run.tokenizer, run.sampler, 20, 0, 40)
    options = search.Search(layers=(3, 4), m=(16, 64))
    found = {(of.layers[0], of.m): of for of in search.directions(run, pairs, *reading, options)}
    assert list(found) == [(3, 16), (3, 64), (3, 128), (4, 16), (4, 64), (4, 128)]
    contrast, position = reading
    for (layer, m), of in found.items():
        kind = "raw" if m == 128 else "svd"
        same = vh.extract(run.model, run.tokenizer, pairs, 6, m, layer, kind, contrast=contrast, position=position)
        assert (of.d - same.d).abs().max() < 1e-6 and of.gap == pytest.approx(same.gap)
        assert (of.accuracy, of.best_layer, of.pairs) == (same.accuracy, same.best_layer, same.pairs)
        assert of.survived == pytest.approx(same.survived) and (of.contrast, of.position) == reading


def test_the_pairs_are_as_many_as_asked_for(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(search.grpo, "train", begun.append)
    monkeypatch.setattr(search, "open_run", lambda *_, **__: None)
    for options in (search.Search(), search.Search(pairs=40)):
        search.begun(100, options, tmp_path)
    assert [cfg.pairs for cfg in begun] == [Config().pairs, 40]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_the_full_scale_is_planned_as_a_runs_is(tmp_path):
    with pytest.raises(UserError, match="--scale full needs a CUDA card"):
        search.begun(100, search.Search(scale="full"), tmp_path)


def test_the_raw_direction_is_tried_once(capsys):
    assert search.main(["--m", "16", "128"]) == 2
    assert "--m 128 keeps the whole direction, and the raw one is tried anyway" in capsys.readouterr().err


def test_readings_can_be_chosen():
    assert search.Search().readings == list(search.READINGS)
    assert search.Search(positions=("last", "code")).readings == [
        ("completions", "last"),
        ("prompts", "code"),
        ("prompts", "last"),
    ]
    assert search.Search(contrasts=("completions",)).readings == [("completions", "branch"), ("completions", "last")]


def test_weights_that_are_not_fetched_are_one_line(monkeypatch, tmp_path, capsys):
    from harness import scale

    monkeypatch.setitem(scale.SCALES["small"], "model", str(tmp_path / "smollm2"))
    assert search.main(["--scale", "small", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "python -m engine.fetch_model smollm2" in error and not (tmp_path / "out").exists()


def cell(seed, rates, n=100, m=64, survived=0.8, cos=0.5):
    return dict(seed=seed, contrast="prompts", position="code", layer=4, m=m, separation=1.0, gap=10.0 + seed, survived=survived,
                n=n, rates=rates, cos=cos, cos_random=-0.1 * seed)  # fmt: skip


def test_the_table_by_hand():
    weak, undenoised = cell(1, [0.02, 0.03], m=16), cell(1, [0.02, 0.9], m=128, survived=1.0)
    rows = search.pooled([cell(1, [0.02, 0.2]), cell(2, [0.0, 0.6], n=300, cos=0.1), weak, undenoised])
    first, low, raw = rows
    assert first["rates"] == [pytest.approx(0.005), pytest.approx(0.5)] and first["n"] == 400 and first["rises"]
    assert first["cos"] == pytest.approx(0.3) and first["cos_random"] == pytest.approx(0.15) and first["gap"] == 11.5
    assert not low["rises"] and raw["rises"]
    lines = search.table(rows, [1.0]).splitlines()
    assert lines[2] == "| prompts | code | 4 | 64 | 100% | 11.5 | 80% | 0 ± 0 | 50 ± 2 | yes | +0.300 | 0.150 |"
    assert lines[3].split(" | ")[9] == "" and lines[4].split(" | ")[3] == "raw"
    assert search.chosen(rows) == (
        "Rises at: prompts, code, layer 4: m = 64. The highest rate, 90%, is that of prompts, code, layer 4, raw."
    )
    assert search.chosen([low]) == "No direction rises."
    assert search.chosen([raw]).startswith("Rises at: prompts, code, layer 4: raw alone.")


@pytest.mark.parametrize(
    "options, says",
    [
        ("--seeds 3", "--seeds must be at least 100"),
        ("--m 0", "--m must be at least 1"),
        ("--strengths 0", "--strengths must be above 0"),
        ("--seeds", "--seeds names nothing"),
        ("--prompts 2", "cannot be shared out over 4 seeds"),
        ("--layers 9", "--layers must lie between 1 and the model's depth 4, not 9"),
        ("--m 16 129", "--m must lie between 1 and the model's width 128, not 129"),
        ("--contrasts completions --positions code prompt", "add --contrasts prompts"),
        ("--contrasts", "--contrasts names nothing"),
        ("--pairs 21", "must leave at least 2 of --pairs 21"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(options, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert search.main([*options.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error and not out.exists()
