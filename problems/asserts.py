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
from typing import Any, TypeGuard

from sandbox.wire import NotPlain, longest, spread

_MAX_BITS = 10_000  # size of an integer that a claim may compute with
_ROOM = 4096  # bytes an answer may be longer than what it is to equal; a Counter's zeros are extra, say
_FREE_ROOM = 1 << 17  # the same where a claim is not a plain equation: it costs the trainer 25 ms


class Unsupported(ValueError):
    """The assertion has a form that is not handled; the text says which."""


@dataclass(frozen=True)
class Test:
    """One assertion. calls: source of each call, in order of evaluation; shapes: how each answer is made plain ("value",
    "linked", "tree"); claim: the rest of the assertion as a syntax tree in which Answer(i) stands for call i; limit: the most
    bytes that an answer of which it holds takes in the sandbox's encoding."""

    calls: tuple[str, ...]
    shapes: tuple[str, ...]
    claim: ast.expr
    limit: int
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


class _Answer(ast.expr):
    _fields = ("index",)

    def __init__(self, index: int = 0):
        self.index = index


def parse_assertion(source: str) -> Test:
    """One `assert` statement about calls `Solution().name(...)`. Raises Unsupported, with the reason, for anything else."""
    try:
        return _parse(source)
    except NotPlain as error:
        raise Unsupported(f"it expects what no answer can be: {error}") from None
    except (RecursionError, MemoryError) as error:
        raise Unsupported(f"it is nested too deeply ({type(error).__name__})") from None


def _parse(source: str) -> Test:
    test = _single_assert(source).test
    if _is_equation(test) and _is_call(test.left):
        try:  # nearly all assertions, and there are a hundred thousand
            expected = ast.literal_eval(test.comparators[0])
        except (ValueError, TypeError, RecursionError, MemoryError):
            pass
        else:
            return Test((_source(test.left, source),), ("value",), test, _ROOM + longest(expected), expected, True)
    splitter = _Splitter()
    claim = splitter.visit(test)
    if not splitter.calls:
        raise Unsupported("it calls nothing of the solution")
    calls, shapes, size = tuple(splitter.calls), tuple(splitter.shapes), _check(claim)
    if len(calls) == 1 and _is_equation(claim) and isinstance(claim.left, _Answer):
        return Test(calls, shapes, claim, _ROOM + size, _value(claim.comparators[0]), True)
    return Test(calls, shapes, claim, _FREE_ROOM + size)


def _is_equation(node: ast.expr) -> TypeGuard[ast.Compare]:
    """A == B"""
    return isinstance(node, ast.Compare) and [type(op) for op in node.ops] == [ast.Eq]


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
                values = list(ast.literal_eval(node.args[0]) or ())
            except (ValueError, TypeError, RecursionError, MemoryError):
                raise Unsupported(f"{maker} of something that is no literal list") from None
        else:
            raise Unsupported(f"a side of {'/'.join(_SAME)} is neither a call nor {maker}(...)")
        plain: Any = values if shape == "linked" else preorder(values)
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


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_JOINS = {(ast.Add, list), (ast.Add, tuple), (ast.Add, str), (ast.Sub, set)}  # what else has linear cost
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}
_NAMES = {"inf": math.inf, "nan": math.nan}


def _number(value: Any) -> Any:
    """The value, a number of moderate size; answers may be integers of a million bits, and format strings with a `%`."""
    if not isinstance(value, (int, float)) or _bits(value) > _MAX_BITS:
        raise Unsupported("arithmetic with something large or not a number")
    return value


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 64


def _to_dict(items: Any = (), **more: Any) -> dict[Any, Any]:
    pairs = list(items.items() if isinstance(items, dict) else items)
    spread(key for key, _ in pairs)
    return dict(pairs, **more)


def _round(number: Any, ndigits: Any = None) -> Any:
    if ndigits is not None and abs(_number(ndigits)) > _MAX_BITS:
        raise Unsupported("so many digits")
    return round(_number(number), ndigits)


# The cost of each is about linear in the size of its arguments.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "sorted": sorted, "list": list, "tuple": tuple, "len": len, "min": min, "max": max, "float": float, "int": int,
    "str": str, "bool": bool, "isclose": math.isclose, "round": _round, "dict": _to_dict,
    "set": lambda items=(): set(spread(items)),
    "Counter": lambda items=(): Counter(items if isinstance(items, dict) else spread(items)),
    "sum": lambda items, start=0: sum(map(_number, items), _number(start)),
}  # fmt: skip


