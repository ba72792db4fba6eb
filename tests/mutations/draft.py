"""A GGUF file taken apart: keys and tensors as lists that a mutation may change before writing."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gguf_bytes import Row, read_with_gguf_py, string, typed_array, u32, u64

#: Name of a type -> its number in files, and its form.
FORMS = {
    **{"u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I")},
    **{"i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<B"), "u64": (10, "<Q")},
    **{"i64": (11, "<q"), "f64": (12, "<d")},
}
STRING, ARRAY = 8, 9


def typed(kind: str, value: float) -> bytes:
    """A number or bool, after its type."""
    number, form = FORMS[kind]
    return u32(number) + struct.pack(form, value)


def typed_items(kind: str, values: Sequence[float]) -> bytes:
    """An array of numbers or bools, after its type."""
    number, form = FORMS[kind]
    return typed_array(number, len(values), b"".join(struct.pack(form, x) for x in values))


def typed_texts(texts: list[bytes]) -> bytes:
    """An array of strings, after its type."""
    return typed_array(STRING, len(texts), b"".join(map(string, texts)))


@dataclass
class Tensor:
    """A row of the table and its bytes. `start` is what the table says, None for the truth.

    `zeros` counts bytes that are zero and not in `data`, which is empty then: all tensors of a
    draft have them, or none.
    """

    name: bytes
    shape: tuple[int, ...]
    qtype: int
    data: bytes
    zeros: int = 0
    start: int | None = None
    n_dims: int | None = None

    @property
    def nbytes(self) -> int:
        return len(self.data) + self.zeros


@dataclass
class Draft:
    """What a file is written from. Counts that are None are the true ones."""

    keys: list[tuple[bytes, bytes]]
    tensors: list[Tensor]
    version: int = 3
    alignment: int = 32
    n_keys: int | None = None
    n_tensors: int | None = None
    fill: bytes = b"\0"
    cut: int = 0  # bytes missing at the end
    order: list[int] = field(default_factory=list)  # in which data is written, if not as listed

    def copy(self) -> Draft:
        """A draft that may be changed while this one stays."""
        return replace(self, keys=list(self.keys), tensors=[replace(t) for t in self.tensors])

    # Keys

    def value(self, key: str) -> bytes | None:
        """Type and value of a key as in the file."""
        return dict(self.keys).get(key.encode())

    def set(self, key: str, value: bytes) -> None:
        """Replace a key's type and value; at the end where there is none."""
        for i, (name, _) in enumerate(self.keys):
            if name == key.encode():
                self.keys[i] = name, value
                return
        self.keys.append((key.encode(), value))

    def drop(self, key: str) -> None:
        """Leave a key out."""
        self.keys = [pair for pair in self.keys if pair[0] != key.encode()]

    def uint(self, key: str) -> int:
        """An integer that the file is known to have as uint32."""
        value = self.value(key)
        assert value is not None, key
        return int.from_bytes(value[4:8], "little")

    def numbers(self, key: str) -> tuple[str, list[float]]:
        """Type and items of an array of numbers."""
        value = self.value(key)
        assert value is not None, key
        kind = next(k for k, (number, _) in FORMS.items() if number == value[4])
        return kind, np.frombuffer(value[16:], FORMS[kind][1]).tolist()

    def texts(self, key: str) -> list[bytes]:
        """Items of an array of strings."""
        value = self.value(key)
        assert value is not None, key
        texts, pos = [], 16
        while pos < len(value):
            size = int.from_bytes(value[pos : pos + 8], "little")
            texts.append(value[pos + 8 : pos + 8 + size])
            pos += 8 + size
        return texts

    # Tensors

    def tensor(self, name: str) -> Tensor:
        """The tensor of a name."""
        return next(t for t in self.tensors if t.name == name.encode())

    def starts(self) -> list[int]:
        """Where each tensor's data lie in the data section."""
        starts, at = [0] * len(self.tensors), 0
        for i in self.order or range(len(self.tensors)):
            starts[i] = at
            at += padded(self.tensors[i].nbytes, self.alignment)
        return starts

    def add(self, name: str, shape: tuple[int, ...], values: np.ndarray) -> None:
        """Add a tensor of float32 at the end; where the others are zeros, this is too."""
        data, zeros = values.astype("<f4").tobytes(), 0
        if any(t.zeros for t in self.tensors):
            data, zeros = b"", len(data)
        self.tensors.append(Tensor(name.encode(), shape, 0, data, zeros))

    # Bytes

    def header(self) -> bytes:
        """All before the padding and the data."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        rows = [
            Row(t.name, t.shape, t.qtype, at if t.start is None else t.start, t.n_dims).encode()
            for t, at in zip(self.tensors, self.starts(), strict=True)
        ]
        keys = [string(key) + value for key, value in self.keys]
        head = b"GGUF" + u32(self.version) + u64(n_tensors) + u64(n_keys)
        return head + b"".join(keys) + b"".join(rows)

    def encode(self) -> bytes:
        """All of the file, but for the zeros that are not in `data`."""
        listed = [self.tensors[i].data for i in self.order or range(len(self.tensors))]
        return b"".join(map(self._filled, [self.header(), *listed]))[: -self.cut or None]

    def write(self, path: Path) -> None:
        """Write the file; zeros that are not in `data` become a hole at its end."""
        raw = self.encode()
        path.write_bytes(raw)
        zeros = sum(padded(t.zeros, self.alignment) for t in self.tensors)
        os.truncate(path, len(raw) + zeros)

    def _filled(self, data: bytes) -> bytes:
        return data + self.fill * (-len(data) % self.alignment)


def padded(size: int, alignment: int) -> int:
    """Size with the padding behind it."""
    return -(-size // alignment) * alignment


def take_apart(path: Path, *, keep_data: bool = True) -> Draft:
    """Draft that is written as the file at `path` is; without its data all of them are zeros."""
    raw = np.memmap(path, np.uint8, "r")
    reader = read_with_gguf_py(path)
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    ends = [f.offset for f in fields[1:]] + [reader.tensors[0].field.offset]
    keys = []
    for part, end in zip(fields, ends, strict=True):
        name = part.name.encode()
        keys.append((name, raw[part.offset + 8 + len(name) : end].tobytes()))
    tensors = [
        Tensor(
            name=t.name.encode(),
            shape=tuple(t.shape.tolist()),
            qtype=int(t.tensor_type),
            data=t.data.tobytes() if keep_data else b"",
            zeros=0 if keep_data else int(t.n_bytes),
        )
        for t in reader.tensors
    ]
    return Draft(keys, tensors)
