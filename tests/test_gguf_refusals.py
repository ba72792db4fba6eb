"""Each check of the reader has a file here that only this check refuses."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

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
from qllama_jax import gguf_cursor, gguf_header
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf

BASE = TinyGGUF().encode()
SIZE = len(BASE)
# Header offsets of the three tensors. A key that is added begins where the first tensor was.
ONE, TWO, THREE = (len(TinyGGUF(rows=TinyGGUF().rows[:i]).header()) for i in range(3))
NEW = ONE


def refused(path: Path) -> str:
    """Message with which a file is refused, which begins with the file."""
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# Files that are something else

OTHER_FILES = {
    "empty": (b"", "header: the file is empty (0 bytes)"),
    "half a magic": (b"GG", "preamble ends at byte 24 but the file has 2 bytes; it is truncated"),
    "wrong magic": (b"GGUG" + BASE[4:], "not a GGUF file: it starts with b'GGUG"),
    "html": (b"\n<!DOCTYPE html>\n<html>404</html>", "an HTML page"),
    "html without doctype": (b"<HTML><body>404</body>", "an HTML page"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n",
        "a git-LFS pointer",
    ),
    "legacy ggml": (b"lmgg" + BASE[4:], "a legacy GGML model"),
    "legacy ggmf": (b"fmgg" + BASE[4:], "a legacy GGMF model"),
    "legacy ggjt": (b"tjgg" + BASE[4:], "a legacy GGJT model"),
    "legacy adapter": (b"algg" + BASE[4:], "a legacy GGML adapter"),
    "legacy session": (b"nsgg" + BASE[4:], "a saved llama.cpp session"),
    "reversed magic": (b"FUGG" + BASE[4:], "a big-endian file"),
    "zip": (b"PK\x03\x04" + BASE[4:], "a zip archive, such as a PyTorch checkpoint"),
    "hole": (bytes(4096), "zeros: an interrupted download"),
    "escapes": (b"\x1b[2J" + BASE[4:], r"it starts with b'\x1b[2J"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_refused_and_named(tmp_path, name):
    raw, wanted = OTHER_FILES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert wanted in refused(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # its name may have 107 bytes


SPECIAL_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "directory": (lambda path: path.mkdir(), "is a directory, wanted a regular file"),
    "fifo": (os.mkfifo, "is a FIFO, wanted a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a character device, wanted"),
    "socket": (make_socket, "is a socket, wanted a regular file"),
}


@pytest.mark.parametrize("name", SPECIAL_FILES)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, wanted = SPECIAL_FILES[name]
    path = tmp_path / "m.gguf"
    make(path)
    assert wanted in refused(path)


def test_a_fifo_that_takes_the_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    path, fifo = tmp_path / "m.gguf", tmp_path / "fifo"
    path.write_bytes(BASE)
    os.mkfifo(fifo)
    regular = path.stat()
    fifo.replace(path)
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: regular)
    assert "is a FIFO" in refused(path)


def test_a_path_below_a_file_or_with_a_nul_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(BASE)
    assert "cannot be read: Not a directory" in refused(path / "below")
    # Not below tmp_path: an error shortens a long name.
    with pytest.raises(GGUFError, match=r"^'/m\\x00\.gguf': no such file"):
        read_gguf("/m\0.gguf")


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "blob").write_bytes(BASE)
    (tmp_path / "m.gguf").symlink_to("blob")
    assert list(read_gguf(tmp_path / "m.gguf").tensors) == ["one", "two", "three"]


def test_what_is_no_path_is_a_type_error():
    with pytest.raises(TypeError):
        read_gguf(0)  # pyright: ignore  # not standard input, on which open(0) would wait


# The tiny file with one thing wrong

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


# Limits


def write_sparse(path: Path, head: bytes, size: int) -> Path:
    """A file without tensors of `size` bytes: a header that goes on with zeros."""
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def test_a_string_may_have_64_mib(tmp_path):
    length = 64 * 2**20 + 1
    head = TinyGGUF(keys=[(b"x.y", u32(8) + u64(length))], rows=[]).header()
    path = write_sparse(tmp_path / "m.gguf", head, len(head) + length)
    assert f"string has {length} bytes, allowed 0..67108864" in refused(path)


def test_an_array_may_have_16_mi_items(tmp_path):
    for length in (16 * 2**20, 16 * 2**20 + 1):
        head = TinyGGUF(keys=[(b"x.y", typed_array(0, length, b""))], rows=[]).header()
        path = write_sparse(tmp_path / f"{length}.gguf", head, len(head) + length)
        if length == 16 * 2**20:
            assert read_gguf(path).metadata["x.y"].shape == (length,)
        else:
            assert f"array of {length} items, allowed 0..16777216" in refused(path)


def test_keys_and_tensors_are_limited_in_number(tmp_path, monkeypatch):
    assert gguf_header.MAX_KEYS == 65_536
    assert gguf_header.MAX_TENSORS == 1_048_576
    path = tmp_path / "m.gguf"
    path.write_bytes(BASE)
    monkeypatch.setattr(gguf_header, "MAX_KEYS", 6)
    monkeypatch.setattr(gguf_header, "MAX_TENSORS", 3)
    read_gguf(path)
    monkeypatch.setattr(gguf_header, "MAX_TENSORS", 2)
    assert "3 tensors, allowed 0..2" in refused(path)
    monkeypatch.setattr(gguf_header, "MAX_KEYS", 5)
    assert "6 keys, allowed 0..5" in refused(path)


def test_a_header_is_limited_in_size(tmp_path, monkeypatch):
    assert gguf_cursor.MAX_HEADER == 256 * 2**20
    path = tmp_path / "m.gguf"
    path.write_bytes(BASE)
    end = len(TinyGGUF().header())
    monkeypatch.setattr(gguf_header, "READ_STEP", 64)  # of the first read
    monkeypatch.setattr(gguf_cursor, "MAX_HEADER", end)
    read_gguf(path)
    monkeypatch.setattr(gguf_cursor, "MAX_HEADER", end - 1)
    message = f"tensor offset ends at byte {end}; a header may have {end - 1} bytes"
    assert message in refused(path)


# Split files


def write_split(folder: Path) -> list[Path]:
    """The tiny file's tensors in three parts, written by gguf-py."""
    folder.mkdir(exist_ok=True)
    writer = GGUFWriter(folder / "m", "llama", split_max_tensors=1)
    writer.add_string("general.name", "whole")
    source = folder / "source"
    source.write_bytes(BASE)
    for name, tensor in read_gguf(source).tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=GGMLQuantizationType(tensor.qtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def edit(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def number(key: str, value: int) -> bytes:
    """A split key as gguf-py writes it: uint16, the number of tensors int32."""
    kind, form = (5, "<i") if key == "split.tensors.count" else (2, "<H")
    return string(key) + u32(kind) + struct.pack(form, value)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_of_a_split_file_opens_all_parts(tmp_path, part):
    paths = write_split(tmp_path / "split")
    file = read_gguf(paths[part])
    assert file.path == paths[part]
    assert file.metadata.path == str(paths[0])
    assert file.metadata.get_str("general.name") == "whole"
    assert list(file.tensors) == ["one", "two", "three"]
    assert_same_tensors(file, [read_with_gguf_py(path) for path in paths])


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (1, 2)])
def test_missing_parts_are_listed(tmp_path, gone):
    paths = write_split(tmp_path / "split")
    for part in gone:
        paths[part].unlink()
    there = next(path for path in paths if path.exists())
    names = ", ".join(paths[part].name for part in gone)
    assert refused(there) == f"{len(gone)} of 3 parts are missing: {names}"


def rename_to_plain(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("model.gguf"))


def rename_to_fewer(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("m-00001-of-00002.gguf"))


def rename_to_part_4(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("m-00004-of-00003.gguf"))


def rename_to_part_0(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("m-00000-of-00003.gguf"))


@pytest.mark.parametrize(
    "rename", [rename_to_plain, rename_to_fewer, rename_to_part_4, rename_to_part_0]
)
def test_a_part_under_another_name_is_refused(tmp_path, rename):
    path = rename(write_split(tmp_path / "split"))
    message = "one of 3 parts, so its name must end like -00001-of-00003.gguf"
    assert refused(path) == message


BAD_PARTS: dict[str, tuple[int, tuple[bytes, bytes], str]] = {
    "a part that says it is another": (
        1,
        (number("split.no", 1), number("split.no", 2)),
        "found 2, wanted 1",
    ),
    "a part of another number of parts": (
        2,
        (number("split.count", 3), number("split.count", 2)),
        "found 2, wanted 3",
    ),
    "a part that says it is whole": (
        2,
        (number("split.count", 3), number("split.count", 1)),
        "found 1, wanted 3",
    ),
    "a wrong number of tensors in the first part": (
        0,
        (number("split.tensors.count", 3), number("split.tensors.count", 4)),
        "found 4, wanted 3",
    ),
    "a wrong number of tensors in a later part": (
        1,
        (number("split.tensors.count", 3), number("split.tensors.count", 2)),
        "found 2, wanted 3",
    ),
    "no number of tensors in the first part": (
        0,
        (number("split.tensors.count", 3), number("split.tensors.c_unt", 3)),
        "key 'split.tensors.count' is missing",
    ),
    "a negative number": (
        1,
        (number("split.no", 1), string("split.no") + u32(3) + struct.pack("<h", -1)),
        "key 'split.no' (header offset ",
    ),
    "a tensor that another part has": (
        1,
        (string("two"), string("one")),
        "tensor 'one' is in ",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_contradict_each_other_are_refused(tmp_path, name):
    part, (old, new), wanted = BAD_PARTS[name]
    paths = write_split(tmp_path / "split")
    edit(paths[part], old, new)
    opener = paths[0] if part else paths[1]
    with pytest.raises(GGUFError) as caught:
        read_gguf(opener)
    assert str(caught.value).startswith(f"{paths[part]}: ")
    assert wanted in str(caught.value)
