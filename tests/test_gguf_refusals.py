"""Each check of the reader has a file here that only this check refuses."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gguf_bytes import (
    TinyGGUF,
    assert_same_tensors,
    read_with_gguf_py,
    string,
    typed_array,
    typed_string,
    typed_u32,
    u32,
    u64,
)
from qllama_jax.gguf_file import read_gguf
from refusals import message_of

BASE = TinyGGUF().encode()
SIZE = len(BASE)
# Header offsets of the three tensors. A key that is added begins where the first tensor was.
ONE, TWO, THREE = (len(TinyGGUF(rows=TinyGGUF().rows[:i]).header()) for i in range(3))
NEW = ONE
refused = functools.partial(message_of, read_gguf)


Change = Callable[[TinyGGUF], object]


def add_key(key: bytes, value: bytes) -> Change:
    return lambda tiny: tiny.keys.append((key, value))


def row(index: int, **changes: Any) -> Change:
    return lambda tiny: tiny.rows.__setitem__(index, replace(tiny.rows[index], **changes))


def tiny_with(**changes: object) -> Change:
    return lambda tiny: [setattr(tiny, name, value) for name, value in changes.items()]


def alignment(value: bytes, size: int = 32) -> Change:
    """Another general.alignment, and a layout that follows it."""

    def change(tiny: TinyGGUF) -> None:
        tiny.keys[1] = (b"general.alignment", value)
        tiny.alignment, start, data = size, 0, b""
        for one in tiny.rows:
            raw = tiny.data[one.start :][: 54 if one.name == b"two" else 16]
            one.start, start = start, start + -(-len(raw) // size) * size
            data = (data + raw).ljust(start, b"\0")
        tiny.data, tiny.end = data, b""

    return change


def swap_data(tiny: TinyGGUF) -> None:
    """The first two tensors' data in the other order: no overlap and no hole."""
    tiny.rows[0].start, tiny.rows[1].start = 64, 0
    tiny.data = tiny.data[32:96] + tiny.data[:32] + tiny.data[96:]


def hole(tiny: TinyGGUF) -> None:
    """Thirty-two bytes between the second and the third tensor that are no one's."""
    tiny.rows[2].start += 32
    tiny.data = tiny.data[:96] + bytes(32) + tiny.data[96:]


def overlap(tiny: TinyGGUF) -> None:
    """The second tensor over the first."""
    tiny.rows[1].start, tiny.rows[2].start = 0, 64
    tiny.data = tiny.data[32:]


def unpadded(tiny: TinyGGUF) -> None:
    """The second tensor right behind the first."""
    tiny.rows[1].start, tiny.rows[2].start = 16, 96
    tiny.data = tiny.data[:16] + tiny.data[32:86] + bytes(26) + tiny.data[96:]


