"""Settings: groups, ranges, what was given stands, what a resumed run may change."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import torch

import eval as evaluation
import leetcode_env
import study.__main__ as study
from arms import ARMS
from faults.errors import UserError, command
from harness import config, scale
from harness.config import (
    CHANGEABLE,
    DIRECTION_OF,
    GROUPS,
    ROOT,
    Arm,
    Config,
    check,
    identity,
    parse,
    portable,
    read_config,
    resumed,
)
from harness.scale import filled
from harness.values import Range, wrong
from loopholes import DEFAULT, LOOPHOLES

MAY_BE_ZERO = {
    "seed", "beta", "warmup", "betas", "weight_decay", "refresh_every", "cone_ridge", "rebound_alpha", "skip_nonfinite",
    "format_reward",
}  # fmt: skip


def bad_values(name, hint):
    """Values that a field must refuse, from its annotation's types alone, whatever range is declared there."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return bad_values(name, parts[0])
    if kind in (Union, UnionType):
        return bad_values(name, parts[0])
    if kind is tuple:
        good = getattr(Config(), name) or ("run_tests",)
        if parts[-1] is Ellipsis:
            return ["x", good[0], (), (*good, *good), [*good], *((bad,) for bad in bad_values(name, parts[0]))]
        return ["x", good[:1], (*good, 0.5)] + [
            (*good[:i], bad, *good[i + 1 :]) for i, part in enumerate(parts) for bad in bad_values(name, part)
        ]
    if kind is Literal:
        return ["magic", 3, True]
    if hint in (int, float):
        numbers = [-1, -(10**30), 10**400, float("nan"), float("inf"), float("-inf"), 1e300, "x", True, [1]]
        return numbers + ([] if name in MAY_BE_ZERO else [0]) + ([1.5] if hint is int else [])
    return {bool: ["yes", 1, 0.0], str: [5, True, ["x"]], Path: [5, True]}[hint]


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_field_refuses_what_lies_beyond_it(name):
    """Over all fields, so that a new one cannot be forgotten: no number without a range, no value of another type."""
    hint = config.HINTS[name]
    for value in bad_values(name, hint) + ([] if getattr(Config(), name) is None else [None]):
        with pytest.raises(UserError) as error:
            check(replace(Config(), **{name: value}))
        assert str(error.value).startswith(f"{config.flag(name)} must be "), value


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_field_takes_its_default_and_the_ends_of_its_range(name):
    check(Config())
    hint = config.HINTS[name]
    hint = next((h for h in get_args(hint) if get_origin(h) is Annotated), hint)
    for limits in [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Range)]:
        for end in [limits.high] + ([] if limits.above else [limits.low]):
            assert not wrong(int(end) if get_args(hint)[0] is int else end, hint)


