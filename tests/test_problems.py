"""Data files and their assertions: what loads, what each complaint names, and what a manifest sees."""

import math
import os
import random
import tracemalloc
from collections import OrderedDict, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import INPUTS, row, write

from faults import files
from faults.errors import UserError
from problems import data
from problems.asserts import Unsupported, parse_assertion
from problems.data import as_program, load_problems, write_manifest
from sandbox.wire import NotPlain, decode, encode, longest

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
     "assert Solution().f(1) == " + "-" * 5000 + "1", "assert Solution().f(1) == 'a' * 10**9",
     "assert Solution().f(1) == 1 / 0", "assert Solution().f(1) == abs('a')", "assert Solution().f(1) == '%99999999d' % 7",
     "assert Solution().f(1) == sum([[1], [2]], [])", "assert Solution().f(1) == b'x'", "assert Solution().f(1) == 1j",
     "assert Solution().f(1) == (-8) ** 0.5", "assert Solution().f(1) == ...", "assert Solution().f(1) == [{(1, b'')}]",
     "assert abs(Solution().f(1) - unknown) < 1", "assert Solution().f(1) | 1 == 3", "assert Solution().f(1) @ 1 == 3",
     "assert ~Solution().f(1) == 3", "assert sorted(Solution().f(1), **{'reverse': True}) == [1]",
     "assert max(*Solution().f(1)) == 1", "assert [*Solution().f(1)] == [1]", "assert {**Solution().f(1)} == {}",
     "assert Solution().f(1).x == 1",
     "assert Solution().f(1).sum() == 1", "assert sorted(Solution().f(1), key=len) == ['a']", "assert Solution().f(1) == 1 << 3",
     "assert Solution().f(1) < 1 / 0", "assert Solution().f(1) < b'x'", "assert Solution().f(1) == round(5, 10**9)",
     "assert is_same_list(Solution().f(1), list_node(5))", "assert is_same_tree(Solution().f(1), tree_node(5))",
     f"assert Solution().f(1) == { {k * (2**61 - 1) for k in range(1, 99)} }", "assert [Solution().f(1) for x in [1]] == [1]",
     f"assert set(Solution().f(1)) == set({[k * (2**61 - 1) for k in range(1, 99)]})"],
)  # fmt: skip
def test_unsupported_forms_are_reported(source, tmp_path):
    with pytest.raises(Unsupported):
        parse_assertion(source)
    with pytest.raises(UserError, match="line 1: problem 7, assertion 2 of 'gt_answer'"):
        load_problems(write(tmp_path / "f", row(gt_answer=["assert Solution().total([]) == 0", source])))


# ---- what a claim costs -------------------------------------------------------------------------------------------


class Counted(int):
    """An integer that counts what is done with it, all of one hash. A gauge: true answers are plain."""

    work = 0

    def __hash__(self):
        return 7

    def _counted(name):
        def method(self, *others):
            Counted.work += 1
            return getattr(int, name)(self, *others)

        return method

    for _name in ("eq", "lt", "gt", "floordiv", "mod", "rfloordiv", "rmod", "mul", "pow", "rpow", "round", "add", "radd", "str"):
        locals()[f"__{_name}__"] = _counted(f"__{_name}__")


@pytest.mark.parametrize(
    "claim",
    ["set({}) == {{1}}", "Counter({}) == Counter([1])", "dict({}) == {{1: 2}}", "set({}) <= {{1}}", "len(set({})) == 2",
     "sorted(set({})) == [1]", "Counter({}) == Counter(Solution().g())", "set({}) - {{1}} == set()", "Counter(Counter({})) == 1"],
)  # fmt: skip
def test_answers_are_hashed_in_linear_time(claim):
    """The keys of an answer may all have one hash: each would be compared with all before it."""
    test = parse_assertion("assert " + claim.format("Solution().f()"))
    keys = [Counted(n) for n in range(2000)]
    Counted.work = 0
    assert not test.holds([[(key, 1) for key in keys] if "dict" in claim else keys, [1]][: len(test.calls)])
    assert Counted.work < 50 * len(keys)


