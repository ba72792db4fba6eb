"""The work that a chat template may do, counted: what is spent for walking, making and showing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import Undefined
from jinja2.exceptions import SecurityError

TEXT_PER_UNIT = 32  # characters copied or compared for one unit of work
ITEMS_PER_UNIT = 4  # items of a new list, or characters cut into one
_MAX_DEPTH = 64
_MAX_INT_BITS = 1024

_CONTAINERS = (list, tuple, dict)
_SCALARS = (str, int, float, Undefined, type(None))
_LAZY = (Iterator, range, type({}.keys()), type({}.values()), type({}.items()))


class Budget:
    """Units of work, about a microsecond each. All methods raise SecurityError where it is spent.

    A value may hold another one twice, which doubles its text with every level though not its
    memory. So its text, and comparing it, is paid for by walking through it first.
    """

    def __init__(self, units: int) -> None:
        """Start with `units`."""
        self._left = units

    def spend(self, units: int = 1) -> None:
        """Take from the budget, never put back: `units` below 0 are 0."""
        self._left -= max(units, 0)
        if self._left < 0:
            raise SecurityError("it does more work than chat templates may")

    def measure(self, value: Any) -> int:
        """Spend what it takes to walk through a value once, as comparing or showing it does."""
        cost = 0
        level = [value]
        for depth in range(_MAX_DEPTH):
            below: list[Any] = []
            for item in level:
                cost += 1
                if isinstance(item, str):
                    cost += len(item) // TEXT_PER_UNIT
                elif isinstance(item, dict):
                    below += [*item, *item.values()]
                elif isinstance(item, list | tuple):
                    below += item
                elif depth and not isinstance(item, _SCALARS):
                    raise SecurityError(f"a {type(item).__name__} is inside a value")
                # What is left bounds the next level too: it is paid for before it is walked.
                if cost + len(below) > self._left:
                    self.spend(cost + len(below))
            if not below:
                self.spend(cost)
                return cost
            level = below
        raise SecurityError("values are nested too deep")

    def one(self, value: Any) -> Any:
        """A value of which only its kind is looked at."""
        self.spend()
        return value

    def touched(self, value: Any) -> Any:
        """A value whose items or characters are gone through, but not what is inside of them."""
        sized = isinstance(value, (str, *_CONTAINERS))
        self.spend(1 + len(value) // ITEMS_PER_UNIT if sized else 1)
        return value

    def walked(self, value: Any) -> Any:
        """A value that is gone through with all that is inside; a list if it is lazy."""
        value = listed(value)
        self.measure(value)
        return value

    def shown(self, value: Any) -> Any:
        """A value that is about to be turned into text; a list if it is lazy."""
        value = listed(value)
        if not isinstance(value, (*_CONTAINERS, *_SCALARS)):
            raise SecurityError(f"a {type(value).__name__} is shown as text")
        self.measure(value)
        return value

    def made(self, value: Any) -> Any:
        """A value that an operation gave; if it is lazy, its items are counted as they come."""
        if isinstance(value, str):
            self.spend(1 + len(value) // TEXT_PER_UNIT)
        elif isinstance(value, _CONTAINERS):
            self.spend(1 + len(value) // ITEMS_PER_UNIT)
        elif isinstance(value, int):
            check_int(value)
        elif isinstance(value, Iterator):
            return self.counted(value, 1)
        return value

    def counted(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        """The items, each for `cost` units."""
        for item in items:
            self._left -= cost  # not by `spend`: a call for each item would take most of the time
            if self._left < 0:
                self.spend()
            yield item


def listed(value: Any) -> Any:
    """A lazy value as a list, so that it can be walked through before it is used."""
    return list(value) if isinstance(value, _LAZY) else value


def check_int(value: int) -> None:
    """Raise SecurityError for an integer with which arithmetic is slow."""
    if value.bit_length() > _MAX_INT_BITS:
        raise SecurityError(f"an integer has more than {_MAX_INT_BITS} bits")