def _evaluate(node: ast.expr, answers: Sequence[Any]) -> Any:
    """The value of a claim's expression. Raises Unsupported for a node that is not known."""
    if isinstance(node, _Answer):
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
    apply, kind = _known(_BINARY, node.op), type(node.op)
    left, right = _evaluate(node.left, answers), _evaluate(node.right, answers)
    if type(left) is not type(right) or (kind, type(left)) not in _JOINS:
        _number(right)
        if _bits(_number(left)) * (abs(right) if kind is ast.Pow else 1) > _MAX_BITS:
            raise Unsupported("a large power")
    return apply(left, right)


def _unary(node: ast.UnaryOp, answers: Sequence[Any]) -> Any:
    return _known(_UNARY, node.op)(_evaluate(node.operand, answers))


def _known(table: dict[Any, Callable[..., Any]], op: ast.AST) -> Callable[..., Any]:
    if type(op) not in table:
        raise Unsupported(f"{type(op).__name__} in the claim")
    return table[type(op)]


def _name(node: ast.Name, answers: Sequence[Any]) -> float:
    if node.id not in _NAMES:
        raise Unsupported(f"the name {node.id}")
    return _NAMES[node.id]


def _attribute(node: ast.Attribute, answers: Sequence[Any]) -> float:
    if isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr in _NAMES:
        return _NAMES[node.attr]
    raise Unsupported(f"the attribute {node.attr}")


def _call(node: ast.Call, answers: Sequence[Any]) -> Any:
    arguments = [_evaluate(argument, answers) for argument in node.args]
    options = {k.arg: _evaluate(k.value, answers) for k in node.keywords if k.arg}
    return _function(node)(*arguments, **options)


def _function(node: ast.Call) -> Callable[..., Any]:
    """What is called, if that is a known function, of a module or not."""
    function = node.func
    bare = function.attr if isinstance(function, ast.Attribute) and _is_module(function.value) else getattr(function, "id", None)
    if bare not in _FUNCTIONS or any(k.arg is None for k in node.keywords):
        raise Unsupported(f"the function {ast.unparse(function)[:60]}, or ** in a call of it")
    return _FUNCTIONS[bare]


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("math", "collections")


def _dict(node: ast.Dict, answers: Sequence[Any]) -> dict[Any, Any]:
    keys = [key for key in node.keys if key is not None]
    if len(keys) < len(node.keys):
        raise Unsupported("a dict with **")
    return _to_dict((_evaluate(k, answers), _evaluate(v, answers)) for k, v in zip(keys, node.values, strict=True))


def _items(make: Callable[[Iterable[Any]], Any]) -> Callable[[Any, Sequence[Any]], Any]:
    return lambda node, answers: make(_evaluate(item, answers) for item in node.elts)


_HANDLERS: dict[type[ast.AST], Callable[[Any, Sequence[Any]], Any]] = {
    ast.Constant: lambda node, answers: node.value, ast.List: _items(list), ast.Tuple: _items(tuple),
    ast.Set: _items(_FUNCTIONS["set"]),
    ast.Dict: _dict, ast.Compare: _compare, ast.BoolOp: _boolean, ast.BinOp: _binary, ast.UnaryOp: _unary, ast.Name: _name,
    ast.Attribute: _attribute, ast.Call: _call,
}  # fmt: skip


def _check(node: ast.expr) -> int:
    """Raise Unsupported for what the interpreter does not know, whatever the answers will be, so that an assertion which could
    never hold is found when it is loaded. Returns how many bytes the values in it take."""
    if isinstance(node, _Answer):
        return 0
    if not any(isinstance(part, _Answer) for part in ast.walk(node)):
        return longest(_value(node))
    parts: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Call):
        _function(node)
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, (ast.BinOp, ast.UnaryOp)):
        _known(_BINARY if isinstance(node, ast.BinOp) else _UNARY, node.op)
    elif type(node) not in (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Compare, ast.BoolOp) or None in getattr(node, "keys", []):
        raise Unsupported(f"{type(node).__name__} in the claim")
    return sum(_check(part) for part in parts if isinstance(part, ast.expr))


def _value(node: ast.expr) -> Any:
    """The value of a part that needs no answer."""
    try:
        return _evaluate(node, ())
    except (Unsupported, NotPlain, RecursionError, MemoryError):
        raise
    except Exception as error:  # 1/0, abs('a'), ...
        raise Unsupported(f"a value in it can't be computed ({type(error).__name__})") from None