def test_repeated_answers_are_no_collision():
    assert parse_assertion("assert Counter(Solution().f()) == Counter({1: 1000, -1: 500, -2: 500})").holds(
        [[1] * 1000 + [-1, -2] * 500]
    )
    assert parse_assertion("assert set(Solution().f()) == {(-1, -1), (-1, -2), (-2, -1), (-2, -2)}").holds(
        [[(a, b) for a in (-1, -2) for b in (-1, -2)] * 100]
    )


@pytest.mark.parametrize(
    "claim, answers",
    [
        ("{0} // 7 == 1", [1 << 20_000]),
        ("7 % {0} == 1", [1 << 20_000]),
        ("{0} % {1} == 1", [1 << 20_000, 3]),
        ("{0} * 3 == 1", [1 << 20_000]),
        ("{0} ** 3 == 1", [1 << 4000]),
        ("2 ** {0} == 1", [10**9]),
        ("round(5, {0}) == 1", [-(10**9)]),
        ("round({0}, -5) == 1", [1 << 20_000]),
        ("sum([{0}, 1, 1]) == 1", [1 << 20_000]),
        ("sum([1, 1], {0}) == 1", [1 << 20_000]),
    ],
)
def test_no_arithmetic_with_huge_numbers(claim, answers):
    calls = [f"Solution().f({i})" for i in range(len(answers))]
    test = parse_assertion("assert " + claim.format(*calls))
    Counted.work = 0
    assert not test.holds([Counted(answer) for answer in answers])
    assert Counted.work == 0


@pytest.mark.parametrize(
    "claim, answer",
    [
        ("{} % 7 == 1", "%9999999d"),
        ("{} % 7 == 1", "%.9999999f"),
        ("{} % (7, 7) == 1", "%*d"),
        ("{} + {} == 1", [0] * 1000),
        ("sum({}, []) == 1", [[0] * 100] * 1000),
        ("sum({}, ()) == 1", [(0,) * 100] * 1000),
    ],
)
def test_no_claim_takes_memory_beyond_its_answers(claim, answer):
    test = parse_assertion("assert " + claim.replace("{}", "Solution().f()"))
    tracemalloc.start()
    assert not test.holds([answer] * len(test.calls))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_arithmetic_that_stays():
    for claim, answer in (("{} + [3] == [1, 2, 3]", [1, 2]), ("set({}) - {{1}} == {{2}}", [1, 2]), ("{} % 7 == 1", 8),
                          ("{} + 'b' == 'ab'", "a"), ("round({}, 2) == .33", 1 / 3), ("round({}, ndigits=2) == .33", 1 / 3),
                          ("sum({}) == 3.5", [1, 2.5]), ("{} ** 2 == 49", 7), ("-{} // 2 == -4", 7)):  # fmt: skip
        test = parse_assertion("assert " + claim.replace("{}", "Solution().f()").replace("{{", "{").replace("}}", "}"))
        assert test.holds([answer] * len(test.calls)), claim


def test_a_shared_nan_is_not_equal_to_itself():
    """Containers take two references to one object for equal without comparing; every answer's NaN is an object of its own."""
    one, two = decode(encode([math.nan, math.nan, {1: math.nan}, (math.nan,)])), decode(encode([math.nan, math.nan]))
    assert one[0] is not one[1] and one[0] is not two[0]
    for claim in ("[{}] == [{}]", "({},) == ({},)", "{} in [{}]", "{{1: {}}} == {{1: {}}}", "{} == {}", "sorted([{}]) == [{}]"):
        test = parse_assertion("assert " + claim.replace("{}", "Solution().f()").replace("{{", "{").replace("}}", "}"))
        assert len(test.calls) == 2 and not test.holds([one[0], two[0]])
    assert not parse_assertion("assert Solution().f() == [math.nan]").holds([one[:1]])


def test_depth_is_an_answer_that_does_not_hold():
    deep = [], []
    for _ in range(100_000):
        deep = [deep[0]], [deep[1]]
    assert not parse_assertion("assert Solution().f(1) == Solution().f(2)").holds(deep)
    assert not parse_assertion("assert Solution().f(1) == [[[]]]").holds(deep[:1])
    for depth in (600, 60_000):
        with pytest.raises(NotPlain):
            decode(b"[" * depth + b"]" * depth)


