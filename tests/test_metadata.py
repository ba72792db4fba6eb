from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qllama_jax.errors import ContextOverflowError, GGUFError, NumericalError, quoted
from qllama_jax.metadata import Metadata

VALUES: dict[str, Any] = {
    "int": 7,
    "negative": -1,
    "huge": 2**63,
    "float": 0.5,
    "nan": float("nan"),
    "true": True,
    "str": "text",
    "strings": ["a", "b"],
    "ints": np.array([1, 2], np.int32),
    "bytes": np.array([1, 2], np.uint8),
    "floats": np.array([1, 2], np.float32),
    "doubles": np.array([1, 2], np.float64),
    "bools": np.array([True, False]),
}
METADATA = Metadata(VALUES, "m.gguf", {key: 24 + i for i, key in enumerate(VALUES)})

Getter = Callable[..., Any]
ACCEPTED: dict[Getter, set[str]] = {
    Metadata.get_uint: {"int"},
    Metadata.get_float: {"float", "nan"},
    Metadata.get_bool: {"true"},
    Metadata.get_str: {"str"},
    Metadata.get_strings: {"strings"},
    Metadata.get_ints: {"ints", "bytes"},
    Metadata.get_floats: {"floats", "doubles"},
}
each_getter = pytest.mark.parametrize("getter", ACCEPTED, ids=lambda getter: getter.__name__)


@each_getter
@pytest.mark.parametrize("key", VALUES)
def test_a_getter_gives_its_kind_and_refuses_every_other(getter, key):
    if key in ACCEPTED[getter]:
        assert getter(METADATA, key) is VALUES[key]
        assert getter(METADATA, key, None) is VALUES[key]
        return
    for default in ((), (None,)):  # a default is for a missing key, not for a wrong one
        with pytest.raises(GGUFError) as caught:
            getter(METADATA, key, *default)
        where = f"m.gguf: key '{key}' (header offset {METADATA._offsets[key]}): found "
        assert str(caught.value).startswith(where)
        assert ", wanted a" in str(caught.value)


@each_getter
def test_a_missing_key_gives_the_default_or_an_error(getter):
    default = object()
    assert getter(METADATA, "x.none", default) is default
    assert getter(METADATA, "x.none", None) is None
    with pytest.raises(GGUFError, match=r"^m\.gguf: key 'x\.none' is missing, wanted an? \w+"):
        getter(METADATA, "x.none")


@pytest.mark.parametrize(
    ("lo", "hi", "fits"), [(7, 7, True), (0, 7, True), (8, 9, False), (0, 6, False)]
)
def test_an_integer_lies_within_its_bounds_which_both_belong(lo, hi, fits):
    if fits:
        assert METADATA.get_uint("int", lo=lo, hi=hi) == 7
    else:
        with pytest.raises(GGUFError, match=f"found the int 7, wanted an integer in {lo}..{hi}"):
            METADATA.get_uint("int", lo=lo, hi=hi)


FOUND = {
    "true": "found the bool True",
    "str": "found the string 'text'",
    "strings": "found an array of 2 strings",
    "floats": "found an array of 2 float32",
    "bools": "found an array of 2 bool",
    "huge": "found the int 9223372036854775808, wanted an integer in 0..9223372036854775807",
}


@pytest.mark.parametrize("key", FOUND)
def test_an_error_says_what_was_found(key):
    with pytest.raises(GGUFError) as caught:
        METADATA.get_uint(key)
    assert FOUND[key] in str(caught.value)


def test_metadata_is_a_mapping_in_file_order():
    assert list(METADATA) == list(VALUES)
    assert len(METADATA) == 13
    assert METADATA["int"] == 7
    assert "x.none" not in METADATA
    assert METADATA.get("x.none") is None
    assert repr(METADATA) == "Metadata('m.gguf', 13 keys)"


def test_metadata_does_not_change_with_the_mapping_it_was_made_of():
    values = {"x": 1}
    metadata = Metadata(values)
    values["x"] = 2
    assert metadata.get_uint("x") == 1
    assert metadata.path == "<memory>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "'plain'"),
        (b"GGUF\0", r"b'GGUF\x00'"),
        ("\x1b[2J", r"'\x1b[2J'"),
        ("\u202e", r"'\u202e'"),
        ("k" * 78, "'" + "k" * 78 + "'"),
        ("k" * 79, "'" + "k" * 79 + "..."),
        ("\0" * 10**6, "'" + r"\x00" * 19 + r"\x0" + "..."),
    ],
)
def test_text_of_a_file_is_shown_escaped_and_cut_at_80_characters(text, shown):
    assert quoted(text) == shown


def test_errors_are_of_the_kinds_that_callers_catch():
    assert issubclass(GGUFError, ValueError)
    assert issubclass(ContextOverflowError, ValueError)
    assert issubclass(NumericalError, ArithmeticError)
