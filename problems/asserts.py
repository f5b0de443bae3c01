"""Test assertions split in two: the calls, which untrusted code answers, and the claim about the answers, checked here.

`assert Solution().f(n = 7) == [2, 2]` becomes the call `Solution().f(n=7)` and the claim `ANSWER == [2, 2]`. The claim is
evaluated by a small interpreter over plain values: comparison, arithmetic, `not`/`and`/`or`, and a handful of pure functions.
What it does not know is reported when the problem is loaded, never skipped.
"""

from __future__ import annotations

import ast
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_BITS = 10_000  # size of an integer that a claim may compute


class Unsupported(ValueError):
    """The assertion has a form that is not handled; the text says which."""


@dataclass(frozen=True)
class Test:
    """One assertion. calls: source of each call, in order of evaluation; shapes: how each answer is made plain ("value",
    "linked", "tree"); claim: the rest of the assertion as a syntax tree in which Answer(i) stands for call i."""

    calls: tuple[str, ...]
    shapes: tuple[str, ...]
    claim: ast.expr
    expected: Any = None
    literal: bool = False  # the common form CALL == literal, whose right side is `expected`

    def holds(self, answers: Sequence[Any]) -> bool:
        """Whether the assertion holds for these plain answers, one a call. An assertion that raises does not hold."""
        try:
            if self.literal:
                return bool(answers[0] == self.expected)
            return bool(_evaluate(self.claim, answers))
        except Exception:  # e.g. a TypeError in `answer < 3`, as in the benchmark: an assertion that raises has failed
            return False

    @property
    def hashed_limit(self) -> int:
        """How many entries the sets and mappings of a right answer have together; a guess where the claim does not say."""
        return _hashed_entries(self.expected) if self.literal else 1000


class _Answer(ast.expr):
    _fields = ("index",)

    def __init__(self, index: int = 0):
        self.index = index


def parse_assertion(source: str) -> Test:
    """One `assert` statement about calls `Solution().name(...)`. Raises Unsupported, with the reason, for anything else."""
    test = _single_assert(source).test
    if isinstance(test, ast.Compare) and _is_call(test.left) and [type(op) for op in test.ops] == [ast.Eq]:
        try:  # nearly all assertions, and there are a hundred thousand
            return Test((_source(test.left, source),), ("value",), test, ast.literal_eval(test.comparators[0]), True)
        except (ValueError, TypeError, RecursionError, MemoryError):
            pass
    splitter = _Splitter()
    claim = splitter.visit(test)
    if not splitter.calls:
        raise Unsupported("it calls nothing of the solution")
    calls, shapes = tuple(splitter.calls), tuple(splitter.shapes)
    if isinstance(claim, ast.Compare) and isinstance(claim.left, _Answer) and [type(op) for op in claim.ops] == [ast.Eq]:
        try:
            return Test(calls, shapes, claim, _evaluate(claim.comparators[0], ()), True)
        except _Dependent:
            pass
    _check_supported(claim)
    return Test(calls, shapes, claim)


def _single_assert(source: str) -> ast.Assert:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unsupported(f"it does not parse ({type(error).__name__})") from None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise Unsupported("it is not a single assert statement")
    return body[0]


def _is_call(node: ast.AST) -> bool:
    """Solution().name(...)"""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Call)
        and isinstance(node.func.value.func, ast.Name)
        and node.func.value.func.id == "Solution"
    )


def _source(node: ast.expr, source: str) -> str:
    """The text of a node, cut from the source where that is one line of ASCII (columns count bytes)."""
    if node.end_lineno == 1 and source.isascii():
        return source[node.col_offset : node.end_col_offset]
    return ast.unparse(node)


_SAME = {"is_same_list": ("list_node", "linked"), "is_same_tree": ("tree_node", "tree")}


class _Splitter(ast.NodeTransformer):
    """Cuts the calls out of an assertion and leaves an _Answer in the place of each."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.shapes: list[str] = []

    def cut(self, node: ast.AST, shape: str) -> _Answer:
        """The node's call, noted with its shape; returns what stands for it in the claim."""
        self.calls.append(ast.unparse(node))
        self.shapes.append(shape)
        return _Answer(index=len(self.calls) - 1)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Cut a call of the code under test; go on below anything else."""
        if _is_call(node):
            return self.cut(node, "value")
        return super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """is_same_tree(CALL, tree_node([...])): both sides become plain values, the right one here."""
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name not in _SAME or len(node.args) != 2 or node.keywords:
            return self.generic_visit(node)
        maker, shape = _SAME[name]
        sides = [self.side(argument, maker, shape) for argument in node.args]
        return ast.Compare(sides[0], [ast.Eq()], [sides[1]])

    def side(self, node: ast.expr, maker: str, shape: str) -> ast.expr:
        """One side of `is_same_...`, as an answer or a plain value. Raises Unsupported for anything else."""
        if _is_call(node):
            return self.cut(node, shape)
        if isinstance(node, ast.Constant) and node.value is None:
            values = []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == maker and len(node.args) == 1:
            try:
                values = ast.literal_eval(node.args[0])
            except (ValueError, TypeError, RecursionError, MemoryError):
                raise Unsupported(f"{maker} of something that is no literal") from None
        else:
            raise Unsupported(f"a side of {'/'.join(_SAME)} is neither a call nor {maker}(...)")
        plain: Any = list(values) if shape == "linked" else preorder(values)
        return ast.Constant(plain)


def preorder(levels: Sequence[Any]) -> list[Any]:
    """Preorder values, None where a child is missing, of the tree written level by level as the benchmark does."""
    if not levels:
        return [None]
    nodes: list[list[Any]] = [[levels[0], None, None]]
    for i, value in enumerate(levels[1:]):
        parent, side = divmod(i, 2)
        if parent < len(nodes) and value is not None:  # values below the last node are ignored, as there
            node = [value, None, None]
            nodes[parent][1 + side] = node
            nodes.append(node)
    values, stack = [], [nodes[0]]
    while stack:
        node = stack.pop()
        values.append(None if node is None else [node[0]])
        if node is not None:
            stack += [node[2], node[1]]
    return values


# ---- the claim's interpreter ----------------------------------------------------------------------------------------


class _Dependent(Exception):
    """The expression needs an answer, and none is there."""


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}
_NAMES = {"inf": math.inf, "nan": math.nan}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "sorted": sorted, "set": set, "list": list, "tuple": tuple, "len": len, "sum": sum, "min": min, "max": max,
    "round": round, "float": float, "int": int, "str": str, "bool": bool, "dict": dict, "Counter": Counter,
    "isclose": math.isclose,
}  # fmt: skip


def _evaluate(node: ast.expr, answers: Sequence[Any]) -> Any:
    """The value of a claim's expression. Raises Unsupported for a node that is not known."""
    if isinstance(node, _Answer):
        if node.index >= len(answers):
            raise _Dependent
        return answers[node.index]
    handler = _HANDLERS.get(type(node))
    if handler is None:
        raise Unsupported(f"{type(node).__name__} in the claim")
    return handler(node, answers)


