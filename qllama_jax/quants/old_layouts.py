"""The formats that only files older than GGUF have (ggml.c of April and May 2023).

Version 1, in GGML, GGMF and GGJT v1 files, puts neighbours into a byte: value 2l in the low nibble
of byte l, value 2l + 1 in the high one. Version 2, in GGJT v2 files, splits the block in halves as
today. Both have 32-bit scales where GGUF has half floats; formats that are not here did not change.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float32, UInt8

from qllama_jax.quants.bits import as_float, bit_fields, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format
from qllama_jax.quants.float_scales import float_times_int, float_times_nibble_plus
from qllama_jax.tensor_types import OldType


def _halves(qs: UInt8[Array, "*out nb 16"]) -> UInt8[Array, "*out nb 2 16"]:
    """Low nibbles hold the first half of the block, high nibbles the second."""
    return bit_fields(qs, 4, 2)


def _neighbours(qs: UInt8[Array, "*out nb n"]) -> UInt8[Array, "*out nb n 2"]:
    """Nibble j of byte l is value 2 l + j."""
    return bit_fields(qs[..., None], 4, 2)[..., 0]


def _fifth_bits(qh: UInt8[Array, "*out nb 4"]) -> UInt8[Array, "*out nb 16 2"]:
    """Bit i of the little-endian word qh is the fifth bit of value i; returned in place (16)."""
    *lead, _ = qh.shape
    bits = bit_fields(qh[..., None], 1, 8)
    return (bits << np.uint8(4)).reshape(*lead, 16, 2)


@block_format(OldType.Q4_0_V1, [("d", "<f4"), ("qs", "u1", 16)])
class Q4_0_V1(Block):
    """w = d (q - 8), q in 0..15, neighbours in a byte."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 8)."""
        q = signed(_neighbours(self.qs), 8)
        return rows(float_times_int(self.d[..., None, None], q))


@block_format(OldType.Q4_0_V2, [("d", "<f4"), ("qs", "u1", 16)])
class Q4_0_V2(Block):
    """w = d (q - 8), q in 0..15, halves of the block in the nibbles."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 8)."""
        q = signed(_halves(self.qs), 8)
        return rows(float_times_int(self.d[..., None, None], q))


@block_format(OldType.Q4_1_V1, [("d", "<f4"), ("m", "<f4"), ("qs", "u1", 16)])
class Q4_1_V1(Block):
    """w = d q + m, q in 0..15, neighbours in a byte; rounded after the product and the sum."""

    d: Leaf
    m: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q + m."""
        d, m = self.d[..., None, None], self.m[..., None, None]
        return rows(float_times_nibble_plus(d, _neighbours(self.qs), m))


@block_format(OldType.Q4_1_V2, [("d", "<f4"), ("m", "<f4"), ("qs", "u1", 16)])
class Q4_1_V2(Block):
    """w = d q + m, q in 0..15, halves in the nibbles; rounded after the product and the sum."""

    d: Leaf
    m: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q + m."""
        d, m = self.d[..., None, None], self.m[..., None, None]
        return rows(float_times_nibble_plus(d, _halves(self.qs), m))


@block_format(OldType.Q4_2_V1, [("d", "<f2"), ("qs", "u1", 8)])
class Q4_2_V1(Block):
    """w = d (q - 8), q in 0..15, 16 values a block, neighbours in a byte."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 8)."""
        q = signed(_neighbours(self.qs), 8)
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(OldType.Q5_0_V1, [("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
class Q5_0_V1(Block):
    """w = d (q - 16), q in 0..31, its fifth bit in qh, neighbours in a byte."""

    d: Leaf
    qh: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 16)."""
        q = signed(_neighbours(self.qs) | _fifth_bits(self.qh), 16)
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(OldType.Q5_1_V1, [("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
class Q5_1_V1(Block):
    """w = d q + m, q in 0..31, its fifth bit in qh, neighbours in a byte."""

    d: Leaf
    m: Leaf
    qh: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q + m."""
        q = as_float(_neighbours(self.qs) | _fifth_bits(self.qh))
        return rows(as_float(self.d)[..., None, None] * q + as_float(self.m)[..., None, None])


@block_format(OldType.Q8_0_V2, [("d", "<f4"), ("qs", "i1", 32)])
class Q8_0_V2(Block):
    """w = d q, q in -128..127; the same in version 1."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q."""
        return rows(float_times_int(self.d[..., None, None], self.qs[..., None, :]))
