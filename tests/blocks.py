"""Raw quantized blocks for tests: quantized weights, what blocks mean, and random bytes."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
from gguf import GGMLQuantizationType as QType
from numpy.typing import NDArray

from old_blocks import OLD_SIZES, dequantize_old, make_old_finite, quantize_old
from qllama_jax.tensor_types import OldType, TensorType

#: Formats that hold one number an element, and the numpy type of its bits.
_PLAIN = {QType.F32: "<u4", QType.F16: "<u2", QType.BF16: "<u2"}

#: Values and bytes of a block. gguf-py has Q8_1 as it was before its two scales became float16.
BLOCK_SIZES: dict[TensorType, tuple[int, int]] = {
    **gguf.GGML_QUANT_SIZES,
    QType.Q8_1: (32, 36),
    **OLD_SIZES,
}

#: Formats whose quantizers first build tables for seconds, in every process.
_SLOW = {QType.IQ1_S, QType.IQ1_M, QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S}

#: Byte offsets of the float16 scales in a block.
_FLOAT16_SCALES = {
    QType.F16: (0,),
    QType.Q4_0: (0,),
    QType.Q4_1: (0, 2),
    QType.Q5_0: (0,),
    QType.Q5_1: (0, 2),
    QType.Q8_0: (0,),
    QType.Q8_1: (0, 2),
    QType.Q2_K: (80, 82),
    QType.Q3_K: (108,),
    QType.Q4_K: (0, 2),
    QType.Q5_K: (0, 2),
    QType.Q6_K: (208,),
    QType.IQ1_S: (0,),
    QType.IQ2_XXS: (0,),
    QType.IQ2_XS: (0,),
    QType.IQ2_S: (0,),
    QType.IQ3_XXS: (0,),
    QType.IQ3_S: (0,),
    QType.IQ4_NL: (0,),
    QType.IQ4_XS: (0,),
    QType.TQ1_0: (52,),
    QType.TQ2_0: (64,),
    QType.Q1_0: (0,),
}


def quantize(weights: NDArray[np.float32], qtype: TensorType) -> NDArray[np.uint8]:
    """Raw bytes, uint8 [..., bytes], of float32 weights [..., n]: ggml's own quantizers."""
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if isinstance(qtype, OldType):
        return quantize_old(weights, qtype)
    if qtype in _PLAIN:
        return np.ascontiguousarray(gguf.quantize(weights, qtype)).view(np.uint8)
    size, _ = BLOCK_SIZES[qtype]
    if weights.shape[-1] % size:
        raise ValueError(f"rows of {weights.shape[-1]} are not a multiple of {qtype.name}'s {size}")
    rows = weights.reshape(-1, weights.shape[-1])
    if qtype == QType.Q8_K:
        raw = _quantize_q8_k(rows)
    else:
        # The formats below two bits cannot do without weights of importance; these are all equal.
        needs = libgguf.quantize_requires_imatrix(qtype)
        importance = np.ones(rows.shape[1], np.float32) if needs else None
        raw = np.asarray(libgguf.quantize_rows(rows, qtype, importance)).view(np.uint8)
    return raw.reshape(*weights.shape[:-1], -1)


def dequantize(data: NDArray, qtype: TensorType) -> NDArray[np.float32]:
    """Float32 weights [..., n] of raw blocks: uint8 [..., bytes], or already floats.

    gguf-py's formula, and ours for the formats that it cannot dequantize.
    """
    if isinstance(qtype, OldType):
        return dequantize_old(data, qtype)
    own = {QType.Q8_1: (_q8_1, 36), QType.Q8_K: (_q8_k, 292), QType.Q1_0: (_q1_0, 18)}
    if qtype not in own:
        return gguf.dequantize(data, qtype)
    formula, size = own[qtype]
    blocks = np.ascontiguousarray(data).reshape(-1, size)
    return formula(blocks).reshape(*data.shape[:-1], -1)