BAD: dict[str, tuple[Change, str]] = {
    # preamble
    "version 0": (tiny_with(version=0), "header: version 0 is not supported, wanted 2 or 3"),
    "version 1": (tiny_with(version=1), "version 1 is not supported, wanted 2 or 3"),
    "version 4": (tiny_with(version=4), "version 4 is not supported, wanted 2 or 3"),
    "big-endian": (tiny_with(version=3 << 24), "version 0x03000000: a big-endian file"),
    "2^64-1 keys": (tiny_with(n_keys=2**64 - 1), "18446744073709551615 keys, allowed 0..65536"),
    "2^63 tensors": (tiny_with(n_tensors=2**63), "9223372036854775808 tensors, allowed 0..1048576"),
    "one tensor less": (
        tiny_with(n_tensors=2),
        "bytes follow the last tensor, from byte ",
    ),
    "counts that do not fit": (
        tiny_with(n_keys=50),
        "50 keys and 3 tensors take at least 823 bytes but the file has",
    ),
    # keys
    "empty key": (add_key(b"", typed_u32(1)), "the key has 0 bytes, allowed 1..65535"),
    "long key": (add_key(b"k" * 65_536, typed_u32(1)), "the key has 65536 bytes, allowed 1..65535"),
    "key with newline": (add_key(b"x\ny", typed_u32(1)), r"'x\ny' has characters other than"),
    "key with umlaut": (add_key("ä".encode(), typed_u32(1)), "other than printable ASCII"),
    "key not UTF-8": (add_key(b"x\xff", typed_u32(1)), "the key is not UTF-8 at byte"),
    "same key twice": (
        add_key(b"general.architecture", typed_string("llama")),
        f"key 'general.architecture' (header offset {NEW}): it occurs twice, first at ",
    ),
    "value type 13": (add_key(b"x.y", u32(13) + u32(1)), f"key 'x.y' (header offset {NEW}): value"),
    "value type 2^32-1": (
        add_key(b"x.y", u32(2**32 - 1)),
        "value type is 4294967295, allowed 0..12",
    ),
    "string not UTF-8": (
        add_key(b"x.y", typed_string(b"ok\xed\xa0\x80")),
        f"key 'x.y' (header offset {NEW}): string is not UTF-8 at byte ",
    ),
    "string past the end": (
        add_key(b"x.y", u32(8) + u64(2**20)),
        "string ends at byte ",
    ),
    "string of 2^64-1": (
        add_key(b"x.y", u32(8) + u64(2**64 - 1)),
        "string has 18446744073709551615 bytes, allowed 0..67108864",
    ),
    "bool 2": (add_key(b"x.y", u32(7) + b"\2"), " is 2, allowed 0 and 1"),
    "bool 255 in an array": (
        add_key(b"x.y", typed_array(7, 3, b"\1\0\xff")),
        f"key 'x.y' (header offset {NEW}): bool at byte ",
    ),
    "array of arrays": (
        add_key(b"x.y", typed_array(9, 1, u32(4) + u64(1) + u32(1))),
        "an array of arrays is not supported",
    ),
    "array item type 13": (add_key(b"x.y", typed_array(13, 0, b"")), "array item type is 13"),
    "array of 2^63": (
        add_key(b"x.y", typed_array(4, 2**63, b"")),
        "array of 9223372036854775808 items, allowed 0..16777216",
    ),
    "array past the end": (
        add_key(b"x.y", typed_array(4, 2**20, b"")),
        "UINT32 value ends at byte",
    ),
    "strings past the end": (
        add_key(b"x.y", typed_array(8, 2**20, b"")),
        "1048576 strings do not fit into the ",
    ),
    "string item not UTF-8": (
        add_key(b"x.y", typed_array(8, 2, string("a") + string(b"\xc0\x80"))),
        "item 1 is not UTF-8 at byte",
    ),
    "string item past the end": (
        add_key(b"x.y", typed_array(8, 2, string("a") + u64(2**40))),
        "item 1 has 1099511627776 bytes, allowed",
    ),
    # alignment
    "alignment 0": (alignment(typed_u32(0)), "key 'general.alignment' (header offset "),
    "alignment 4": (
        alignment(typed_u32(4), 4),
        "found the int 4 (UINT32), wanted a UINT32 that is",
    ),
    "alignment 48": (alignment(typed_u32(48), 48), "found the int 48 (UINT32), wanted"),
    "alignment 2^21": (alignment(typed_u32(2**21), 2**21), "power of two in 8..1048576"),
    "alignment uint64": (
        alignment(u32(10) + u64(32)),
        "found the int 32 (UINT64), wanted a UINT32",
    ),
    "alignment string": (alignment(typed_string("32")), "found the string '32' (STRING), wanted"),
    "alignment array": (
        alignment(typed_array(4, 1, u32(32))),
        "found an array of 1 uint32 (ARRAY), wanted",
    ),
    # tensor table
    "empty name": (row(2, name=b""), f"tensor 2 (header offset {THREE}): the name has 0 bytes"),
    "long name": (row(2, name=b"n" * 64), "the name has 64 bytes, allowed 1..63"),
    "name not UTF-8": (row(2, name=b"\x80"), "the name is not UTF-8 at byte"),
    "name with NUL": (row(2, name=b"x\0y"), r"the name 'x\x00y' has control characters"),
    "name with escape": (row(2, name=b"\x1b[2J"), r"the name '\x1b[2J' has control characters"),
    "name with a C1 control": (row(2, name=b"\xc2\x9b2J"), r"the name '\x9b2J' has control"),
    "same name twice": (
        row(2, name=b"one"),
        f"tensor 'one' (header offset {THREE}): it occurs twice, first at header offset {ONE}",
    ),
    "no dimensions": (row(2, shape=(), qtype=24), "it has 0 dimensions, allowed 1..4"),
    "five dimensions": (row(2, shape=(2, 2, 2, 1, 1)), "it has 5 dimensions, allowed 1..4"),
    "2^32-1 dimensions": (row(2, n_dims=2**32 - 1), "it has 4294967295 dimensions, allowed 1..4"),
    "dimension 0": (
        lambda tiny: [row(2, shape=(2, 0, 2))(tiny), tiny_with(data=tiny.data[:96], end=b"")(tiny)],
        f"tensor 'three' (header offset {THREE}): shape (2, 0, 2), allowed dimensions from 1",
    ),
    "dimension 2^64-1": (row(2, shape=(2**64 - 1,)), "with a product below 2**63"),
    "product 2^63": (row(2, shape=(2**32, 2**31)), "with a product below 2**63"),
    "product 2^64": (row(2, shape=(2**32, 2**32)), "with a product below 2**63"),
    "product 2^64 + 8": (row(2, shape=(2**3, 2**61 + 1)), "with a product below 2**63"),
    "removed type": (row(2, qtype=31), "unsupported tensor type 31 (Q4_0_4_4)"),
    "type not in the table": (row(2, qtype=42), "unsupported tensor type 42 (Q2_0)"),
    "unknown type": (
        row(2, qtype=1000),
        f"tensor 'three' (header offset {THREE}): unsupported tensor type 1000",
    ),
    "part of a block": (
        row(1, shape=(48, 2)),
        f"tensor 'two' (header offset {TWO}): row of 48 values is not a multiple of Q4_0's 32",
    ),
    # layout
    "swapped": (swap_data, f"tensor 'one' (header offset {ONE}): data offset 64, wanted 0"),
    "overlap": (
        overlap,
        f"tensor 'two' (header offset {TWO}): data offset 0, wanted 32",
    ),
    "hole": (hole, f"tensor 'three' (header offset {THREE}): data offset 128, wanted 96"),
    "not aligned": (unpadded, f"tensor 'two' (header offset {TWO}): data offset 16, wanted 32"),
    "offset that wraps": (row(1, start=2**64 - 32), "data offset 18446744073709551584, wanted 32"),
    "past the end": (
        row(2, shape=(2, 2, 1000)),
        f"but the file has {SIZE} bytes; the download is incomplete (6%) or it is corrupt",
    ),
    "far past the end": (row(2, shape=(2**62,)), "incomplete (0%) or it is corrupt"),
    "one byte appended": (
        tiny_with(end=bytes(17)),
        f"1 bytes follow the last tensor, from byte {SIZE} on: the table of tensors is incomplete",
    ),
    "appended twice": (
        tiny_with(end=bytes(16) + BASE),
        f"{SIZE} bytes follow the last tensor, from byte {SIZE} on",
    ),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", BAD)
def test_one_thing_wrong_is_refused_with_place_and_reason(tmp_path, name, version):
    change, wanted = BAD[name]
    tiny = TinyGGUF(version=version if name.split()[0] not in ("version", "big-endian") else 3)
    change(tiny)
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.encode())
    assert wanted in refused(path)