def one_line(main, argv, capsys):
    """What a command line that is refused says: one line on stderr, nothing else, exit code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out and "\u2502" not in err and "\u2500" not in err, err
    return err


@command
def read(argv):
    parse(argv)


@pytest.mark.parametrize(
    "args, words",
    [
        ("--lr nan", "--lr"),
        ("--seed 99999999999999999999", "--seed"),
        ("--seed " + "9" * 5000, "--seed"),
        ("--threads 100000", "--threads"),
        ("--betas .9 1", "--betas"),
        ("--batch 20 --generations 8", "--batch"),
        ("--pairs 4 --pairs-heldout 3", "--pairs-heldout"),
        ("--arm magic", "no_loophole"),
        ("--lr foo", "--lr"),
        ("--nonsense 3", "--nonsense"),
        ("--arn cone", "--arm"),
        ("--betas 1", "--betas"),
        ("--loopholes magic", "result_file"),
        ("--loopholes", "--loopholes"),
        ("--loopholes stdout stdout", "each once"),
        ("--loopholes all stdout", "leave the others away"),
        ("--arm cone --cone-known stdout", "--cone-known stdout is not in play"),
        ("--arm counterfactual --counterfactual-tau 0", "--counterfactual-tau must be above 0"),
        ("--arm counterfactual --counterfactual-tau -1", "--counterfactual-tau must be above 0"),
        ("--seed", "--seed"),
        ("--blockwise yes", "yes"),
        ("more", "more"),
    ],
)
def test_a_mistake_is_one_line(args, words, capsys):
    assert words in one_line(read, args.split(), capsys)


def test_the_other_commands_say_it_in_one_line_too(capsys, tmp_path):
    for main, argv, words in [
        (evaluation.main, [], "run folder"),
        (evaluation.main, [str(tmp_path), "--samples", "x"], "--samples"),
        (evaluation.main, [str(tmp_path), "--samples", "99999999"], "--samples"),
        (leetcode_env.main, [], "fetch"),
        (leetcode_env.main, ["check"], "file"),
        (study.main, ["--seeds", "x"], "--seeds"),
    ]:
        assert words in one_line(main, argv, capsys)


@pytest.mark.parametrize(
    "option", ["--arm cone", "--arm=projected", "--dry-run", "--no-dry-run", "--resume x", "--lr 1", "--cone_n 3"]
)
def test_the_extraction_refuses_options_that_it_does_not_read(option):
    from vhack import FIELDS

    with pytest.raises(UserError, match="is no option here"):
        parse(option.split(), only=FIELDS)
    assert parse(["--m", "3", "--require-steering"], only=FIELDS).m == 3


@pytest.mark.parametrize("given", ["qwen3.5-2b", "qwen3-4b"])
def test_a_preset_is_refused_where_it_would_be_ignored(given):
    with pytest.raises(UserError, match="--preset"):
        scale.resolve(parse(["--scale", "pocket", "--preset", given]))


def test_every_field_stands_in_one_group_and_help_names_it():
    names = [f.name for g in GROUPS for f in fields(g)]
    assert sorted(names) == sorted(f.name for f in fields(Config)) and len(set(names)) == len(names)
    shown = subprocess.run([sys.executable, str(ROOT / "grpo.py"), "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    for name in names:
        assert config.flag(name) in shown, name
    for group in GROUPS:
        assert f"{group.__name__.lower()} options" in shown
    lines = [line.strip("│ ") for line in shown.splitlines()]
    options = [i for i, line in enumerate(lines) if line.startswith("--")]
    for name in names:  # a comment that the formatter moved away from its field is no help
        start = next(i for i in options if re.match(rf"{config.flag(name)}[ ,]", lines[i]))
        said = " ".join(lines[start : next((i for i in options if i > start), len(lines))])
        assert re.search(r"[a-z]{2}[^{}]*\(default", re.sub(r"^--[^ ]+( --no-[^ ]+)?|\{[^}]*\}", "", said)), name


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


@pytest.mark.parametrize("given", [["--recompute", "half"], ["--card", "24"], ["--fit"], ["--preset", "qwen3-4b"]])
def test_what_is_of_the_full_scale_is_refused_at_pocket_scale(given):
    with pytest.raises(UserError, match=f"{given[0]} is of the full scale, and this is the pocket scale"):
        scale.resolve(parse(["--scale", "pocket", *given]))


def test_the_small_scale_says_how_to_fetch_its_model(monkeypatch, tmp_path):
    monkeypatch.setitem(scale.SCALES["small"], "model", str(tmp_path / "models" / "smollm2"))
    with pytest.raises(
        UserError, match=r"models/smollm2 is not there: fetch it first, with python -m engine\.fetch_model smollm2"
    ):
        scale.resolve(parse(["--scale", "small"]))
    cfg = scale.resolve(parse(["--scale", "small", "--model", str(config.POCKET), "--loopholes", "all"]))
    assert (cfg.scale, cfg.stop, cfg.rollout, cfg.model) == ("small", "fence", "torch", str(config.POCKET))
    with pytest.raises(UserError, match="--recompute is of the full scale, and this is the small scale"):
        scale.resolve(parse(["--scale", "small", "--model", str(config.POCKET), "--recompute", "half"]))
    with monkeypatch.context() as card:
        card.setattr(torch.cuda, "is_available", lambda: True)
        card.setattr(importlib.util, "find_spec", lambda name: "found" if name == "vllm" else None)
        assert scale.resolve(parse(["--scale", "small", "--model", str(config.POCKET)])).rollout == "vllm"
        card.setattr(importlib.util, "find_spec", lambda name: None)
        assert scale.resolve(parse(["--scale", "small", "--model", str(config.POCKET)])).rollout == "torch"


@pytest.fixture
def folder(tmp_path):
    cfg = filled(Config(arm="cone", skip_nonfinite=0), "pocket")
    (tmp_path / "config.json").write_text(json.dumps({"config": portable(cfg)}))
    return tmp_path


def test_a_run_from_before_says_what_it_recomputed(folder):
    """Where config.json has no `recompute` the layers of the full scale all were, and the pocket scale's none."""
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["recompute"]
    for size, what in (("pocket", "none"), ("full", "all")):
        path.write_text(json.dumps({"config": saved["config"] | {"scale": size}}))
        assert read_config(folder).recompute == what


