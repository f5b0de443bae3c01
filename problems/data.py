"""Data files: problems read line by line, each complaint naming file, line and field, and the manifests that vouch for files."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from faults.errors import UserError
from faults.files import write_atomic
from problems.asserts import Test, Unsupported, parse_assertion


@dataclass(frozen=True, eq=False)
class Problem:
    """One line of a data file. messages: the chat, the user's message last; tests: the parsed assertions of `gt_answer`.
    Equal to itself alone."""

    id: int | str
    difficulty: str
    messages: list[dict[str, str]]
    func_name: str
    gt_answer: tuple[str, ...]
    tests: tuple[Test, ...]
    setup_code: str
    canonical_solution: str

    @property
    def method(self) -> str:
        """The name of the method to write, without `Solution().`."""
        return self.func_name.removeprefix("Solution().")

    @cached_property
    def calls(self) -> tuple[tuple[str, str, int, bool], ...]:
        """(source, shape of its answer, most bytes of it, whether it is its test's last) of every call of all tests in order."""
        return tuple(
            (source, shape, test.limit, number == len(test.calls))
            for test in self.tests
            for number, (source, shape) in enumerate(zip(test.calls, test.shapes, strict=True), 1)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as text: its tests are syntax trees, large and slow to send. One object there too."""
        text = (self.id, self.difficulty, self.messages, self.func_name, self.gt_answer, self.setup_code, self.canonical_solution)
        return _arrived, (json.dumps(text),)


@cache
def _arrived(text: str) -> Problem:
    number, difficulty, messages, func_name, assertions, *code = json.loads(text)
    tests = tuple(map(parse_assertion, assertions))
    return Problem(number, difficulty, messages, func_name, tuple(assertions), tests, *code)


def load_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSON-lines file, the first `limit` when given. Nothing is written.

    Raises UserError, naming file, line and field, for a file that is missing, empty or damaged, or that differs from its
    manifest where it has one."""
    path = Path(path)
    lines = _read_lines(path)
    _check_manifest(path, lines)
    problems: list[Problem] = []
    lines_of: dict[int | str, int] = {}
    for number, line in enumerate(lines, 1):
        if limit is not None and len(problems) >= limit:
            break
        if line.strip():
            problems.append(_parse_line(line, f"{path}, line {number}"))
            if (first := lines_of.setdefault(problems[-1].id, number)) != number:
                raise UserError(f"{path}, line {number}: field 'id' is that of line {first}, {problems[-1].id}: give it another")
    if not problems:
        raise UserError(f"{path}: holds no problems; see `python leetcode_env.py fetch`")
    return problems


def by_setup(problems: Iterable[Problem]) -> dict[str, Problem]:
    """The first problem of each distinct setup code, in their order."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.setup_code, problem)
    return first


def as_program(problem: Problem) -> Problem:
    """The problem, whose prompt asks for a program and shows, ahead of its last line, how the solution begins.

    A model that was never shown the task forgets the class, and answers in prose (docs/small.md)."""
    *before, last = problem.messages
    head, end, tail = last["content"].removeprefix("PROBLEM:\n").rpartition("\n")
    content = f"Write a Python program. {head}{end}{_beginning(problem)}{tail} Write the complete program."
    return replace(problem, messages=[*before, {**last, "content": content}])


def _beginning(problem: Problem) -> str:
    """The class and the signature of the canonical solution in a block of code; empty where it has none."""
    lines, tree = problem.canonical_solution.splitlines(), ast.parse(problem.canonical_solution)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Solution"]
    methods = [(c, f) for c in classes for f in c.body if isinstance(f, ast.FunctionDef) and f.name == problem.method]
    if not methods:
        return ""
    (owner, method), *_ = methods
    signature = lines[method.lineno - 1 : max(method.lineno, method.body[0].lineno - 1)]
    return "\n".join(["```python", lines[owner.lineno - 1], *signature, "        ...", "```\n"])


def _read_lines(path: Path) -> list[bytes]:
    """The file's lines as bytes, with their ends: a manifest vouches for those too."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file; see `python leetcode_env.py fetch`") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    *lines, rest = data.split(b"\n")
    return [line + b"\n" for line in lines] + ([rest] if rest else [])


def _parse_line(line: bytes, where: str) -> Problem:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where}: not JSON: {str(error)[:100]}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return _parse_row(row, where)


def _parse_row(row: dict[str, Any], where: str) -> Problem:
    """Problem of one decoded line; `where` begins every complaint."""
    for name, kinds in _FIELDS.items():
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing")
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            raise UserError(f"{where}: field {name!r} is {type(row[name]).__name__}, not {kinds[0].__name__}")
    _check_prompt(row["prompt"], where)
    if not re.fullmatch(r"Solution\(\)\.[A-Za-z_][A-Za-z0-9_]*", row["func_name"]):
        raise UserError(f"{where}: field 'func_name' is {row['func_name'][:60]!r}, not Solution().name")
    for name in ("setup_code", "canonical_solution"):
        if reason := _syntax_error(row[name]):
            raise UserError(f"{where}: field {name!r} is no Python: {reason}")
    return Problem(
        id=row["id"],
        difficulty=row["difficulty"],
        messages=[{"role": m["role"], "content": m["content"]} for m in row["prompt"]],
        func_name=row["func_name"],
        gt_answer=tuple(row["gt_answer"]),
        tests=_parse_tests(row["gt_answer"], row["id"], where),
        setup_code=row["setup_code"],
        canonical_solution=row["canonical_solution"],
    )


_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (int, str),
    "difficulty": (str,),
    "prompt": (list,),
    "func_name": (str,),
    "gt_answer": (list,),
    "setup_code": (str,),
    "canonical_solution": (str,),
}