@pytest.mark.parametrize("count", ["n_keys", "n_tensors"])
@pytest.mark.parametrize("step", [-1, 1])
def test_a_count_that_is_off_by_one_is_refused(tmp_path, count, step):
    tiny = TinyGGUF()
    setattr(tiny, count, len(tiny.keys if count == "n_keys" else tiny.rows) + step)
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.encode())
    refused(path)


GOOD: dict[str, Change] = {
    "version 2": tiny_with(version=2),
    "no keys": lambda tiny: alignment(b"")(tiny) or tiny_with(keys=[])(tiny),
    "key of 65,535 bytes": add_key(b"k" * 65_535, typed_u32(1)),
    "all printable keys": add_key(bytes(range(32, 127)), typed_u32(1)),
    "alignment 8": alignment(typed_u32(8), 8),
    "alignment 2^20": alignment(typed_u32(2**20), 2**20),
    "name of 63 bytes": row(2, name=b"n" * 63),
    "name with umlaut and space": row(2, name="ä ▁".encode()),
    "name with a space that does not break": row(2, name="x\N{NO-BREAK SPACE}y".encode()),
    "four dimensions": row(2, shape=(2, 1, 2, 2)),
    "no final padding": tiny_with(end=b""),
    "half the final padding": tiny_with(end=bytes(7)),
    "padding that is not zero": tiny_with(end=b"\xff" * 16),
    "no tensors": tiny_with(rows=[], data=b"", end=b""),
    "merged from a split file": add_key(b"split.count", u32(2) + struct.pack("<H", 0)),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_just_allowed_is_read_as_gguf_py_reads_it(tmp_path, name):
    tiny = TinyGGUF()
    GOOD[name](tiny)
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.encode())
    assert_same_tensors(read_gguf(path), [read_with_gguf_py(path)])


def test_bytes_at_the_end_are_read_over_on_request(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(BASE + b"more")
    assert "4 bytes follow" in refused(path)
    assert_same_tensors(read_gguf(path, allow_trailing=True), [read_with_gguf_py(path)])


def test_text_of_a_file_is_shown_escaped_and_short(tmp_path):
    path = tmp_path / "m.gguf"
    for key in (b"\x1b" * 60_000, b"k" * 60_000):
        tiny = TinyGGUF()
        tiny.keys += [(key, typed_u32(1)), (key, typed_u32(1))]
        path.write_bytes(tiny.encode())
        message = refused(path)
        assert message.isprintable()
        assert len(message) < 300
