"""The layout holds: five modules at the root, no circle of imports, no arrow against the order of the rooms, short files."""

import ast
import subprocess
from pathlib import Path

import pytest

from harness.config import ROOT

# From the ground up: a room imports from lower floors and from itself.
FLOORS = [
    {"faults"},
    {"sandbox", "projection"},
    {"problems"},
    {"loopholes"},
    {"engine", "leetcode_env"},
    {"arms", "harness"},
    {"eval", "vhack"},
    {"grpo"},
    {"study"},
    {"bench", "pocket", "docs"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] in FLOOR or p.parent == ROOT]
FILES = [p for p in FILES if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
PRODUCT = [p for p in FILES if p.relative_to(ROOT).parts[0] not in ("bench", "pocket", "docs")]
NAMES = [str(p.relative_to(ROOT)) for p in PRODUCT]


def room(name):
    return name.split(".")[0].removesuffix(".py")


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Modules of this project that a file imports."""
    return imported(path.read_text()) - {module(path)}


def imported(source):
    """Modules of this project that a text imports, anywhere in it; `from engine import lora` is engine.lora."""
    modules = {module(p) for p in FILES}
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their room"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & modules) or {node.module}
    return found & modules


def test_the_root_shows_the_five_modules_that_the_method_is_read_in():
    assert sorted(p.name for p in ROOT.glob("*.py")) == ["eval.py", "grpo.py", "leetcode_env.py", "projection.py", "vhack.py"]


def test_no_arrow_against_the_order_of_the_rooms():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imports(path)
        if room(name) != room(module(path)) and FLOOR[room(name)] >= FLOOR[room(module(path))]
    ]
    assert not wrong, wrong


def test_no_test_file_is_imported_by_another():
    """What several need stands in tests/support."""
    tests = {p.stem for p in (ROOT / "tests").glob("test_*.py")}
    nodes = [n for p in (ROOT / "tests").rglob("*.py") for n in ast.walk(ast.parse(p.read_text()))]
    assert not tests & {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not tests & {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}


def test_no_circle_of_files():
    arrows = {module(p): imports(p) for p in FILES}
    done, path = set(), []

    def walk(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(arrows.get(name, ())):
                walk(other)
            done.add(path.pop())

    for name in arrows:
        walk(name)


def test_a_lazy_import_is_seen():
    lazy = "def f():\n    from engine import lora\n    import grpo\n    from study.stats import compare\n    import torch\n"
    assert imported(lazy) == {"engine.lora", "grpo", "study.stats"}


@pytest.mark.parametrize("path", PRODUCT, ids=NAMES)
def test_files_are_short(path):
    most = {"grpo.py": 299, "eval.py": 279}.get(path.name if path.parent == ROOT else "", 400)
    assert len(path.read_text().splitlines()) <= most


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_public_functions_have_types_and_docstrings(path):
    assert not (lacking := without_types_or_docstring(path.read_text())), lacking


def without_types_or_docstring(source):
    """What the public functions and methods of a text lack, a line each; `object` says nothing, so it is no type."""
    tree, lacking = ast.parse(source), []
    scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
    for scope in scopes:
        for node in scope.body:
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            if not isinstance(node, functions) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            a = node.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            types = [x.annotation for x in every if x.arg not in ("self", "cls")]
            types += [node.returns] if node.name != "__init__" else []
            if None in types or any(getattr(n, "id", "") == "object" for t in types for n in ast.walk(t)):
                lacking.append(f"{node.name}: types")
            if ast.get_docstring(node) is None and node.name != "__init__":
                lacking.append(f"{node.name}: docstring")
    return lacking


def test_a_function_without_types_or_docstring_is_seen():
    right = "def f(a: int, /, *b: int, c: str, **d: Any) -> None:\n    'Does.'\n"
    assert without_types_or_docstring(right) == []
    for whole, part in (
        (": int, /", ", /"),
        ("*b: int", "*b"),
        ("c: str", "c"),
        (": Any", ""),
        (": Any", ": object | None"),
        (" -> None", ""),
    ):
        assert without_types_or_docstring(right.replace(whole, part)) == ["f: types"], part
        assert without_types_or_docstring("class C:\n    " + right.replace(whole, part).replace("\n", "\n    ")) == ["f: types"]
    assert without_types_or_docstring(right.replace("'Does.'", "pass")) == ["f: docstring"]


def test_the_package_study_is_in_the_repository():
    """A line `study/` in .gitignore once hid it."""
    ignored = subprocess.run(["git", "check-ignore", "study/runner.py"], cwd=ROOT, capture_output=True)
    assert ignored.returncode != 0 and Path(ROOT / "study" / "__main__.py").exists()
