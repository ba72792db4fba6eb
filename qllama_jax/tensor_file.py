"""What a reader of model files gives: an opened file, its metadata, and tensors read on demand.

Data is read into memory that we own, never mapped: a mapped file that is cut short kills the
process, one that is overwritten changes the weights under way.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from qllama_jax.errors import GGUFError, quoted
from qllama_jax.metadata import Metadata
from qllama_jax.tensor_types import BLOCK_SIZES, TensorType

Container = Literal["GGUF", "GGML", "GGMF", "GGJT"]
DATA_ALIGNMENT = 64  # a cache line, and what XLA on CPU needs to take an array without a copy
# From here on numpy asks Linux for pages of 2 MB, and to find and to clear them takes it long: 1.1B
# in Q4_0 is loaded in 1.5 to 1.75 s with them, in 0.9 without, and decodes as fast (an EPYC Genoa).
LARGE_BYTES = 2**22
_seeking = threading.Lock()
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Source:
    """A regular file as it was when its header was read."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @contextmanager
    def open(self) -> Iterator[FileIO]:
        """The same file for reading; raises where it is no longer the same, before or after."""
        with open_regular(self.path) as (file, now):
            if now != self:
                raise self.changed(now)
            yield file
            if (now := Source.of(self.path, os.fstat(file.fileno()))) != self:
                raise self.changed(now)

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> Source:
        """The file at `path` whose status is `status`."""
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def changed(self, now: Source) -> GGUFError:
        """The error to raise where the file is another one now."""
        names = ("size", "mtime_ns", "inode")
        pairs = [(name, getattr(self, name), getattr(now, name)) for name in names]
        what = ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
        return GGUFError(f"{self.path}: the file has changed since it was opened: {what}")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in a file. `shape` is in file order, innermost first: (576, 49152) is 49,152 rows.

    `nbytes` counts the packed bytes, `offset` is where they begin, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    qtype: TensorType
    nbytes: int
    offset: int
    source: Source = field(repr=False)

    def error(self, reason: str) -> GGUFError:
        """The error to raise for this tensor, in the one format that all of them have."""
        where = f"tensor {quoted(self.name)} (data at byte {self.offset})"
        return GGUFError(f"{self.source.path}: {where}: {reason}")

    @property
    def data(self) -> UInt8[np.ndarray, "*rows row_bytes"]:
        """The packed bytes, slowest dimension first, read from the file at every access.

        The array is new, writable, owned by the caller and aligned to 64 bytes. Raises
        `GGUFError` where the file is no longer the one that was opened, or is cut short.
        """
        with self.open() as rows:
            return rows[:].reshape(*self.shape[:0:-1], rows.shape[1])

    @contextmanager
    def open(self) -> Iterator[TensorRows]:
        """The packed bytes by rows, `[rows of all outer dimensions, row_bytes]`, read on demand.

        Raises `GGUFError` as `data` does.
        """
        block, block_bytes = BLOCK_SIZES[self.qtype]
        row_bytes = self.shape[0] // block * block_bytes
        with self.source.open() as file:
            yield TensorRows(self, file, range(self.nbytes // row_bytes), row_bytes)

    def fill(self, memory: memoryview, file: FileIO, offset: int) -> None:
        """Read bytes of the tensor, from `offset` of its opened file on, until `memory` is full.

        Several threads may read from one file at a time.
        """
        while memory:
            count = _read_at(file, memory, offset)
            if not count:
                end = self.offset + self.nbytes
                missing = end - os.fstat(file.fileno()).st_size
                raise self.error(f"the file shrank: it ends {missing} bytes before byte {end}")
            memory, offset = memory[count:], offset + count


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Rows of a tensor in an opened file; a slice of them, by one of several threads, reads it."""

    tensor: GGUFTensor
    file: FileIO = field(repr=False)
    rows: range  # those of the tensor
    row_bytes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and bytes of a row."""
        return len(self.rows), self.row_bytes

    def part(self, start: int, stop: int) -> TensorRows:
        """Rows start .. stop - 1; nothing is read."""
        return replace(self, rows=self.rows[start:stop])

    def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "rows row_bytes"]:
        """Read consecutive rows into new memory, aligned to 64 bytes."""
        wanted = self.rows[rows]
        raw = aligned_bytes(len(wanted) * self.row_bytes)
        begin = self.tensor.offset + wanted.start * self.row_bytes
        self.tensor.fill(memoryview(raw), self.file, begin)
        return raw.reshape(len(wanted), self.row_bytes)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An opened model file: header in memory, tensor bytes in the file until they are asked for.

    `tensors` is in file order, over all parts of a split file; `metadata` is the first part's.
    `container` is the kind of file. One from before GGUF looks like a GGUF file here: it has the
    keys and the tensor names that its conversion would have.
    """

    path: Path
    version: int  # 0 for GGML files, which have none
    metadata: Metadata
    tensors: dict[str, GGUFTensor]
    container: Container = "GGUF"

    @property
    def kind(self) -> str:
        """Container and version, such as "GGUF version 3"."""
        return f"{self.container} version {self.version}" if self.version else self.container

    def __repr__(self) -> str:
        """Path and counts: a vocabulary would fill the screen."""
        counts = f"{len(self.metadata)} keys, {len(self.tensors)} tensors"
        return f"GGUFFile({str(self.path)!r}, {self.kind}, {counts})"


def aligned_bytes(count: int) -> UInt8[np.ndarray, " count"]:
    """Return new memory, not set to anything, that begins at a multiple of DATA_ALIGNMENT."""
    size = count + DATA_ALIGNMENT
    if size >= LARGE_BYTES:  # Python's memory: the system gives zeros when it is first written to
        room = np.frombuffer(bytearray(size), np.uint8)
    else:
        room = np.empty(size, np.uint8)
    skip = -room.ctypes.data % DATA_ALIGNMENT
    return room[skip : skip + count]


def _read_at(file: FileIO, into: memoryview, offset: int) -> int:
    """Read up to len(into) bytes from byte `offset`; returns how many."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [into], offset)
    with _seeking:  # Windows knows no read at an offset
        file.seek(offset)
        return file.readinto(into)


@contextmanager
def open_regular(path: str) -> Iterator[tuple[FileIO, Source]]:
    """Regular file at `path` for reading, and what it is; all else is an error, and none blocks."""
    if "\0" in path:  # which os.stat refuses with another error
        raise GGUFError(f"{quoted(path)}: no such file")
    try:
        _check_regular(path, os.stat(path))  # before open, which has effects on some devices
        with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            _check_regular(path, status)
            yield file, Source.of(path, status)
    except FileNotFoundError:
        raise GGUFError(f"{path}: no such file") from None
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open_nonblocking(path: str, flags: int) -> int:
    # Should a FIFO have taken the file's place by now, opening it must not wait for a writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise GGUFError(f"{path}: is {kind}, wanted a regular file")
