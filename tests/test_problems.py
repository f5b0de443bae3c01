"""Data files and their assertions: what loads, what each complaint names, and what a manifest sees."""

import os
import random

import pytest
from support.problems import INPUTS, row, write

from faults import files
from faults.errors import UserError
from problems import data
from problems.asserts import Unsupported, parse_assertion
from problems.data import load_problems, write_manifest

# ---- assertions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, holds, fails",
    [
        ("assert Solution().f(1) == [1, 2]", [[1, 2]], [(1, 2)]),
        ("assert Solution().f('a == b') == 'c == d'", ["c == d"], ["x"]),
        ("assert Solution().f(1) == -inf", [float("-inf")], [0]),
        ("assert Solution().f(1) == float('inf')", [float("inf")], [0]),
        ("assert Solution().f(1) == 10**9 + 7", [10**9 + 7], [7]),
        ("assert [1] == Solution().f(1)", [[1]], [1]),
        ("assert Solution().f(1)", [1], [0]),
        ("assert not Solution().f(1)", [0], [1]),
        ("assert Solution().f(1) is True", [True], [1]),
        ("assert Solution().f(1) is None", [None], [0]),
        ("assert abs(Solution().f(1) - 0.5) < 1e-5", [0.5000001], [0.51]),
        ("assert math.isclose(Solution().f(1), 0.5, rel_tol=1e-6)", [0.5], [0.6]),
        ("assert sorted(Solution().f(1)) == [1, 2]", [[2, 1]], [[2]]),
        ("assert set(Solution().f(1)) == {1, 2}", [[2, 1, 1]], [[1]]),
        ("assert Solution().f(1) in ([1], [2])", [[2]], [[3]]),
        ("assert 1 <= Solution().f(1) < 3", [2], [3]),
        ("assert len(Solution().f(1)) == 2", ["ab"], ["a"]),
        ("assert Solution().f(1) == 1 or Solution().f(2) == 2", None, None),
        ("assert is_same_list(Solution().f(head = list_node([1, 2])), list_node([2, 1]))", [[2, 1]], [[1, 2]]),
        ("assert is_same_list(Solution().f(None), None)", [[]], [[1]]),
        ("assert is_same_tree(Solution().f(1), tree_node([1, None, 2]))", [[[1], None, [2], None, None]], [[None]]),
    ],
)
def test_forms_of_assertions(source, holds, fails):
    test = parse_assertion(source)
    if holds is None:
        assert test.calls == ("Solution().f(1)", "Solution().f(2)")
        assert test.holds([0, 2]) and not test.holds([0, 0])
    else:
        assert all(test.holds([answer]) for answer in holds) and not any(test.holds([answer]) for answer in fails)


def test_an_assertion_that_raises_does_not_hold():
    assert not parse_assertion("assert Solution().f(1) < 3").holds(["a"])
    assert not parse_assertion("assert sorted(Solution().f(1)) == [1]").holds([[1, "a"]])


@pytest.mark.parametrize(
    "source",
    ["x = 1", "assert 1 == 1", "assert Solution().f(1) == g(2)", "assert Solution().f(1) == unknown", "assert (", "",
     "assert Solution().f(1) == [x for x in [1]]", "assert (lambda: Solution().f(1))()", "assert Solution().f(1) == 1; x = 2",
     "assert Solution().f(1)[0] == 1", "assert Solution().f(1) == 10**10**10", "assert is_same_tree(Solution().f(1), 3)",
     "assert Solution().f(1) == " + "-" * 5000 + "1", "assert Solution().f(1) == 'a' * 10**9"],
)  # fmt: skip
def test_unsupported_forms_are_reported(source, tmp_path):
    with pytest.raises(Unsupported):
        parse_assertion(source)
    with pytest.raises(UserError, match="line 1: problem 7, assertion 2 of 'gt_answer'"):
        load_problems(write(tmp_path / "f", row(gt_answer=["assert Solution().total([]) == 0", source])))


# ---- data files ---------------------------------------------------------------------------------------------------


