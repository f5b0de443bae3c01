"""Settings: groups, ranges, what was given stands, what a resumed run may change."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from typing import get_args

import pytest

from arms import ARMS
from faults.errors import UserError
from harness import config, scale
from harness.config import CHANGEABLE, GROUPS, ROOT, Arm, Config, check, identity, parse, portable, read_config, resumed
from harness.scale import filled


@pytest.mark.parametrize(
    "args",
    [
        ("--batch", "0"),
        ("--batch", "-8"),
        ("--generations", "1"),
        ("--batch", "20", "--generations", "8"),
        ("--max-new-tokens", "0"),
        ("--micro-tokens", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--lr", "0"),
        ("--layer", "0"),
        ("--betas", "2", "3"),
        ("--betas", ".9", "1"),
        ("--temperature", "inf"),
        ("--temperature", "0"),
        ("--weight-decay", "-1"),
        ("--cone-ridge", "nan"),
        ("--clip", "0"),
        ("--warmup", "-3"),
        ("--refresh-every", "-1"),
        ("--tis-cap", "nan"),
        ("--workers", "0"),
        ("--threads", "100000"),
        ("--seed", str(2**64)),
        ("--pairs", "4", "--pairs-heldout", "3"),
        ("--m", "0"),
        ("--skip-nonfinite", "-1"),
    ],
)
def test_values_that_cannot_work_are_refused_with_their_option(args):
    with pytest.raises(UserError) as error:
        parse(args)
    assert args[0] in str(error.value) and "\n" not in str(error.value)


def test_every_number_has_a_range():
    """So that a new field cannot be forgotten: a number without one is named here."""
    hints = config.get_type_hints(Config, include_extras=True)
    for f in fields(Config):
        if any(kind in str(hints[f.name]) for kind in ("int", "float")):
            assert config._ranges(hints[f.name]) or all(config._ranges(x) for x in get_args(hints[f.name])), f.name


def test_every_field_stands_in_one_group_and_help_names_it():
    names = [f.name for g in GROUPS for f in fields(g)]
    assert sorted(names) == sorted(f.name for f in fields(Config)) and len(set(names)) == len(names)
    shown = subprocess.run([sys.executable, str(ROOT / "grpo.py"), "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    for name in names:
        assert config.flag(name) in shown, name
    for group in GROUPS:
        assert f"{group.__name__.lower()} options" in shown


def test_help_and_mistakes_come_before_torch_is_loaded():
    code = "import sys, harness.config; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_was_given_stands_also_where_it_is_the_usual_value():
    """--preset qwen3-4b means 4 generations and a batch of 64, but not against the command line."""
    given = parse(["--preset", "qwen3-4b", "--generations", "8", "--batch", "128"])
    assert (filled(given, "full").generations, filled(given, "full").batch) == (8, 128)
    preset = filled(parse(["--preset", "qwen3-4b"]), "full")
    assert (preset.generations, preset.batch, preset.model) == (4, 64, "Qwen/Qwen3-4B")
    assert filled(parse(["--lr", "0.001"]), "full").lr == 1e-3


def test_the_full_scale_misses_the_presets_model_and_both_data_files(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "model_at_hand", lambda model: model == "Qwen/Qwen3.5-2B")
    train = tmp_path / "train.jsonl"
    train.write_text("{}")
    held = tmp_path / "held.jsonl"
    missing = scale.missing_for_full(filled(Config(preset="qwen3-4b", data=str(train), heldout=str(held)), "full"))
    assert any("Qwen/Qwen3-4B" in x for x in missing) and any(str(held) in x for x in missing)
    assert not any(str(train) in x for x in missing)


@pytest.fixture
def folder(tmp_path):
    cfg = filled(Config(arm="cone", skip_nonfinite=0), "pocket")
    (tmp_path / "config.json").write_text(json.dumps({"config": portable(cfg)}))
    return tmp_path


def test_config_json_gives_the_config_back(folder):
    assert read_config(folder) == filled(Config(arm="cone"), "pocket")
    assert str(ROOT) not in (folder / "config.json").read_text()


def test_a_resumed_run_may_change_what_does_not_change_its_result(folder, capsys):
    argv = [
        "--resume",
        str(folder),
        "--skip-nonfinite",
        "3",
        "--save-every",
        "2",
        "--workers",
        "1",
        "--micro-tokens",
        "512",
        "--threads",
        "2",
    ]
    now = resumed(parse(argv), argv)
    assert (now.skip_nonfinite, now.save_every, now.workers, now.micro_tokens, now.arm) == (3, 2, 1, 512, "cone")
    assert now.out == now.resume == folder and "--threads" in capsys.readouterr().out


@pytest.mark.parametrize("args", [("--lr", "0.5"), ("--arm", "projected"), ("--eval-samples", "3"), ("--seed", "1")])
def test_a_resumed_run_keeps_what_decides_its_result(folder, args):
    """--arm projected is the usual arm: given here, it differs from the run's all the same."""
    argv = ["--resume", str(folder), *args]
    with pytest.raises(UserError, match=args[0]):
        resumed(parse(argv), argv)


def test_the_identity_of_a_run_is_what_decides_its_result():
    cfg = filled(Config(), "pocket")
    same, other = replace(cfg, skip_nonfinite=5, threads=2), replace(cfg, lr=2e-3)
    of = [identity({"config": portable(c), "versions": {}}) for c in (cfg, same, other)]
    assert of[0] == of[1] != of[2] and {"skip_nonfinite", "threads", "micro_tokens"} <= CHANGEABLE


def test_the_arms_of_the_command_line_are_those_of_the_table():
    assert set(get_args(Arm)) == set(ARMS)


def test_check_returns_the_same_config():
    cfg = Config()
    assert check(cfg) is cfg


@pytest.mark.parametrize(
    "args",
    [
        ("--construction", "contrast", "--arm", "random"),
        ("--blockwise", "--arm", "cone"),
        ("--cone-split", "--arm", "cone", "--cone-rows", "nonhack"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(args):
    with pytest.raises(UserError, match=args[0]):
        parse(args)


def test_a_resumed_run_stays_in_its_folder(folder, tmp_path):
    argv = ["--resume", str(folder), "--out", str(tmp_path / "elsewhere")]
    with pytest.raises(UserError, match="--out"):
        resumed(parse(argv), argv)
