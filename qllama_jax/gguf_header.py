"""Header bytes -> metadata and tensor table: the GGUF v2 and v3 format, read strictly.

Layout: magic, version u32, n_tensors u64, n_kv u64, then n_kv times (key, type u32, value), then
n_tensors times (name, n_dims u32, dims u64[n_dims], type u32, offset u64), padding, data. Source:
the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; stricter where a
comment says so.
"""

from __future__ import annotations

import math
import struct
from io import BytesIO, FileIO
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from qllama_jax.errors import quoted
from qllama_jax.gguf_cursor import READ_STEP, U32, U64, Cursor
from qllama_jax.metadata import Metadata, describe

MAX_KEYS, MIN_KEY_BYTES = 65_536, 8 + 1 + 4 + 1
MAX_TENSORS, MIN_TENSOR_BYTES = 2**20, 8 + 1 + 4 + 8 + 4 + 8

_PREAMBLE = struct.Struct("<4sIQQ")
# Types that some files in circulation have and that ggml dropped, or that are newer than the table.
_OTHER_QTYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
_OTHER_QTYPES |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 42: "Q2_0"}
_FOREIGN = {
    b"version https://git-lfs": "a git-LFS pointer: the file itself was not downloaded",
    b"<?xml": "a page of XML: the download went wrong",
    b"lmgg": "a legacy GGML model",
    b"fmgg": "a legacy GGMF model",
    b"tjgg": "a legacy GGJT model",
    b"algg": "a legacy GGML adapter",
    b"nsgg": "a saved llama.cpp session",
    b"FUGG": "a big-endian file",
    b"PK\x03\x04": "a zip archive, such as a PyTorch checkpoint",
    b"\0\0\0\0": "zeros: an interrupted download",
}


class TensorInfo(NamedTuple):
    """One row of the tensor table. `start` is the offset from the data section, as declared."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    nbytes: int
    start: int
    header_offset: int


class Header(NamedTuple):
    """All that comes before the data. `end` is the byte after the tensor table, unpadded."""

    version: int
    metadata: Metadata
    tensors: list[TensorInfo]
    alignment: int
    end: int


def read_header(file: FileIO | BytesIO, path: str, size: int) -> Header:
    """Header of the `size`-byte GGUF `file`; reads at most 1 MiB past it.

    Raises `GGUFError` for anything that the format does not allow. That the tensors lie in the
    file as declared is for the caller to check.
    """
    cursor = Cursor(file, path, size)
    version, n_tensors, n_keys = _read_preamble(cursor)
    metadata, alignment = _read_metadata(cursor, n_keys)
    tensors: dict[str, TensorInfo] = {}
    for index in range(n_tensors):
        tensor = _read_tensor_info(cursor, index)
        if tensor.name in tensors:
            first = tensors[tensor.name].header_offset
            cursor.fail(f"it occurs twice, first at header offset {first}")
        tensors[tensor.name] = tensor
    return Header(version, metadata, list(tensors.values()), alignment, cursor.pos)


def _read_preamble(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors and number of keys of what is indeed a GGUF file."""
    if cursor.size == 0:
        cursor.fail("the file is empty (0 bytes)")
    cursor.fill(min(cursor.size, READ_STEP), "preamble")
    head = bytes(cursor.buffer[:64])
    if not b"GGUF".startswith(head[:4]):
        found = f"{quoted(head[:16])}{_foreign(head)}"
        cursor.fail(f"not a GGUF file: it starts with {found}, wanted b'GGUF'")
    at = cursor.advance(_PREAMBLE.size, "preamble")
    _, version, n_tensors, n_keys = _PREAMBLE.unpack_from(cursor.buffer, at)
    if version and version & 0xFFFF == 0:
        cursor.fail(f"version 0x{version:08x}: a big-endian file, wanted little-endian")
    if version not in (2, 3):
        cursor.fail(f"version {version} is not supported, wanted 2 or 3")
    if n_keys > MAX_KEYS:
        cursor.fail(f"{n_keys} keys, allowed 0..{MAX_KEYS}")
    if n_tensors > MAX_TENSORS:
        cursor.fail(f"{n_tensors} tensors, allowed 0..{MAX_TENSORS}")
    least = cursor.pos + MIN_KEY_BYTES * n_keys + MIN_TENSOR_BYTES * n_tensors
    if least > cursor.size:
        counts = f"{n_keys} keys and {n_tensors} tensors"
        cursor.fail(
            f"{counts} take at least {least} bytes but the file has {cursor.size} bytes;"
            " it is truncated or corrupt"
        )
    return version, n_tensors, n_keys


def _foreign(head: bytes) -> str:
    """What a file that is not GGUF seems to be, as a parenthesis for the error."""
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return " (an HTML page: the download went wrong)"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            return f" ({what})"
    return ""


def _read_metadata(cursor: Cursor, count: int) -> tuple[Metadata, int]:
    """`count` key-value pairs, and the alignment that they set."""
    values: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    alignment = 32
    for index in range(count):
        offset = cursor.pos
        cursor.where = f"key {index} (header offset {offset})"
        key = cursor.string("the key", 1, 65_535)
        if not (key.isascii() and key.isprintable()):
            cursor.fail(f"{quoted(key)} has characters other than printable ASCII")
        cursor.where = f"key {quoted(key)} (header offset {offset})"
        if key in values:
            cursor.fail(f"it occurs twice, first at header offset {offsets[key]}")
        kind = cursor.kind("value type")
        values[key], offsets[key] = cursor.value(kind), offset
        if key == "general.alignment":
            alignment = _check_alignment(cursor, kind, values[key])
    return Metadata(values, cursor.path, offsets), alignment


def _check_alignment(cursor: Cursor, kind: GGUFValueType, value: Any) -> int:
    # The specification has no upper bound. Ours keeps the padding, which may hold anything, small.
    good = kind is GGUFValueType.UINT32 and 8 <= value <= 2**20 and value & (value - 1) == 0
    if not good:
        found = f"{describe(value)} ({kind.name})"
        cursor.fail(f"found {found}, wanted a UINT32 that is a power of two in 8..{2**20}")
    return value


def _read_tensor_info(cursor: Cursor, index: int) -> TensorInfo:
    offset = cursor.pos
    cursor.where = f"tensor {index} (header offset {offset})"
    name = cursor.string("the name", 1, 63)  # ggml: 64 bytes with the final NUL
    if not name.isprintable() and any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        # C would stop at a NUL and see another name; terminals obey the others.
        cursor.fail(f"the name {quoted(name)} has control characters")
    cursor.where = f"tensor {quoted(name)} (header offset {offset})"
    n_dims = cursor.integer(U32, "number of dimensions")
    if not 1 <= n_dims <= 4:
        cursor.fail(f"it has {n_dims} dimensions, allowed 1..4")
    shape = tuple(cursor.integer(U64, "dimension") for _ in range(n_dims))
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        cursor.fail(f"shape {shape}, allowed dimensions from 1 with a product below 2**63")
    number = cursor.integer(U32, "tensor type")
    start = cursor.integer(U64, "tensor offset")
    if number not in GGML_QUANT_SIZES:
        known = f" ({_OTHER_QTYPES[number]})" if number in _OTHER_QTYPES else ""
        cursor.fail(f"unsupported tensor type {number}{known}")
    qtype = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    if shape[0] % block:
        cursor.fail(f"row of {shape[0]} values is not a multiple of {qtype.name}'s {block}")
    nbytes = math.prod(shape) // block * block_bytes
    return TensorInfo(name, shape, qtype, nbytes, start, offset)
