"""Rows of GGUF bytes -> CPUWeight: the file's 16-bit words, transposed so that rows are lanes.

Numpy does this at the speed of memory where the words are those of the file (Q4_0, Q5_0, ...), and
with a few operations a word where fields of several groups share one (the k-quants).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import UInt8

from qllama_jax.matmul.cpu.layouts import GROUP, LAYOUTS
from qllama_jax.matmul.cpu.weight import LANES, TAKES_BFLOAT16, CPUWeight
from qllama_jax.tensor_file import aligned_bytes
from qllama_jax.tensor_types import BLOCK_SIZES

# Words of some rows: uint16[nb, tiles, words of a block, LANES], a view of the file's bytes.
Words = np.ndarray
_CHUNK_BYTES = 2**18  # what a thread reorders at a time, with its copies within a core's L2 cache


class Arrays(NamedTuple):
    """The arrays of a CPUWeight, all with tiles as their second axis."""

    words: np.ndarray
    scale: np.ndarray | None = None
    minimum: np.ndarray | None = None
    super_scale: np.ndarray | None = None
    super_minimum: np.ndarray | None = None


def can_pack(format: str, width: int) -> bool:
    """Whether rows of `width` weights of a format have a packing."""
    return format in LAYOUTS and width % GROUP == 0


def pack(format: str, raw: UInt8[np.ndarray, "out bytes"]) -> CPUWeight:
    """Reorder rows that `can_pack` into arrays of their own."""
    out, _ = raw.shape
    tiles = -(-out // LANES)
    if out % LANES:
        raw = np.concatenate([raw, np.zeros((tiles * LANES - out, raw.shape[1]), np.uint8)])
    reorder = _REORDER[format]
    # A block of floats is one number: 32 of them make a group.
    block, block_bytes = BLOCK_SIZES[GGMLQuantizationType[format]]
    struct_bytes = block_bytes * max(1, GROUP // block)
    unit = np.uint8 if format == "Q8_0" else np.uint16
    view = (
        raw.view(unit)
        .reshape(tiles, LANES, -1, struct_bytes // unit().itemsize)
        .transpose(2, 0, 3, 1)
    )
    whole = [None if a is None else _room(a, tiles) for a in reorder(view[:, :1])]

    def fill(first: int) -> None:
        part = slice(first, first + step)
        for target, source in zip(whole, reorder(view[:, part]), strict=True):
            if target is not None:
                target[:, part] = source

    step = max(1, _CHUNK_BYTES // (raw.nbytes // tiles))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(0, tiles, step)))
    return CPUWeight(*whole, format=format, out=out)


def _room(like: np.ndarray, tiles: int) -> np.ndarray:
    groups, _, *rest = like.shape
    shape = (groups, tiles, *rest)
    return aligned_bytes(int(np.prod(shape)) * like.itemsize).view(like.dtype).reshape(shape)


def _half(words: Words) -> np.ndarray:
    return words.view(np.float16)


def _q4_0(v: Words) -> Arrays:
    return Arrays(v[:, :, 1:], _half(v[:, :, 0]))


def _q4_1(v: Words) -> Arrays:
    return Arrays(v[:, :, 2:], _half(v[:, :, 0]), _half(v[:, :, 1]))


def _q8_0(v: Words) -> Arrays:
    return Arrays(
        v[:, :, 2:].view(np.int8),
        np.ascontiguousarray(v[:, :, :2].swapaxes(2, 3)).view(np.float16)[..., 0],
    )


def _f16(v: Words) -> Arrays:
    return Arrays(_half(v))


def _bf16(v: Words) -> Arrays:
    return Arrays(v.view(ml_dtypes.bfloat16) if TAKES_BFLOAT16 else v)


def _pairs(words: Words, shift: int, mask: int) -> Words:
    """Field at `shift` of both bytes of each word."""
    return (words >> np.uint16(shift)) & np.uint16(mask * 0x0101)


def _nibble_words(qs: Words) -> Words:
    """128 bytes whose low nibbles are a sub-block and whose high ones the next, as _NIBBLES."""
    nb, tiles, _, lanes = qs.shape
    first, second = qs.reshape(nb, tiles, 4, 2, 8, lanes).transpose(3, 0, 2, 1, 4, 5)
    words = np.empty((nb, 4, 2, tiles, 8, lanes), np.uint16)
    words[:, :, 0] = _pairs(first, 0, 15) | (_pairs(second, 0, 15) << np.uint16(4))
    words[:, :, 1] = _pairs(first, 4, 15) | (second & np.uint16(0xF0F0))
    return words.reshape(nb * 8, tiles, 8, lanes)


def _bytes(words: Words) -> np.ndarray:
    """Words [nb, tiles, n, lanes] -> bytes [nb, 2 n, tiles, lanes]."""
    nb, tiles, n, lanes = words.shape
    both = np.stack([words.astype(np.uint8), (words >> np.uint16(8)).astype(np.uint8)], axis=3)
    return both.reshape(nb, tiles, 2 * n, lanes).swapaxes(1, 2)


def _six_bit_scales(words: Words) -> tuple[np.ndarray, np.ndarray]:
    low_sc, low_m, high = np.split(_bytes(words), 3, axis=1)
    sc = [low_sc & 63, (high & 15) | ((low_sc >> 2) & 48)]
    m = [low_m & 63, (high >> 4) | ((low_m >> 2) & 48)]
    return _joined(np.concatenate(sc, axis=1)), _joined(np.concatenate(m, axis=1))


def _joined(planes: np.ndarray) -> np.ndarray:
    """[nb, sub, *rest] -> [nb * sub, *rest]."""
    return planes.reshape(-1, *planes.shape[2:])


def _q4_k(v: Words) -> Arrays:
    v = np.ascontiguousarray(v)
    sc, m = _six_bit_scales(v[:, :, 2:8])
    return Arrays(_nibble_words(v[:, :, 8:]), sc, m, _half(v[:, :, 0]), _half(v[:, :, 1]))


def _q5_k(v: Words) -> Arrays:
    v = np.ascontiguousarray(v)
    nb, tiles, _, lanes = v.shape
    sc, m = _six_bit_scales(v[:, :, 2:8])
    bits = v[:, :, 8:24].reshape(nb, tiles, 2, 8, lanes)
    words = np.empty((nb, 8, tiles, 10, lanes), np.uint16)
    words[:, :, :, 2:] = _nibble_words(v[:, :, 24:]).reshape(nb, 8, tiles, 8, lanes)
    for sub in range(8):
        of_sub = _pairs(bits, sub, 1)
        word = of_sub[:, :, :, 0]
        for j in range(1, 8):
            word = word | (of_sub[:, :, :, j] << np.uint16(j))
        words[:, sub, :, :2] = word
    return Arrays(_joined(words), sc, m, _half(v[:, :, 0]), _half(v[:, :, 1]))


def _q2_k(v: Words) -> Arrays:
    v = np.ascontiguousarray(v)
    nb, tiles, _, lanes = v.shape
    scales = _bytes(v[:, :, :8])
    qs = v[:, :, 8:40].reshape(nb, tiles, 2, 2, 2, 4, lanes)  # half, sixteen, word, pair
    words = np.empty((nb, 2, 4, 2, tiles, 2, lanes), np.uint16)
    for plane in range(4):
        pairs = _pairs(qs, 2 * plane, 3)
        word = pairs[..., 0, :]
        for j in range(1, 4):
            word = word | (pairs[..., j, :] << np.uint16(2 * j))
        words[:, :, plane] = word.transpose(0, 2, 3, 1, 4, 5)
    halves = _half(v[:, :, 40]), _half(v[:, :, 41])
    return Arrays(
        words.reshape(nb * 16, tiles, 2, lanes), _joined(scales & 15), _joined(scales >> 4), *halves
    )


def _q3_k(v: Words) -> Arrays:
    v = np.ascontiguousarray(v)
    nb, tiles, _, lanes = v.shape
    mask = v[:, :, :16].reshape(nb, tiles, 2, 8, lanes)
    qs = v[:, :, 16:48].reshape(nb, tiles, 2, 2, 8, lanes)  # half, sixteen, pair
    words = np.empty((nb, 2, 4, 2, tiles, 3, lanes), np.uint16)
    for half in range(2):
        for plane in range(4):
            pairs = _pairs(qs[:, :, half], 2 * plane, 3) | (
                _pairs(mask, 4 * half + plane, 1) << np.uint16(2)
            )
            six = (pairs & np.uint16(7)) | ((pairs >> np.uint16(5)) & np.uint16(0x38))
            twelve = six[:, :, :, 0::2] | (six[:, :, :, 1::2] << np.uint16(6))
            for j in range(3):
                word = twelve[:, :, :, j] | (
                    (twelve[:, :, :, 3] >> np.uint16(4 * j)) << np.uint16(12)
                )
                words[:, half, plane, :, :, j] = word.swapaxes(1, 2)
    scales = _bytes(v[:, :, 48:54])
    low, high = scales[:, :8], scales[:, 8:]
    low = np.concatenate([low & 15, low >> 4], axis=1)
    high = np.concatenate([(high >> s) & 3 for s in (0, 2, 4, 6)], axis=1)
    sc = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return Arrays(words.reshape(nb * 16, tiles, 3, lanes), _joined(sc), None, _half(v[:, :, 54]))


def _q6_k(v: Words) -> Arrays:
    v = np.ascontiguousarray(v)
    nb, tiles, _, lanes = v.shape
    ql = v[:, :, :64].reshape(nb, tiles, 2, 2, 2, 8, lanes)  # half, 32 bytes, sixteen, pair
    qh = v[:, :, 64:96].reshape(nb, tiles, 2, 2, 8, lanes)
    words = np.empty((nb, 2, 4, 2, tiles, 6, lanes), np.uint16)
    for plane in range(4):
        pairs = _pairs(ql[:, :, :, plane % 2], 4 * (plane // 2), 15) | (
            _pairs(qh, 2 * plane, 3) << np.uint16(4)
        )
        twelve = (pairs & np.uint16(63)) | ((pairs >> np.uint16(2)) & np.uint16(0xFC0))
        for j in range(6):
            extra = twelve[..., 6 + j // 3, :] >> np.uint16(4 * (j % 3))
            word = twelve[..., j, :] | (extra << np.uint16(12))
            words[:, :, plane, :, :, j] = word.transpose(0, 2, 3, 1, 4)
    sc = _bytes(v[:, :, 96:104]).view(np.int8)
    return Arrays(words.reshape(nb * 16, tiles, 6, lanes), _joined(sc), None, _half(v[:, :, 104]))


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
