"""What chat templates may name besides the variables: filters, tests, attributes, functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace

#: Filters of Jinja's that go through their value, but not into its items.
SHALLOW_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "e", "escape", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "reject", "rejectattr", "reverse", "safe", "select",
    "selectattr", "title", "trim", "upper",
)  # fmt: skip
#: Filters of Jinja's that compare items.
DEEP_FILTERS = ("dictsort", "max", "min", "sort", "unique")
#: Tests that look at the kind of their value, or at a number.
TYPE_TESTS = (
    "boolean", "defined", "even", "false", "float", "integer", "iterable", "mapping", "none",
    "number", "odd", "sequence", "string", "true", "undefined",
)  # fmt: skip
#: Tests that compare values.
DEEP_TESTS = (
    "divisibleby", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower",
    "lt", "ne", "sameas", "upper", "==", "!=", ">", ">=", "<", "<=",
)  # fmt: skip
#: Methods and attributes by type; a namespace has those that the template gave it.
ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
        "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "isupper", "join", "lower",
        "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
        "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
        "title", "upper",
    }),
    dict: frozenset({"get", "items", "keys", "values"}),
    LoopContext: frozenset({
        "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length",
        "nextitem", "previtem", "revindex", "revindex0",
    }),
}  # fmt: skip


def _raise(message: Any = "") -> NoReturn:
    raise ValueError(f"it says: {message}")


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 64:
        raise SecurityError("a pattern for a date has more than 64 characters")
    return datetime.now().strftime(pattern)


def _namespace(*values: Mapping[str, Any], **items: Any) -> Namespace:
    _check_names(items)
    return Namespace(*values, **items)


def _plain_dict(*values: Any, **items: Any) -> dict[str, Any]:
    _check_names(items)
    return dict(*values, **items)


def _check_names(items: Iterable[str]) -> None:
    for name in items:
        if name.startswith("__"):
            raise SecurityError(f"a name starts with __: {name[:40]!r}")


GLOBALS: Mapping[str, Callable[..., Any]] = {
    "dict": _plain_dict,
    "namespace": _namespace,
    "raise_exception": _raise,
    "range": safe_range,
    "strftime_now": _strftime_now,
}
