"""GGUF files written byte by byte, so that tests can make each byte wrong, and gguf-py's view."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qllama_jax.gguf_file import GGUFFile


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def typed_u32(value: int) -> bytes:
    """A uint32 value, after its type."""
    return u32(4) + u32(value)


def typed_string(text: str | bytes) -> bytes:
    """A string value, after its type."""
    return u32(8) + string(text)


def typed_array(item_type: int, count: int, items: bytes) -> bytes:
    """An array value, after its type."""
    return u32(9) + u32(item_type) + u64(count) + items


@dataclass
class Row:
    """A line of the tensor table."""

    name: bytes
    shape: tuple[int, ...]
    qtype: int
    start: int
    n_dims: int | None = None

    def encode(self) -> bytes:
        n_dims = len(self.shape) if self.n_dims is None else self.n_dims
        dims = b"".join(map(u64, self.shape))
        return string(self.name) + u32(n_dims) + dims + u32(self.qtype) + u64(self.start)


@dataclass
class TinyGGUF:
    """A small valid file: six keys, and three tensors of 16, 54 and 16 bytes padded to 32."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    keys: list[tuple[bytes, bytes]] = field(
        default_factory=lambda: [
            (b"general.architecture", typed_string("llama")),
            (b"general.alignment", typed_u32(32)),
            (b"x.flag", u32(7) + b"\1"),
            (b"x.words", typed_array(8, 3, string("a") + string("") + string("é"))),
            (b"x.flags", typed_array(7, 3, b"\0\1\1")),
            (b"x.sizes", typed_array(5, 2, struct.pack("<ii", -1, 7))),
        ]
    )
    rows: list[Row] = field(
        default_factory=lambda: [
            Row(b"one", (4,), 0, 0),
            Row(b"two", (32, 3), 2, 32),
            Row(b"three", (2, 2, 2), 1, 96),
        ]
    )
    data: bytes = bytes(range(16)) + bytes(16) + bytes(range(54)) + bytes(10) + bytes(range(16))
    end: bytes = bytes(16)
    alignment: int = 32

    def header(self) -> bytes:
        n_tensors = len(self.rows) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        keys = b"".join(string(key) + value for key, value in self.keys)
        rows = b"".join(row.encode() for row in self.rows)
        return self.magic + u32(self.version) + u64(n_tensors) + u64(n_keys) + keys + rows

    def encode(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data + self.end


def read_with_gguf_py(path: Path) -> GGUFReader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what newer numpys deprecate in it is not ours to mend
        return GGUFReader(path)


def assert_same_tensors(file: GGUFFile, readers: Iterable[GGUFReader]) -> None:
    """Names in order, types, shapes, sizes, places and bytes are those that gguf-py reads."""
    theirs = [tensor for reader in readers for tensor in reader.tensors]
    assert list(file.tensors) == [tensor.name for tensor in theirs]
    for tensor in theirs:
        ours = file.tensors[tensor.name]
        assert ours.name == tensor.name
        assert ours.qtype == tensor.tensor_type
        assert ours.shape == tuple(tensor.shape.tolist())
        assert ours.nbytes == tensor.n_bytes
        assert ours.offset == tensor.data_offset
        data = ours.data
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.tensor_type)]
        assert data.dtype == np.uint8
        assert data.shape == (*ours.shape[:0:-1], ours.shape[0] // block * block_bytes)
        assert data.tobytes() == tensor.data.tobytes()


def plain(value: Any) -> Any:
    """A metadata value as gguf-py gives it: arrays are lists."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_same_metadata(file: GGUFFile, reader: GGUFReader) -> None:
    """Keys in order and values are those that gguf-py reads."""
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(theirs)
    for key, value in theirs.items():
        contents = value.contents()
        ours = plain(file.metadata[key])
        assert repr(ours) == repr(contents), key  # repr: tells 1 from True, and NaN equals itself