def _compare(node: ast.Compare, answers: Sequence[Any]) -> bool:
    left = _evaluate(node.left, answers)
    for op, right in zip(node.ops, node.comparators, strict=True):
        value = _evaluate(right, answers)
        if not _COMPARE[type(op)](left, value):
            return False
        left = value
    return True


def _boolean(node: ast.BoolOp, answers: Sequence[Any]) -> Any:
    stop = isinstance(node.op, ast.Or)
    value = None
    for part in node.values:
        value = _evaluate(part, answers)
        if bool(value) is stop:
            break
    return value


def _binary(node: ast.BinOp, answers: Sequence[Any]) -> Any:
    left, right = _evaluate(node.left, answers), _evaluate(node.right, answers)
    if type(node.op) is ast.Mult:
        if not all(isinstance(x, (int, float)) for x in (left, right)) or _bits(left) + _bits(right) > _MAX_BITS:
            raise Unsupported("a product of something large or not a number")
        return left * right
    if type(node.op) is ast.Pow:
        if not all(isinstance(x, (int, float)) for x in (left, right)) or _bits(left) * abs(right) > _MAX_BITS:
            raise Unsupported("a large power")
        return left**right
    if type(node.op) not in _BINARY:
        raise Unsupported(f"{type(node.op).__name__} in the claim")
    return _BINARY[type(node.op)](left, right)


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 64


def _unary(node: ast.UnaryOp, answers: Sequence[Any]) -> Any:
    if type(node.op) not in _UNARY:
        raise Unsupported(f"{type(node.op).__name__} in the claim")
    return _UNARY[type(node.op)](_evaluate(node.operand, answers))


def _name(node: ast.Name, answers: Sequence[Any]) -> float:
    if node.id not in _NAMES:
        raise Unsupported(f"the name {node.id}")
    return _NAMES[node.id]


def _attribute(node: ast.Attribute, answers: Sequence[Any]) -> float:
    if isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr in _NAMES:
        return _NAMES[node.attr]
    raise Unsupported(f"the attribute {node.attr}")


def _call(node: ast.Call, answers: Sequence[Any]) -> Any:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) and _is_module(function.value) else getattr(function, "id", None)
    if name not in _FUNCTIONS:
        raise Unsupported(f"the function {ast.unparse(function)[:60]}")
    arguments = [_evaluate(argument, answers) for argument in node.args]
    options = {k.arg: _evaluate(k.value, answers) for k in node.keywords if k.arg}
    return _FUNCTIONS[name](*arguments, **options)


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("math", "collections")


def _dict(node: ast.Dict, answers: Sequence[Any]) -> dict[Any, Any]:
    keys = [key for key in node.keys if key is not None]
    if len(keys) < len(node.keys):
        raise Unsupported("a dict with **")
    return {_evaluate(k, answers): _evaluate(v, answers) for k, v in zip(keys, node.values, strict=True)}


def _items(make: Callable[[Iterable[Any]], Any]) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda node, answers: make(_evaluate(item, answers) for item in node.elts)


_HANDLERS: dict[type[ast.AST], Callable[[Any, Sequence[Any]], Any]] = {
    ast.Constant: lambda node, answers: node.value, ast.List: _items(list), ast.Tuple: _items(tuple), ast.Set: _items(set),
    ast.Dict: _dict, ast.Compare: _compare, ast.BoolOp: _boolean, ast.BinOp: _binary, ast.UnaryOp: _unary, ast.Name: _name,
    ast.Attribute: _attribute, ast.Call: _call,
}  # fmt: skip


def _check_supported(claim: ast.expr) -> None:
    """Raise Unsupported unless every node is of a known kind; values are not known yet, so kinds are all that is checked."""
    for node in ast.walk(claim):
        if isinstance(node, ast.expr) and type(node) is not _Answer and type(node) not in _HANDLERS:
            raise Unsupported(f"{type(node).__name__} in the claim")
    for node in ast.walk(claim):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name not in _FUNCTIONS:
                raise Unsupported(f"the function {ast.unparse(node.func)[:60]}")


def _hashed_entries(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_hashed_entries, value.keys())) + sum(map(_hashed_entries, value.values()))
    own = len(value) if isinstance(value, set) else 0
    return own + (sum(map(_hashed_entries, value)) if isinstance(value, (list, tuple, set)) else 0)