def test_a_run_from_before_there_was_another_reading_goes_on_as_the_same_run(folder):
    """Its checkpoints, too, are still its own once config.json says what it did."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    old = {k: v for k, v in content["config"].items() if k not in config.SINCE}
    path.write_text(json.dumps(content | {"config": old}))
    assert read_config(folder) == filled(Config(arm="cone"), "pocket")
    assert identity({"config": old}) == identity({"config": content["config"]})
    assert identity({"config": old}) != identity({"config": content["config"] | dict(position="branch")})


def test_an_arm_brings_the_direction_that_it_is_about_and_what_is_given_stands():
    def direction(*args):
        cfg = filled(parse(args), "pocket")
        return cfg.m, cfg.contrast, cfg.position

    assert direction() == direction("--arm", "random") == (16, "completions", "last")
    gated = ["--arm", "projected_gated"]
    assert direction(*gated) == (*DIRECTION_OF["projected_gated"].values(),) and DIRECTION_OF["projected_gated"]["m"] != 16
    assert direction(*gated, "--m", "16", "--position", "code") == (16, "prompts", "code")
    assert direction("--contrast", "prompts", "--position", "code", "--m", "8") == (8, "prompts", "code")


def test_settings_for_a_card_are_those_of_a_new_run(folder):
    for given in (["--fit"], ["--card", "24"]):
        with pytest.raises(UserError, match="at --resume give --micro-tokens or --recompute"):
            resumed(parse(["--resume", str(folder), *given]), ["--resume", str(folder), *given])


def test_config_json_gives_the_config_back(folder):
    assert read_config(folder) == filled(Config(arm="cone"), "pocket")
    assert str(ROOT) not in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    "change",
    [
        dict(steps="60"), dict(steps=None), dict(lr="fast"), dict(arm="magic"), dict(arm=3), dict(blockwise="yes"),
        dict(data=None), dict(model=5), dict(betas=[0.9]), dict(betas="ab"), dict(seed=1.5), dict(threads=0),
        dict(unknown=1), dict(clip=True), dict(m=None), dict(position=None),
    ],
)  # fmt: skip
def test_a_damaged_config_json_is_one_line(folder, change):
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"config": saved["config"] | change}))
    with pytest.raises(UserError, match="cannot read config.json") as error:
        read_config(folder)
    assert next(iter(change)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"config": 5}', '{"config": null}', "{}", "\x00"])
def test_a_config_json_of_another_kind_is_one_line(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot read config.json"):
        read_config(folder)


def test_a_relative_path_means_the_folder_that_the_command_was_given_in(tmp_path, monkeypatch):
    """Also for a run that goes on from elsewhere, and where the project has a file of that name."""
    (tmp_path / "pocket").mkdir()
    (tmp_path / "pocket" / "train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    cfg = filled(parse(["--data", "pocket/train.jsonl", "--heldout", "../x.jsonl", "--model", "pocket"]), "pocket")
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"config": portable(cfg)}))
    again = [["--resume", str(tmp_path), "--data", x] for x in ("pocket/train.jsonl", str(tmp_path / "pocket" / "train.jsonl"))]
    for argv in again:
        assert resumed(parse(argv), argv).data == str(tmp_path / "pocket" / "train.jsonl")
    monkeypatch.chdir("/")
    found = read_config(tmp_path)
    assert found.data == str(tmp_path / "pocket" / "train.jsonl") and found.heldout == str(tmp_path.parent / "x.jsonl")
    assert found.model == str(tmp_path / "pocket")
    assert parse(["--model", "Qwen/Qwen3-4B"]).model == "Qwen/Qwen3-4B"
    with pytest.raises(UserError, match="--data"):
        resumed(parse(argv := ["--resume", str(tmp_path), "--data", str(config.POCKET / "train.jsonl")]), argv)


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
    said = capsys.readouterr().out
    assert now.out == now.resume == folder and "WARNING: --threads 2" in said and "WARNING: --micro-tokens 512" in said


@pytest.mark.parametrize(
    "args", [("--lr", "0.5"), ("--arm", "projected"), ("--eval-samples", "3"), ("--seed", "1"), ("--loopholes", "all")]
)
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


def test_the_loopholes_of_the_command_line_are_those_of_the_table():
    *every, all_of_them = get_args(config.LoopholeName)
    assert every == list(LOOPHOLES) and parse(["--loopholes", all_of_them]).loopholes == tuple(LOOPHOLES)
    assert Config().loopholes == DEFAULT == ("run_tests",)
    assert parse(["--loopholes", "stdout", "exit_code"]).loopholes == ("exit_code", "stdout"), "in whatever order they are named"


def test_a_run_from_before_had_the_one_loophole_and_keeps_its_checkpoints(folder):
    path = folder / "config.json"
    now = json.loads(path.read_text())
    before = {"config": {k: v for k, v in now["config"].items() if k != "loopholes"}}
    path.write_text(json.dumps(before))
    assert read_config(folder).loopholes == DEFAULT and identity(before) == identity(now)
    more = {"config": now["config"] | {"loopholes": ["run_tests", "stdout"]}}
    assert identity(more) != identity(now)
    path.write_text(json.dumps(more))
    assert read_config(folder).loopholes == ("run_tests", "stdout")
    for loopholes in (["magic"], [], "run_tests", 5, [["stdout"]], ["stdout", "stdout"]):
        path.write_text(json.dumps({"config": now["config"] | {"loopholes": loopholes}}))
        with pytest.raises(UserError, match="cannot read config.json"):
            read_config(folder)


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
        ("--cone-match", "random", "--arm", "cone", "--cone-rows", "nonhack"),
        ("--cone-places", "all", "--arm", "cone", "--cone-rows", "random"),
        ("--cone-known", "run_tests", "--arm", "cone", "--cone-rows", "random"),
        ("--blockwise", "--arm", "counterfactual", "--counterfactual-use", "project"),
        ("--cone-refresh", "2", "--arm", "counterfactual", "--counterfactual-use", "project"),
        ("--contrast", "completions", "--arm", "projected_gated"),
        ("--position", "last", "--arm", "projected_gated"),
        ("--position", "code", "--arm", "projected"),
        ("--position", "prompt", "--contrast", "completions"),
        ("--construction", "contrast", "--arm", "projected_gated"),
        ("--construction", "contrast", "--contrast", "prompts"),
        ("--position", "code", "--contrast", "prompts", "--arm", "rebound"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(args):
    with pytest.raises(UserError, match=args[0]):
        parse(args)


def test_what_vllm_cannot_sample_at_is_refused_before_anything_is_written():
    with pytest.raises(UserError, match="vLLM samples at temperatures up to 2"):
        parse(["--rollout", "vllm", "--temperature", "2.5"])
    assert parse(["--rollout", "torch", "--temperature", "2.5"]).temperature == 2.5


def test_a_value_that_looks_like_an_option_is_none():
    assert parse(["--data", "./arm"], only=("data",)).data.endswith("/arm")


def test_a_resumed_run_stays_in_its_folder(folder, tmp_path):
    argv = ["--resume", str(folder), "--out", str(tmp_path / "elsewhere")]
    with pytest.raises(UserError, match="--out"):
        resumed(parse(argv), argv)
