"""The key-value section of a GGUF file as a mapping, with typed getters that refuse surprises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from qllama_jax.errors import GGUFError, quoted

D = TypeVar("D")

#: Default of every getter: a key without a value is an error.
REQUIRED: Any = object()


class Metadata(Mapping[str, Any]):
    """Key -> int, float, bool, str, list[str] or a read-only 1-D `np.ndarray` of numbers or bools.

    Integers of every width are Python ints and both float widths Python floats; arrays keep the
    dtype that the file declares. The getters accept exactly the kind that they name and raise
    `GGUFError` with the file, the key, its byte offset, what was found and what was wanted. A
    missing key gives `default` where one is passed, else an error.

    `path` is the name that errors show, `offsets` the byte in the file at which each key starts.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        path: str = "<memory>",
        offsets: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Copy `values`; `path` and `offsets` serve the errors alone."""
        self.path = path
        self._values = dict(values)
        self._offsets = dict(offsets)

    def __getitem__(self, key: str) -> Any:
        """Value of `key`, whatever its kind."""
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        """Keys in file order."""
        return iter(self._values)

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._values)

    def __repr__(self) -> str:
        """File and number of keys: a vocabulary would fill the screen."""
        return f"Metadata({self.path!r}, {len(self)} keys)"

    def error(self, key: str, found: str, wanted: str) -> GGUFError:
        """The error to raise for `key`, in the one format that all of them have."""
        offset = self._offsets.get(key)
        where = "" if offset is None else f" (header offset {offset})"
        return GGUFError(f"{self.path}: key {quoted(key)}{where}: found {found}, wanted {wanted}")

    def get_uint(
        self, key: str, default: D = REQUIRED, *, lo: int = 0, hi: int = 2**63 - 1
    ) -> int | D:
        """Integer in lo..hi, of any width; a signed type is accepted where its value fits."""

        def fits(value: Any) -> bool:
            return type(value) is int and lo <= value <= hi  # a bool is an int to isinstance

        return self._typed(key, default, f"an integer in {lo}..{hi}", fits)

    def get_float(self, key: str, default: D = REQUIRED) -> float | D:
        """Float of either width. May be NaN or infinite: the range is the caller's to judge."""
        return self._typed(key, default, "a float", lambda value: type(value) is float)

    def get_bool(self, key: str, default: D = REQUIRED) -> bool | D:
        """Bool; an integer 0 or 1 is not one."""
        return self._typed(key, default, "a bool", lambda value: type(value) is bool)

    def get_str(self, key: str, default: D = REQUIRED) -> str | D:
        """String, which was valid UTF-8 in the file."""
        return self._typed(key, default, "a string", lambda value: type(value) is str)

    def get_strings(self, key: str, default: D = REQUIRED) -> list[str] | D:
        """Array of strings. It is the mapping's own list, not a copy: do not change it."""
        return self._typed(key, default, "an array of strings", lambda value: type(value) is list)

    def get_ints(self, key: str, default: D = REQUIRED) -> np.ndarray | D:
        """Array of integers [n], in the file's dtype: any width, signed or not."""
        return self._typed(key, default, "an array of integers", lambda value: _holds(value, "iu"))

    def get_floats(self, key: str, default: D = REQUIRED) -> np.ndarray | D:
        """Array of floats [n], in the file's dtype. Items may be NaN or infinite."""
        return self._typed(key, default, "an array of floats", lambda value: _holds(value, "f"))

    def _typed(self, key: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self._values:
            if default is REQUIRED:
                raise GGUFError(f"{self.path}: key {quoted(key)} is missing, wanted {wanted}")
            return default
        value = self._values[key]
        if not fits(value):
            raise self.error(key, describe(value), wanted)
        return value


def describe(value: Any) -> str:
    """A metadata value in a few words for an error: its kind, and the value where it is short."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype.name}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    if isinstance(value, str):
        return f"the string {quoted(value)}"
    return f"the {type(value).__name__} {value!r}"


def _holds(value: Any, kinds: str) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds
