"""Sizes and numbers that a file may give have limits."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from gguf_bytes import TinyGGUF, typed_array, u32, u64
from qllama_jax import gguf_cursor, gguf_header
from qllama_jax.gguf_file import read_gguf
from refusals import message_of

BASE = TinyGGUF().encode()
refused = functools.partial(message_of, read_gguf)


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