def random_blocks(
    qtype: TensorType, shape: tuple[int, ...], rng: np.random.Generator, *, finite: bool = True
) -> NDArray[np.uint8]:
    """Random bytes, uint8 [..., bytes], that are weights of `shape` [..., n] in a format.

    With `finite` every weight is a finite float32 but any bits else may occur: subnormal scales,
    negative ones, zeros of both signs. Without it scales may be infinite or NaN too.
    """
    size, nbytes = BLOCK_SIZES[qtype]
    *rows, n = shape
    if n % size:
        raise ValueError(f"rows of {n} are not a multiple of {qtype.name}'s {size}")
    blocks = rng.integers(0, 256, (*rows, n // size, nbytes), dtype=np.uint8)
    if finite:
        _make_finite(blocks, qtype)
    return blocks.reshape(*rows, -1)


def blocks_like(
    weights: NDArray[np.float32], qtype: TensorType, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Raw blocks whose weights are of the same size as `weights`: quantized where that is quick.

    The formats with slow quantizers get random bytes and random scales of the right magnitude.
    """
    if qtype not in _SLOW:
        return quantize(weights, qtype)
    raw = random_blocks(qtype, weights.shape, rng)
    blocks = raw.reshape(*raw.shape[:-1], -1, BLOCK_SIZES[qtype][1])
    set_scale(blocks, qtype, np.ones(blocks.shape[:-1], np.float16))
    unit = dequantize(raw.reshape(-1, raw.shape[-1])[:16], qtype).std()
    sizes = rng.uniform(0.5, 1.5, blocks.shape[:-1]) * rng.choice([-1, 1], blocks.shape[:-1])
    set_scale(blocks, qtype, (sizes * weights.std() / unit).astype(np.float16))
    return raw


def set_scale(blocks: NDArray[np.uint8], qtype: TensorType, d: NDArray[np.float16]) -> None:
    """Replace the one half-float scale of each block [..., bytes], in place."""
    bits = d.astype("<f2").view("<u2")
    if qtype != QType.IQ1_M:
        (low,) = _FLOAT16_SCALES[QType(qtype)]
        blocks[..., low], blocks[..., low + 1] = bits & 0xFF, bits >> 8
        return
    for word in range(4):  # four bits in the top of each of the last four words
        high = 49 + 2 * word
        nibble = (bits >> 4 * word) & 0xF
        blocks[..., high] = (blocks[..., high] & 0x0F) | (nibble << 4)


def _make_finite(blocks: NDArray[np.uint8], qtype: TensorType) -> None:
    """Change the scales that are infinite or NaN, in place."""
    if isinstance(qtype, OldType):
        return make_old_finite(blocks, qtype)
    for offset in _FLOAT16_SCALES.get(qtype, ()):
        high = blocks[..., offset + 1]  # sign, 5 bits of exponent, 2 of fraction
        blocks[..., offset + 1] = np.where(high & 0x7C == 0x7C, high & ~np.uint8(0x40), high)
    if qtype in (QType.BF16, QType.F32):
        low, high = blocks[..., -2], blocks[..., -1]
        infinite = (high & 0x7F == 0x7F) & (low & 0x80 == 0x80)
        blocks[..., -1] = np.where(infinite, high & ~np.uint8(0x40), high)
    elif qtype == QType.Q8_K:
        # Below 2**97, so that a float32 scale times 128 is finite too.
        high = blocks[..., 3]
        blocks[..., 3] = np.where(high & 0x70 == 0x70, high & ~np.uint8(0x40), high)
    elif qtype == QType.IQ1_M:
        # The scale is spread over the top four bits of four words; the last has the sign and three
        # bits of the exponent.
        blocks[..., 55] = np.where(
            (blocks[..., 55] & 0x70 == 0x70) & (blocks[..., 53] & 0xC0 == 0xC0),
            blocks[..., 55] & ~np.uint8(0x40),
            blocks[..., 55],
        )
    elif qtype == QType.MXFP4:
        blocks[..., 0] = np.minimum(blocks[..., 0], 252)  # 12 · 2**(253 - 128) is too large
    elif qtype == QType.NVFP4:
        scales = blocks[..., :4] & 0x7F
        blocks[..., :4] = np.where(scales == 0x7F, 0x7E, scales)


def _quantize_q8_k(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Block of 256: f32 d, i8 q[256], i16 sums of 16 q. The largest weight becomes -127."""
    x = rows.reshape(-1, 256)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(-127) / largest)
        d = np.where(largest == 0, np.float32(0), 1 / inverse).astype("<f4")
    q = np.minimum(np.rint(x * inverse), 127).astype(np.int8)
    sums = q.reshape(-1, 16, 16).sum(axis=2).astype("<i2")
    blocks = np.hstack([d.view(np.uint8), q.view(np.uint8), sums.view(np.uint8)])
    return blocks.reshape(len(rows), -1)


def _q8_1(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """w = d · q. Block of 32: f16 d, f16 sum (d · Σq, not used here), i8 q[32]."""
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return d * blocks[:, 4:].view(np.int8).astype(np.float32)


def _q8_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """w = d · q. Block of 256: f32 d, i8 q[256], i16 bsums[16] (sums of 16 q, not used here)."""
    d = blocks[:, :4].copy().view("<f4")
    return d * blocks[:, 4:260].view(np.int8).astype(np.float32)


def _q1_0(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """w = ±d. Block of 128: f16 d, one bit a weight, lowest first; a set bit is +."""
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits == 1, d, -d)
