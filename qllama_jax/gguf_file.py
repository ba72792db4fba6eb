"""Path -> metadata and tensor bytes: opens GGUF files, split ones too, and refuses bad ones.

For any bytes at all, `read_gguf` either returns a file whose every tensor has the shape, type and
bytes that it declares, or raises `GGUFError`. It opens no path that is written inside a file: the
parts of a split file are the siblings of the given path. Data is read into memory that we own,
never mapped: a mapped file that is cut short kills the process, one that is overwritten changes
the weights under way.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

from qllama_jax.errors import GGUFError, quoted
from qllama_jax.gguf_header import Header, read_header
from qllama_jax.metadata import Metadata

DATA_ALIGNMENT = 64  # a cache line, and what XLA on CPU needs to take an array without a copy
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class _Source:
    """A regular file as it was when its header was read."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @contextmanager
    def open(self) -> Iterator[FileIO]:
        """The same file for reading; raises where it is no longer the same, before or after."""
        with _open_regular(self.path) as (file, now):
            if now != self:
                raise self.changed(now)
            yield file
            if (now := _Source.of(self.path, os.fstat(file.fileno()))) != self:
                raise self.changed(now)

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> _Source:
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def changed(self, now: _Source) -> GGUFError:
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
    qtype: GGMLQuantizationType
    nbytes: int
    offset: int
    _source: _Source = field(repr=False)

    @property
    def data(self) -> UInt8[np.ndarray, "*rows row_bytes"]:
        """The packed bytes, slowest dimension first, read from the file at every access.

        The array is new, writable, owned by the caller and aligned to 64 bytes. Raises
        `GGUFError` where the file is no longer the one that was opened, or is cut short.
        """
        block, block_bytes = GGML_QUANT_SIZES[self.qtype]
        room = np.empty(self.nbytes + DATA_ALIGNMENT, np.uint8)
        skip = -room.ctypes.data % DATA_ALIGNMENT
        raw = room[skip : skip + self.nbytes]
        with self._source.open() as file:
            file.seek(self.offset)
            rest = memoryview(raw)
            while rest:
                count = file.readinto(rest)
                if not count:
                    end = self.offset + self.nbytes
                    raise GGUFError(
                        f"{self._source.path}: tensor {quoted(self.name)}: the file shrank: it ends"
                        f" {len(rest)} bytes before byte {end}"
                    )
                rest = rest[count:]
        return raw.reshape(*self.shape[:0:-1], self.shape[0] // block * block_bytes)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An opened GGUF file: header in memory, tensor bytes in the file until they are asked for.

    `tensors` is in file order, over all parts of a split file; `metadata` is the first part's.
    """

    path: Path
    version: int
    metadata: Metadata
    tensors: dict[str, GGUFTensor]

    def __repr__(self) -> str:
        """Path and counts: a vocabulary would fill the screen."""
        counts = f"{len(self.metadata)} keys, {len(self.tensors)} tensors"
        return f"GGUFFile({str(self.path)!r}, version {self.version}, {counts})"


class _Part(NamedTuple):
    """One file of a split file, or all of a whole one."""

    header: Header
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | os.PathLike[str], *, allow_trailing: bool = False) -> GGUFFile:
    """Open a GGUF file, version 2 or 3; any part of a split one (`-00001-of-00003.gguf`) opens all.

    Reads headers alone. Bytes after the last tensor are refused, because a table that lost its
    last tensor looks just so, unless `allow_trailing`. Raises `GGUFError`, which names the file,
    the tensor or key, the byte offset, what was found and what is allowed.
    """
    name = os.path.abspath(os.fsdecode(path))
    part = _read_part(name, allow_trailing)
    count = part.header.metadata.get_uint("split.count", 1, hi=99_999)
    if count > 1:  # a merged file says 0
        part = _read_siblings(name, part, count, allow_trailing)
    return GGUFFile(Path(name), part.header.version, part.header.metadata, part.tensors)


def _read_siblings(path: str, opened: _Part, count: int, allow_trailing: bool) -> _Part:
    """First part's header and all parts' tensors, of the split file that `path` is a part of."""
    names = _part_names(path, count)
    missing = [os.path.basename(name) for name in names if not os.path.exists(name)]
    if missing:
        listed = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise GGUFError(f"{path}: {len(missing)} of {count} parts are missing: {listed}")
    parts = [opened if name == path else _read_part(name, allow_trailing) for name in names]
    tensors: dict[str, GGUFTensor] = {}
    for index, part in enumerate(parts):
        _expect(part.header.metadata, "split.no", index)
        _expect(part.header.metadata, "split.count", count)
        for name, tensor in part.tensors.items():
            if name in tensors:
                first = tensors[name]._source.path
                raise GGUFError(f"{names[index]}: tensor {quoted(name)} is in {first} too")
            tensors[name] = tensor
    for part in parts:
        if part is parts[0] or "split.tensors.count" in part.header.metadata:
            _expect(part.header.metadata, "split.tensors.count", len(tensors))
    return _Part(parts[0].header, tensors)


def _part_names(path: str, count: int) -> list[str]:
    match = _PART_NAME.fullmatch(path)
    if match is None or int(match["count"]) != count or not 1 <= int(match["number"]) <= count:
        wanted = f"-00001-of-{count:05d}.gguf"
        raise GGUFError(f"{path}: one of {count} parts, so its name must end like {wanted}")
    return [f"{match['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]


def _expect(metadata: Metadata, key: str, wanted: int) -> None:
    if (found := metadata.get_uint(key)) != wanted:
        raise metadata.error(key, str(found), str(wanted))


def _read_part(path: str, allow_trailing: bool) -> _Part:
    """One file, whose tensors lie end to end and fill it."""
    with _open_regular(path) as (file, source):
        header = read_header(file, path, source.size)
        if (now := _Source.of(path, os.fstat(file.fileno()))) != source:
            raise source.changed(now)
    data_start = _padded(header.end, header.alignment)
    end = data_start + sum(_padded(info.nbytes, header.alignment) for info in header.tensors)
    tensors: dict[str, GGUFTensor] = {}
    start = 0  # of the next tensor: the padded sum of those before, hence no overlap and no hole
    for info in header.tensors:
        where = f"{path}: tensor {quoted(info.name)} (header offset {info.header_offset})"
        if info.start != start:
            raise GGUFError(f"{where}: data offset {info.start}, wanted {start}, the next free one")
        offset = data_start + start
        if offset + info.nbytes > source.size:
            raise GGUFError(
                f"{where}: data ends at byte {offset + info.nbytes} but the file has {source.size}"
                f" bytes; the download is incomplete ({100 * source.size // end}%) or it is corrupt"
            )
        name, shape, qtype, nbytes, _, _ = info
        tensors[name] = GGUFTensor(name, shape, qtype, nbytes, offset, source)
        start += _padded(nbytes, header.alignment)
    if source.size > end and not allow_trailing:
        raise GGUFError(
            f"{path}: {source.size - end} bytes follow the last tensor, from byte {end} on:"
            " the table of tensors is incomplete, or something was appended"
        )
    return _Part(header, tensors)


@contextmanager
def _open_regular(path: str) -> Iterator[tuple[FileIO, _Source]]:
    """Regular file at `path` for reading, and what it is; all else is an error, and none blocks."""
    if "\0" in path:  # which os.stat refuses with another error
        raise GGUFError(f"{quoted(path)}: no such file")
    try:
        _check_regular(path, os.stat(path))  # before open, which has effects on some devices
        with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            _check_regular(path, status)
            yield file, _Source.of(path, status)
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


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