def alike(value):
    """Values that equal a value in which they are spelled differently."""
    number = st.just(value)
    if isinstance(value, int):
        number |= st.sampled_from([x for x in (value, bool(value), float(min(value, 2**1000))) if x == value])
    elif isinstance(value, float) and math.isfinite(value):
        number |= st.sampled_from([x for x in (int(value), value) if x == value])
    elif isinstance(value, (list, tuple)):
        number = st.tuples(*map(alike, value)).map(type(value))
    elif isinstance(value, dict):
        pairs = st.tuples(*(st.tuples(alike(k), alike(v)) for k, v in value.items()))
        number = pairs.flatmap(lambda items: st.sampled_from([dict(items), OrderedDict(items), defaultdict(int, items)]))
    elif isinstance(value, set):
        number = st.tuples(*map(alike, value)).map(set)
    return number


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
LEAVES |= st.integers(0, 2**1010) | st.sampled_from([2.0**63, -(2.0**63), 1e16, 1e300, -0.0, -(2**63), 2**63, 10**16, "\ud800"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(LEAVES, inner, max_size=3)
        | st.sets(LEAVES, max_size=3)
    ),
)


@settings(max_examples=300)
@given(VALUES.flatmap(lambda value: st.tuples(st.just(value), alike(value))))
def test_every_right_answer_is_within_its_limit(pair):
    expected, answer = pair
    assert expected == answer and len(encode(answer)) <= longest(expected)
    large = encode(expected).count(b"e+")  # 1e+300 may come as 301 digits
    assert longest(expected) <= 13 * len(encode(expected)) + 360 * max(1, large)  # and not far beyond


def test_the_limit_of_an_answer_is_that_of_its_assertion():
    assert parse_assertion("assert Solution().f(1) == 5").limit < 5000
    assert parse_assertion("assert 5 == Solution().f(1)").limit < 200_000
    assert parse_assertion(f"assert Solution().f(1) == {list(range(10_000))}").limit < 200_000
    assert parse_assertion(f"assert sorted(Solution().f(1)) == {list(range(100_000))}").limit > len(str(list(range(100_000))))
    (call,) = parse_assertion("assert is_same_list(Solution().f(1), list_node([1, 2]))").calls
    assert call == "Solution().f(1)"


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


def test_two_problems_of_one_id_are_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", row(), row(id=8), row())
    with pytest.raises(UserError, match="line 3: field 'id' is that of line 1, "):
        load_problems(path)
    assert len(load_problems(path, limit=2)) == 2


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


# ---- phrasing -----------------------------------------------------------------------------------------------------


SOLUTION = """from typing import List
class Solution:
    def __init__(self):
        self.seen = 0
    def f(self, a: int,
          b: str = "def f(") -> List[int]:
        return [a]
"""


ASKED = "Write a Python program. {}Write f. Write the complete program."


def test_a_program_is_asked_for_and_its_beginning_shown_ahead_of_the_last_line(tmp_path):
    given = row(
        func_name="Solution().f", canonical_solution=SOLUTION, prompt=[{"role": "user", "content": "PROBLEM:\nAdd.\nWrite f."}]
    )
    (problem,) = load_problems(write(tmp_path / "one.jsonl", given))
    shown = 'class Solution:\n    def f(self, a: int,\n          b: str = "def f(") -> List[int]:\n        ...'
    assert as_program(problem).messages == [{"role": "user", "content": ASKED.format(f"Add.\n```python\n{shown}\n```\n")}]
    assert problem.messages[0]["content"] == "PROBLEM:\nAdd.\nWrite f.", "the problem itself is as it was"


@pytest.mark.parametrize("solution", ["", "class Solution:\n    g = 1", "def f(a):\n    return a"])
def test_a_program_whose_solution_shows_no_beginning_is_asked_for_all_the_same(solution, tmp_path):
    given = row(func_name="Solution().f", canonical_solution=solution, prompt=[{"role": "user", "content": "Add.\nWrite f."}])
    (problem,) = load_problems(write(tmp_path / "one.jsonl", given))
    assert as_program(problem).messages == [{"role": "user", "content": ASKED.format("Add.\n")}]
