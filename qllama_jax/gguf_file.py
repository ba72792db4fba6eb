"""Path -> metadata and tensor bytes: opens GGUF files, split ones too, and refuses bad ones.

For any bytes at all, `read_gguf` either returns a file whose every tensor has the shape, type and
bytes that it declares, or raises `GGUFError`. It opens no path that is written inside a file: the
parts of a split file are the siblings of the given path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from qllama_jax.errors import GGUFError, quoted
from qllama_jax.gguf_header import Header, read_header
from qllama_jax.metadata import Metadata
from qllama_jax.tensor_file import GGUFFile, GGUFTensor, Source, open_regular

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


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
                first = tensors[name].source.path
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
    with open_regular(path) as (file, source):
        header = read_header(file, path, source.size)
        if (now := Source.of(path, os.fstat(file.fileno()))) != source:
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


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
