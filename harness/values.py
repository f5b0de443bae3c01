"""What the value of a setting may be: its type and range, as the annotation of its field says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """The values that a number may have: low <= x <= high, or low < x with `above`."""

    low: float
    high: float = 1e38  # what float32 holds
    above: bool = False

    def __str__(self) -> str:
        return f"{'above' if self.above else 'at least'} {self.low} and at most {self.high}"

    def holds(self, x: float) -> bool:
        """Whether x is such a number; one that is not finite never is."""
        return self.low <= x <= self.high and not (self.above and x == self.low)


MOST = 2**31 - 1  # of a whole number: what int32 holds
Count = Annotated[int, Range(1, MOST)]
Few = Annotated[int, Range(1, 4096)]  # of what takes memory or a process each
Tokens = Annotated[int, Range(1, 2**20)]
Group = Annotated[int, Range(2, MOST)]  # of which a spread is taken
Natural = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Moment = Annotated[float, Range(0, 1 - 1e-9)]

# A field that `scale.resolve` fills in where nothing was given, by scale or arm: None on the command line, a value ever after.
BY_SCALE: Any = None
if TYPE_CHECKING:
    T = TypeVar("T")
    ByScale = Union[T, T]  # noqa: UP007, an alias that takes a parameter
else:
    ByScale = Optional


def wrong(x: Any, hint: Any) -> str:
    """What a value should be instead, by the annotation of its field; "" where it is that."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return wrong(x, parts[0]) or next((str(r) for r in parts[1:] if not r.holds(x)), "")
    if kind is Literal:
        return "" if x in parts else f"one of {', '.join(parts)}"
    if kind in (Union, UnionType):  # one type, or None
        return "" if x is None else wrong(x, parts[0])
    if kind is tuple and parts[-1] is Ellipsis:
        sound = isinstance(x, tuple) and x and all(x.count(y) == 1 and not wrong(y, parts[0]) for y in x)
        return "" if sound else f"some, each once, of {', '.join(get_args(parts[0]))}"
    if kind is tuple:
        whole = isinstance(x, tuple) and len(x) == len(parts)
        return next(filter(None, map(wrong, x, parts)), "") if whole else f"{len(parts)} numbers"
    accepted, words = TYPES[hint]
    return "" if isinstance(x, accepted) and (hint is bool or not isinstance(x, bool)) else words


TYPES: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
    Path: ((str, Path), "a path"),
}
