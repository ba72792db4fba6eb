"""Rows of GGUF bytes -> CPUWeight: the file's 16-bit words, transposed so that rows are lanes.

Numpy does this at the speed of memory where the words are the file's own (Q4_0, Q5_0, ...). Where
fields of several groups share a word (the k-quants) its words are first laid out in planes, one
for each word of a block: a plane is a long run of memory, which numpy goes through with vectors.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import UInt8

from qllama_jax.matmul.cpu.layouts import GROUP, LAYOUTS, groups_of_a_sum
from qllama_jax.matmul.cpu.weight import TAKES_BFLOAT16, CPUWeight, lanes_of
from qllama_jax.tensor_file import aligned_bytes
from qllama_jax.tensor_types import BLOCK_SIZES

# Words of some rows: uint16[words of a block, nb, tiles, lanes].
Words = np.ndarray
# What a thread reads and reorders at a time. Numpy's operations on less are so short that two
# threads wait for Python's lock: half of it packs Q6_K at 0.6 instead of 0.9 GB/s.
_CHUNK_BYTES = 2**21


@runtime_checkable
class Rows(Protocol):
    """Rows of bytes that can be had some at a time: an array, or `TensorRows` of a file."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and bytes of a row."""
        ...

    def __getitem__(self, rows: slice, /) -> UInt8[np.ndarray, "rows bytes"]:
        """Return some rows; several threads may ask at once."""
        ...


class Arrays(NamedTuple):
    """The arrays of a CPUWeight; their first axes may be several that count the same."""

    words: np.ndarray
    scale: np.ndarray | None = None
    minimum: np.ndarray | None = None
    super_scale: np.ndarray | None = None
    super_minimum: np.ndarray | None = None


def can_pack(format: str, width: int) -> bool:
    """Whether rows of `width` weights of a format have a packing."""
    return format in LAYOUTS and width % GROUP == 0


