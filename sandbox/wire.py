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
    from collections.abc import Iterable
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

    A numpy scalar travels as the Python number or text that it holds: left to compare itself, numpy casts what it is compared
    with, and a float16 that is infinite equals 123456789.

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
            return walk(str.__str__(item) if kind.__name__ == "str_" else item.item())  # str_.item() drops NULs at the end
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

# A RUN's body is what to look at once the run has ended (EXIT, STDOUT, a file's name, or nothing), a NUL, and the setup.
RUN, KILL = b"R", b"K"
EXIT, STDOUT = "exit", "stdout"
REPORT = struct.Struct("!iBdI")  # wait status, why it was ended (ON_ITS_OWN ...), CPU seconds, bytes seen, which follow
MAX_SEEN = 1 << 16  # bytes of what a run printed or wrote
ON_ITS_OWN, CPU_TIME, WALL_TIME = 0, 1, 2

# ---- plain data, read back ------------------------------------------------------------------------------------------


def decode(data: bytes) -> Any:
    """The value that `encode` wrote, plain Python. Raises NotPlain for anything else, whatever the bytes.

    Its cost is linear in the length of the bytes, which is the caller's to bound (`longest`)."""
    try:  # each NaN is an object of its own: containers take two references to one object for equal without comparing
        return _build(json.loads(data.decode("ascii"), parse_constant=float))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError, AttributeError) as error:
        if isinstance(error, NotPlain):
            raise
        raise NotPlain(f"malformed value: {type(error).__name__}") from None


def _build(node: Any) -> Any:
    if type(node) is list:
        return [_build(item) for item in node]
    if type(node) is not dict:
        return node
    ((tag, body),) = node.items()
    if tag == "int":
        number = int(body, 16)
        if f"{number:x}" != body:  # int() reads "0x_1 " too: what `encode` does not write is no value
            raise NotPlain("no integer")
        return number
    if type(body) is not list:
        raise NotPlain("no items")
    if tag == "str":
        return "".join(map(chr, body))
    items = [_build(item) for item in body]
    if tag in _MAKE_MAPPING:
        if any(type(pair) is not list for pair in items):
            raise NotPlain("no pairs")
        spread(key for key, _ in items)
        return _MAKE_MAPPING[tag](items)
    return _MAKE_SEQUENCE[tag](spread(items) if tag == "set" else items)


_MAKE_SEQUENCE: dict[str, Any] = {"tuple": tuple, "deque": deque, "set": set}
_MAKE_MAPPING: dict[str, Any] = {"dict": dict, "Counter": lambda pairs: Counter(dict(pairs)), "OrderedDict": OrderedDict}
SAME_HASH = 32  # different keys with one hash, at most; tuples of -1 and -2, whose hashes are equal, are honest ones


def spread(keys: Iterable[Any]) -> list[Any]:
    """The keys as a list, sure to be hashed into a set or mapping in linear time: NotPlain is raised where more than SAME_HASH
    different ones share a hash, each of which is compared with all before it. Integers with one hash are easily made."""
    keys = list(keys)
    seen: dict[int, list[Any]] = {}
    for key in keys:
        same = seen.setdefault(hash(key), [])
        if key not in same:
            same.append(key)
            if len(same) > SAME_HASH:
                raise NotPlain("too many keys with one hash")
    return keys


def longest(value: Any) -> int:
    """The most bytes that a plain value takes which equals this one, and a comma: 5 may come as 5.0, 1 as true. Raises NotPlain
    where no plain value can be equal, or its keys collide as those of no right answer do."""
    kind = type(value)
    if kind in (int, bool, type(None)):
        return 8 + (value or 0).bit_length() // 3
    if kind is float:
        return 360 if _SMALL <= abs(value) < float("inf") else 26  # an integer of 1024 bits, or 24 characters
    if kind is str:
        return len(_quoted(value)) + 1
    if kind is list:
        return 3 + sum(map(longest, value))
    if kind in _SEQUENCES:
        return 20 + sum(map(longest, spread(value) if kind is set else value))
    if kind in _MAPPINGS:
        return 20 + sum(3 + longest(key) + longest(value[key]) for key in spread(value))
    raise NotPlain(f"a value of type {kind.__name__}")