def _check_prompt(prompt: list[Any], where: str) -> None:
    sound = prompt and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not sound or prompt[-1]["role"] != "user":
        raise UserError(f"{where}: field 'prompt' is no list of chat messages that ends with the user's")


@lru_cache(maxsize=64)  # every problem of the benchmark has the same setup code
def _syntax_error(source: str) -> str | None:
    """Why the source is no Python, or None. It is parsed, never run."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"[:120]
    return None


def _parse_tests(assertions: list[Any], problem_id: int | str, where: str) -> tuple[Test, ...]:
    if not assertions:
        raise UserError(f"{where}: field 'gt_answer' holds no assertions")
    tests = []
    for number, source in enumerate(assertions, 1):
        if not isinstance(source, str):
            raise UserError(f"{where}: field 'gt_answer', assertion {number} is {type(source).__name__}, not str")
        try:
            tests.append(parse_assertion(source))
        except Unsupported as reason:
            raise UserError(f"{where}: problem {problem_id}, assertion {number} of 'gt_answer': {reason}") from None
    return tuple(tests)


# ---- the manifest -------------------------------------------------------------------------------------------------


def write_manifest(path: str | Path) -> bool:
    """Write `<path>.manifest`, a SHA-256 a line, for a file that was fetched or is shipped; returns whether the folder allowed
    it. The user's own files get none: they may be edited."""
    path = Path(path)
    text = "".join(hashlib.sha256(line).hexdigest() + "\n" for line in _read_lines(path))
    try:
        write_atomic(_manifest_path(path), text.encode())
    except OSError:
        return False
    return True


def _manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".manifest")


def _check_manifest(path: Path, lines: list[bytes]) -> None:
    """Compare the lines with the manifest, where there is one. Raises UserError that names every line that differs."""
    stored = _manifest_path(path)
    try:
        expected = stored.read_text("ascii").split()
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        raise UserError(f"{stored}: can't be read; remove it or fetch the data again") from None
    found = [hashlib.sha256(line).hexdigest() for line in lines]
    damaged = [str(n) for n, (a, b) in enumerate(zip(found, expected, strict=False), 1) if a != b]
    if len(found) != len(expected):
        damaged.append(f"count: {len(found)} lines instead of {len(expected)}")
    if damaged:
        more = f" and {len(damaged) - 20} more" if len(damaged) > 20 else ""
        raise UserError(f"{path}: differs from its manifest at line {', '.join(damaged[:20])}{more}; fetch it again")
