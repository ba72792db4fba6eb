"""The formats of 32-value blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (ggml: ggml-common.h).

In every product `d * q` below the exact result has fewer than 24 significant bits (11 of the half
float, at most 8 of q), so it is the same with and without a fused multiply-add.
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Float32, UInt8

from qllama_jax.quants.bits import as_float, bit_fields, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format


def _nibbles(qs: UInt8[Array, "*out nb 16"]) -> UInt8[Array, "*out nb 2 16"]:
    """Low nibbles hold the first half of the block, high nibbles the second."""
    return bit_fields(qs, 4, 2)


def _fifth_bits(qh: UInt8[Array, "*out nb 4"]) -> UInt8[Array, "*out nb 2 16"]:
    """Bit j of the little-endian word qh is the fifth bit of value j; returned in place (16)."""
    *lead, n = qh.shape
    bits = bit_fields(qh.reshape(*lead, n, 1), 1, 8)
    return (bits << np.uint8(4)).reshape(*lead, 2, 16)


@block_format(GGMLQuantizationType.Q4_0, [("d", "<f2"), ("qs", "u1", 16)])
class Q4_0(Block):
    """w = d (q - 8), q in 0..15. ggml: block_q4_0."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 8)."""
        q = signed(_nibbles(self.qs), 8)
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(GGMLQuantizationType.Q4_1, [("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
class Q4_1(Block):
    """w = d q + m, q in 0..15. ggml: block_q4_1."""

    d: Leaf
    m: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q + m."""
        q = as_float(_nibbles(self.qs))
        return rows(as_float(self.d)[..., None, None] * q + as_float(self.m)[..., None, None])


@block_format(GGMLQuantizationType.Q5_0, [("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
class Q5_0(Block):
    """w = d (q - 16), q in 0..31, its fifth bit in qh. ggml: block_q5_0."""

    d: Leaf
    qh: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 16)."""
        q = signed(_nibbles(self.qs) | _fifth_bits(self.qh), 16)
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(
    GGMLQuantizationType.Q5_1, [("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]
)
class Q5_1(Block):
    """w = d q + m, q in 0..31, its fifth bit in qh. ggml: block_q5_1."""

    d: Leaf
    m: Leaf
    qh: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q + m."""
        q = as_float(_nibbles(self.qs) | _fifth_bits(self.qh))
        return rows(as_float(self.d)[..., None, None] * q + as_float(self.m)[..., None, None])


@block_format(GGMLQuantizationType.Q8_0, [("d", "<f2"), ("qs", "i1", 32)])
class Q8_0(Block):
    """w = d q, q in -128..127. ggml: block_q8_0."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q."""
        return rows(as_float(self.d)[..., None, None] * as_float(self.qs)[..., None, :])
