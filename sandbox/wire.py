"""What travels between the sandbox's caller and its processes: frames, reports, and plain data in a bounded encoding.

The worker writes values and reads requests, the caller the other way round; neither trusts what a run has written. Lean on
purpose: the worker imports it, and a small process forks faster.
"""

from __future__ import annotations

import json
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from json.encoder import encode_basestring_ascii

TYPE_CHECKING = False  # by hand, because the worker should not import `typing`
if TYPE_CHECKING:
    from typing import Any

MAX_FRAME = 4 << 20  # bytes of one encoded value
MAX_ITEMS = 1 << 20  # items of one value

# ---- plain data ---------------------------------------------------------------------------------------------------

NUMPY = ("bool", "bool_", "str_", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)))
NUMPY += ("float16", "float32", "float64", "longlong", "ulonglong")
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", deque: "deque"}
_MAPPINGS: dict[type, str] = {dict: "dict", defaultdict: "dict", Counter: "Counter", OrderedDict: "OrderedDict"}
_CONSTANTS = {None: "null", True: "true", False: "false"}
_SPECIAL = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


class NotPlain(ValueError):
    """The value holds something that does not travel, or bytes claim to be a value and are not."""


def encode(value: Any) -> bytes:
    """The bytes of a value made of int, float, bool, str, None, list, tuple, dict, set, defaultdict, Counter, OrderedDict,
    deque and numpy scalars, each by its exact type. Raises NotPlain for any other type and for too large a value.

    The text is JSON; what JSON lacks is an object with one key, its kind. Written by hand because the json module's encoder
    accepts subclasses, and touches more memory than a run of a few milliseconds should copy."""
    left = MAX_ITEMS

    def walk(item: Any) -> str:
        nonlocal left
        left -= 1
        if left < 0:
            raise NotPlain("too many items")
        kind = type(item)
        if kind is int:
            return str(item) if -_SMALL < item < _SMALL else f'{{"int":"{item:x}"}}'
        if kind is list:
            return f"[{','.join([walk(x) for x in item])}]"
        if kind is str:
            return _quoted(item)
        if kind is bool or item is None:
            return _CONSTANTS[item]
        if kind is float:
            text = repr(item)
            return _SPECIAL.get(text, text)
        if kind in _SEQUENCES:
            return f'{{"{_SEQUENCES[kind]}":[{",".join([walk(x) for x in item])}]}}'
        if kind in _MAPPINGS:
            return f'{{"{_MAPPINGS[kind]}":[{",".join([f"[{walk(k)},{walk(v)}]" for k, v in item.items()])}]}}'
        if kind.__name__ in NUMPY and kind is getattr(sys.modules.get("numpy"), kind.__name__, None):
            return f'{{"numpy":["{kind.__name__}",{walk(item.item())}]}}'
        raise NotPlain(f"a value of type {kind.__name__}")

    data = walk(value).encode()
    if len(data) > MAX_FRAME:
        raise NotPlain("too large a value")
    return data


_SMALL = 1 << 63


def _quoted(text: str) -> str:
    """A JSON string. A lone surrogate is no text, and two of them would come back as one character: code points instead."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return f'{{"str":[{",".join([str(ord(c)) for c in text])}]}}'
    return encode_basestring_ascii(text)


# ---- frames on a run's own socket ---------------------------------------------------------------------------------

# One byte that says what it is, four of length, the body. COMPILED and LOADED come before and after the module body;
# then an ANSWER per call, or RETURNED for a run that is a single call whose value does not matter; ERROR ends a run.
COMPILED, LOADED, ANSWER, RETURNED, ERROR = b"C", b"L", b"A", b"R", b"X"
HEAD = struct.Struct("!cI")

# ---- the worker's own socket --------------------------------------------------------------------------------------

RUN, KILL = b"R", b"K"
REPORT = struct.Struct("!iBd")  # wait status, why it was ended (ON_ITS_OWN ...), CPU seconds
ON_ITS_OWN, CPU_TIME, WALL_TIME = 0, 1, 2

# ---- plain data, read back ------------------------------------------------------------------------------------------


def decode(data: bytes, hashed_limit: int = 1000) -> Any:
    """The value that `encode` wrote. Raises NotPlain for anything else, whatever the bytes.

    hashed_limit: the most entries that all sets and mappings in it may have together. Keys with colliding hashes cost
    quadratic time, here in the trainer; a caller who knows how many a right answer has says so."""
    try:
        return _build(json.loads(data.decode("ascii")), [hashed_limit])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError, AttributeError) as error:
        raise NotPlain(f"malformed value: {type(error).__name__}") from None


def _build(node: Any, left: list[int]) -> Any:
    """left: [entries that sets and mappings may still have]."""
    if type(node) is list:
        return [_build(item, left) for item in node]
    if type(node) is not dict:
        return node
    ((tag, body),) = node.items()
    if tag == "int":
        number = int(body, 16)
        if f"{number:x}" != body:  # int() reads "0x_1 " too: what `encode` does not write is no value
            raise NotPlain("no integer")
        return number
    if tag == "str":
        if type(body) is not list:
            raise NotPlain("no text")
        return "".join(map(chr, body))
    if tag == "numpy":
        return _numpy_scalar(*(_build(part, left) for part in body))
    if tag in _UNHASHED:
        return _UNHASHED[tag](_build(item, left) for item in body)
    left[0] -= len(body)
    if left[0] < 0:
        raise NotPlain("more entries than any right answer has")
    return _HASHED[tag](_build(item, left) for item in body)


_UNHASHED: dict[str, Any] = {"tuple": tuple, "deque": deque}
_HASHED: dict[str, Any] = {"set": set, "dict": dict, "Counter": lambda pairs: Counter(dict(pairs)), "OrderedDict": OrderedDict}


def _numpy_scalar(name: str, value: Any) -> Any:
    import numpy  # here, because few answers need it and the worker should stay small

    if name not in NUMPY or type(value) not in (int, float, bool, str):
        raise NotPlain("no numpy scalar")
    return getattr(numpy, name)(value)