def test_loading(tmp_path):
    path = write(tmp_path / "d.jsonl", row(), row(id="two"), row(id=3))
    problems = load_problems(path)
    assert [p.id for p in problems] == [7, "two", 3] and len(load_problems(path, limit=2)) == 2
    assert problems[0].method == "total" and len(problems[0].tests) == len(INPUTS)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"id": None}, "'id' is NoneType"),
        ({"id": True}, "'id' is bool"),
        ({"difficulty": 3}, "'difficulty' is int"),
        ({"prompt": "text"}, "'prompt' is str"),
        ({"prompt": []}, "'prompt'"),
        ({"prompt": [{"role": "user"}]}, "'prompt'"),
        ({"prompt": [{"role": "assistant", "content": ""}]}, "'prompt'"),
        ({"func_name": "total"}, "'func_name'"),
        ({"func_name": "Solution().a b"}, "'func_name'"),
        ({"gt_answer": []}, "'gt_answer'"),
        ({"gt_answer": [1]}, "'gt_answer', assertion 1 is int"),
        ({"gt_answer": "assert"}, "'gt_answer' is str"),
        ({"setup_code": "import ("}, "'setup_code' is no Python"),
        ({"setup_code": "x = '\0'"}, "'setup_code' is no Python"),
        ({"canonical_solution": None}, "'canonical_solution' is NoneType"),
        ({"canonical_solution": "def"}, "'canonical_solution' is no Python"),
    ],
)
def test_a_malformed_field_is_named(tmp_path, change, complaint):
    path = write(tmp_path / "d.jsonl", row(), row(**change))
    with pytest.raises(UserError) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}, line 2: ") and complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", data._FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
    line = row()
    del line[field]
    with pytest.raises(UserError, match=f"line 1: field '{field}' is missing"):
        load_problems(write(tmp_path / "d.jsonl", line))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "holds no problems"),
        (b"\n\n", "holds no problems"),
        (b"{", "line 1: not JSON"),
        (b"[1]", "line 1: not a JSON object"),
        (b"\xff\xfe", "line 1: byte 1 is not UTF-8"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"id": ' + b"9" * 10_000 + b"}", "line 1: not JSON"),
        (b"\0", "line 1: not JSON"),
    ],
)
def test_a_file_that_is_no_data(tmp_path, content, complaint):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_problems(path)
    assert complaint in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="can't be read"):
        load_problems(tmp_path)


def damage(data, dice):
    """One random damage: bytes flipped, cut, repeated, moved, or replaced by hostile ones."""
    data = bytearray(data)
    start = dice.randrange(len(data))
    end = min(len(data), start + dice.choice([1, 1, 2, 10, 500]))
    kind = dice.randrange(6)
    if kind == 0:
        for i in range(start, end):
            data[i] ^= dice.randrange(1, 256)
    elif kind == 1:
        del data[start:end]
    elif kind == 2:
        data[start:start] = data[start:end]
    elif kind == 3:
        del data[start:]
    elif kind == 4:
        data[start:end] = dice.choice([b"\0", b"\xff", b"\n", b"[" * 5000, b"9" * 6000, b'"', b"\\ud800", b"(" * 5000, b"{}"])
    else:
        data[start:end] = bytes(reversed(data[start:end]))
    return bytes(data)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_two_hundred_damages(tmp_path, with_manifest):
    """With the manifest every damage is seen and its line named; without one, a clear error or a valid load."""
    path = write(tmp_path / "d.jsonl", *(row(id=i) for i in range(5)))
    good = path.read_bytes()
    if with_manifest:
        assert write_manifest(path)
        assert len((tmp_path / "d.jsonl.manifest").read_text().split()) == 5
    refused = 0
    for seed in range(200):
        bad = damage(good, random.Random(seed))
        path.write_bytes(bad)
        try:
            load_problems(path)
            assert not with_manifest or bad == good
        except UserError as error:
            refused += 1
            text = str(error)
            assert text.startswith(str(path)) and "\n" not in text and len(text) < 2000
            if with_manifest:
                changed = [n for n, (a, b) in enumerate(zip(bad.split(b"\n"), good.split(b"\n"), strict=False), 1) if a != b]
                assert bad == b"" or not changed or str(changed[0]) in text
    assert refused > 50


def test_a_users_own_file_may_be_edited(tmp_path):
    """Loading writes nothing beside the file, so nothing complains about the next version of it."""
    path = write(tmp_path / "d.jsonl", row())
    load_problems(path)
    assert os.listdir(tmp_path) == ["d.jsonl"]
    assert len(load_problems(write(path, row(), row(id=8)))) == 2


def test_manifest_of_a_read_only_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", row())
    monkeypatch.setattr(files.os, "replace", lambda *a, **k: (_ for _ in ()).throw(PermissionError("read-only")))
    assert not write_manifest(path)
    assert not (tmp_path / "d.jsonl.manifest").exists()
