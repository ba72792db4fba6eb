"""What a reader of model files gives: an opened file, its metadata, and tensors read on demand.

Data is read into memory that we own, never mapped: a mapped file that is cut short kills the
process, one that is overwritten changes the weights under way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        block, block_bytes = BLOCK_SIZES[self.qtype]
        raw = aligned_bytes(self.nbytes)
        with self.source.open() as file:
            self.fill(memoryview(raw), file, self.offset)
        return raw.reshape(*self.shape[:0:-1], self.shape[0] // block * block_bytes)

    def fill(self, memory: memoryview, file: FileIO, offset: int) -> None:
        """Read bytes of the tensor, from `offset` of its opened file on, until `memory` is full."""
        end = offset + len(memory)
        file.seek(offset)
        while memory:
            count = file.readinto(memory)
            if not count:
                raise self.error(f"the file shrank: it ends {len(memory)} bytes before byte {end}")
            memory = memory[count:]


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
    room = np.empty(count + DATA_ALIGNMENT, np.uint8)
    skip = -room.ctypes.data % DATA_ALIGNMENT
    return room[skip : skip + count]


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