def room_for(format: str, out: int, row_bytes: int, *stack: int) -> CPUWeight:
    """Return memory, not written to yet, for `out` rows that `can_pack`, or a stack of so many."""
    one = _reorder(format, np.zeros((lanes_of(format), row_bytes), np.uint8))
    tiles = -(-out // lanes_of(format))
    whole = (
        None if array is None else _room(array, 2 if name.startswith("super") else 3, tiles, stack)
        for name, array in one._asdict().items()
    )
    return CPUWeight(*whole, format=format, out=out)


def pack(format: str, rows: Rows, room: CPUWeight | None = None) -> CPUWeight:
    """Reorder rows that `can_pack` into `room_for` them, reading some at a time."""
    out, row_bytes = rows.shape
    lanes = lanes_of(format)
    tiles = -(-out // lanes)
    packed = room_for(format, out, row_bytes) if room is None else room
    whole = [getattr(packed, name) for name in Arrays._fields]

    def fill(first: int) -> None:
        part = slice(first, min(first + step, tiles))
        raw = rows[part.start * lanes : min(part.stop * lanes, out)]
        if missing := -len(raw) % lanes:
            raw = np.concatenate([raw, np.zeros((missing, row_bytes), np.uint8)])
        for target, source in zip(whole, _reorder(format, raw), strict=True):
            if target is not None and source is not None:
                _copy(target, source, part)

    threads = os.cpu_count() or 1
    step = max(1, min(_CHUNK_BYTES // (lanes * row_bytes), -(-tiles // threads)))
    filling = [_pool(threads).submit(fill, first) for first in range(0, tiles, step)]
    try:
        for part in filling:
            part.result()
    finally:  # after an error, or Ctrl-C, nothing reads on in a file that will be closed
        for part in filling:
            part.cancel()
        wait(filling)
    return packed


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pack")


def _room(like: np.ndarray, axes: int, tiles: int, stack: tuple[int, ...]) -> np.ndarray:
    """Memory for an array of which `like` has one tile, and `axes` axes from the tiles on."""
    shape = (*stack, math.prod(like.shape[:-axes]), tiles, *like.shape[-axes + 1 :])
    return aligned_bytes(math.prod(shape) * like.itemsize).view(like.dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray, part: slice) -> None:
    """Write tiles `part` of an array [n, tiles, *rest, lanes]; source's first axes count n."""
    _, tiles, *rest = target.shape
    groups = source.shape[: -1 - len(rest)]
    target = target.reshape(*groups, tiles, *rest)[..., part, *(slice(None) for _ in rest)]
    if source.strides[-1] == source.itemsize:
        # Lanes that lie side by side are copied 1.5 times as fast as one item.
        lanes = np.dtype((np.void, source.shape[-1] * source.itemsize))
        target, source = target.view(lanes), source.view(lanes)
    target[...] = source


def _reorder(format: str, raw: UInt8[np.ndarray, "rows bytes"]) -> Arrays:
    # A block of floats is one number: 32 of them make a group.
    block, block_bytes = BLOCK_SIZES[GGMLQuantizationType[format]]
    struct_bytes = block_bytes * max(1, GROUP // block)
    unit = np.uint8 if format == "Q8_0" else np.uint16
    units = struct_bytes // unit().itemsize
    words = raw.view(unit).reshape(-1, lanes_of(format), raw.shape[1] // struct_bytes, units)
    words = words.transpose(3, 2, 0, 1)
    if format.endswith("_K"):
        words = np.ascontiguousarray(words)
    arrays = _REORDER[format](words)
    return arrays._replace(
        scale=_side_by_side(arrays.scale, format),
        minimum=_side_by_side(arrays.minimum, format),
    )


def _side_by_side(scale: np.ndarray | None, format: str) -> np.ndarray | None:
    """[nb, n, tiles, lanes] or [G, tiles, lanes] -> [nb, n / c, tiles, c, lanes] or without nb."""
    if scale is None:
        return None
    *blocks, groups, tiles, lanes = scale.shape
    count = groups_of_a_sum(groups, even=not blocks) if LAYOUTS[format].words else 1
    return scale.reshape(*blocks, groups // count, count, tiles, lanes).swapaxes(-3, -2)


def _half(words: Words) -> np.ndarray:
    return words.view(np.float16)


def _in_groups(words: Words) -> np.ndarray:
    """[n, G, tiles, lanes] -> [G, tiles, n, lanes]."""
    return words.transpose(1, 2, 0, 3)


def _q4_0(v: Words) -> Arrays:
    return Arrays(_in_groups(v[1:]), _half(v[0]))


def _q4_1(v: Words) -> Arrays:
    return Arrays(_in_groups(v[2:]), _half(v[0]), _half(v[1]))


def _q8_0(v: Words) -> Arrays:
    scale = np.ascontiguousarray(np.moveaxis(v[:2], 0, -1)).view(np.float16)[..., 0]
    return Arrays(_in_groups(v[2:]).view(np.int8), scale)


def _f16(v: Words) -> Arrays:
    return Arrays(_half(_in_groups(v)))


def _bf16(v: Words) -> Arrays:
    words = _in_groups(v)
    return Arrays(words.view(ml_dtypes.bfloat16) if TAKES_BFLOAT16 else words)


def _field(words: Words, at: int, mask: int, to: int) -> Words:
    """Bits `mask` above bit `at` of both bytes of each word, moved to bit `to` of its byte."""
    shift = to - at
    moved = words << np.uint16(shift) if shift > 0 else words >> np.uint16(-shift)
    moved &= np.uint16((mask << to) * 0x0101)
    return moved


def _bytes(words: Words) -> np.ndarray:
    """Words [n, *rest] -> bytes [2 n, *rest]."""
    n, *rest = words.shape
    both = np.empty((n, 2, *rest), np.uint8)
    both[:, 0] = words.astype(np.uint8)
    both[:, 1] = (words >> np.uint16(8)).astype(np.uint8)
    return both.reshape(2 * n, *rest)


def _of_blocks(planes: np.ndarray) -> np.ndarray:
    """[n, nb, tiles, lanes] -> [nb, n, tiles, lanes]."""
    return planes.swapaxes(0, 1)


def _six_bit_scales(words: Words) -> tuple[np.ndarray, np.ndarray]:
    low_sc, low_m, high = np.split(_bytes(words), 3)
    sc = np.concatenate([low_sc & 63, (high & 15) | ((low_sc >> 2) & 48)])
    m = np.concatenate([low_m & 63, (high >> 4) | ((low_m >> 2) & 48)])
    return _of_blocks(sc), _of_blocks(m)


def _write_nibbles(qs: Words, words: Words) -> None:
    """128 bytes whose low nibbles are a sub-block and whose high ones the next, as _NIBBLES."""
    rest = qs.shape[1:]
    qs, words = qs.reshape(4, 2, 8, *rest), words.reshape(4, 2, 8, *rest)
    first, second = qs[:, 0], qs[:, 1]
    np.bitwise_or(_field(first, 0, 15, 0), _field(second, 0, 15, 4), out=words[:, 0])
    np.bitwise_or(_field(first, 4, 15, 0), _field(second, 4, 15, 4), out=words[:, 1])


def _q4_k(v: Words) -> Arrays:
    sc, m = _six_bit_scales(v[2:8])
    words = np.empty((8, 8, *v.shape[1:]), np.uint16)
    _write_nibbles(v[8:], words)
    return Arrays(words.transpose(2, 0, 3, 1, 4), sc, m, _half(v[0]), _half(v[1]))


def _q5_k(v: Words) -> Arrays:
    sc, m = _six_bit_scales(v[2:8])
    words = np.empty((8, 10, *v.shape[1:]), np.uint16)
    _write_nibbles(v[24:], words[:, 2:])
    bits = v[8:24].reshape(2, 8, *v.shape[1:])
    for sub in range(8):
        words[sub, :2] = _field(bits[:, 0], sub, 1, 0)
        for j in range(1, 8):
            words[sub, :2] |= _field(bits[:, j], sub, 1, j)
    return Arrays(words.transpose(2, 0, 3, 1, 4), sc, m, _half(v[0]), _half(v[1]))


def _q2_k(v: Words) -> Arrays:
    scales = _bytes(v[:8])
    qs = v[8:40].reshape(2, 2, 2, 4, *v.shape[1:])  # half, sixteen, word, pair
    words = np.empty((2, 4, 2, 2, *v.shape[1:]), np.uint16)
    for plane in range(4):
        words[:, plane] = _field(qs[:, :, :, 0], 2 * plane, 3, 0)
        for j in range(1, 4):
            words[:, plane] |= _field(qs[:, :, :, j], 2 * plane, 3, 2 * j)
    return Arrays(
        words.transpose(4, 0, 1, 2, 5, 3, 6),
        _of_blocks(scales & 15),
        _of_blocks(scales >> 4),
        _half(v[40]),
        _half(v[41]),
    )


def _q3_k(v: Words) -> Arrays:
    mask = v[:16].reshape(2, 8, *v.shape[1:])  # sixteen, pair
    qs = v[16:48].reshape(2, 2, 8, *v.shape[1:])  # half, sixteen, pair
    words = np.empty((2, 4, 2, 3, *v.shape[1:]), np.uint16)
    for half in range(2):
        for plane in range(4):
            pairs = _field(qs[half], 2 * plane, 3, 0) | _field(mask, 4 * half + plane, 1, 2)
            six = (pairs & np.uint16(7)) | ((pairs >> np.uint16(5)) & np.uint16(0x38))
            twelve = six[:, 0::2] | (six[:, 1::2] << np.uint16(6))
            last = twelve[:, 3]
            for j in range(3):
                extra = (last >> np.uint16(4 * j)) << np.uint16(12)
                np.bitwise_or(twelve[:, j], extra, out=words[half, plane, :, j])
    low, high = np.split(_bytes(v[48:54]), [8])
    low = np.concatenate([low & 15, low >> 4])
    high = np.concatenate([(high >> s) & 3 for s in (0, 2, 4, 6)])
    sc = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return Arrays(words.transpose(4, 0, 1, 2, 5, 3, 6), _of_blocks(sc), None, _half(v[54]))


def _q6_k(v: Words) -> Arrays:
    ql = v[:64].reshape(2, 2, 2, 8, *v.shape[1:])  # half, 32 bytes, sixteen, pair
    qh = v[64:96].reshape(2, 2, 8, *v.shape[1:])  # half, sixteen, pair
    words = np.empty((4, 6, 2, 2, *v.shape[1:]), np.uint16)  # plane, word, half, sixteen
    for plane in range(4):
        pairs = _field(ql[:, plane % 2], 4 * (plane // 2), 15, 0) | _field(qh, 2 * plane, 3, 4)
        twelve = (pairs & np.uint16(63)) | ((pairs >> np.uint16(2)) & np.uint16(0xFC0))
        twelve = np.ascontiguousarray(twelve.transpose(2, 0, 1, 3, 4, 5))
        for j in range(6):
            extra = (twelve[6 + j // 3] >> np.uint16(4 * (j % 3))) << np.uint16(12)
            np.bitwise_or(twelve[j], extra, out=words[plane, j])
    sc = _of_blocks(_bytes(v[96:104]).view(np.int8))
    return Arrays(words.transpose(4, 2, 0, 3, 5, 1, 6), sc, None, _half(v[104]))


_REORDER: dict[str, Callable[[Words], Arrays]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q4_0,
    "Q5_1": _q4_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "F16": _f16,
    "BF16": _bf16,
}
assert _REORDER.keys() == LAYOUTS.keys()
