"""The formats of 256-value super-blocks: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K (ggml: ggml-common.h).

A super-block has one or two half-float scales (d, dmin) and small integer scales for its 8 or 16
sub-blocks. As in `legacy`, every product has fewer than 25 significant bits and is exact.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Float32, UInt8

from qllama_jax.quants.bits import as_float, bit_fields, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format
from qllama_jax.quants.float_scales import float_times_int


def _halves(qs: UInt8[Array, "*lead n"], width: int, count: int) -> UInt8[Array, "*lead sub n2"]:
    """Take the fields of each half of qs in turn: `[*lead, n] -> [*lead, 2 * count, n / 2]`."""
    *lead, n = qs.shape
    planes = bit_fields(qs.reshape(*lead, 2, n // 2), width, count)
    return planes.reshape(*lead, 2 * count, n // 2)


def _six_bit_scales(
    scales: UInt8[Array, "*lead 12"],
) -> tuple[UInt8[Array, "*lead 8"], UInt8[Array, "*lead 8"]]:
    """Unpack the 8 scales and 8 mins of Q4_K and Q5_K. ggml: get_scale_min_k4."""
    *lead, _ = scales.shape
    low_sc, low_m, high = (part[..., None, :] for part in jnp.split(scales, 3, axis=-1))
    six, two, four = np.uint8(0x3F), np.uint8(0x30), np.uint8(0x0F)
    # Chosen by index, not concatenated: around a concatenation XLA's CPU code for the product is
    # scalar unless that is fenced off. Beside the fence this is as fast within 5 % on jax 0.12 and
    # twice as fast on 0.10; on an H100 a step of Q4_K_M takes 1.65 ms for 1.84.
    first = np.asarray([True, False]).reshape((1,) * len(lead) + (2, 1))
    sc = jnp.where(first, low_sc & six, (high & four) | ((low_sc >> np.uint8(2)) & two))
    m = jnp.where(first, low_m & six, (high >> np.uint8(4)) | ((low_m >> np.uint8(2)) & two))
    return sc.reshape(*lead, 8), m.reshape(*lead, 8)


def _affine(
    d: Leaf, sc: Leaf, dmin: Leaf, m: Leaf, q: UInt8[Array, "*out nb sub n"]
) -> Float32[Array, "*out in"]:
    """Return (d sc) q - (dmin m) with one (sc, m) a sub-block."""
    scale = as_float(d)[..., None] * as_float(sc)
    offset = as_float(dmin)[..., None] * as_float(m)
    return rows(scale[..., None] * as_float(q) - offset[..., None])


@block_format(
    GGMLQuantizationType.Q2_K,
    [("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")],
)
class Q2_K(Block):
    """w = d sc q - dmin m, q in 0..3, 16 sub-blocks of 16; scales = sc | m << 4. block_q2_K."""

    scales: Leaf
    qs: Leaf
    d: Leaf
    dmin: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d sc q - dmin m."""
        *lead, _ = self.qs.shape
        q = _halves(self.qs, 2, 4).reshape(*lead, 16, 16)
        sc, m = self.scales & np.uint8(15), self.scales >> np.uint8(4)
        return _affine(self.d, sc, self.dmin, m, q)


@block_format(
    GGMLQuantizationType.Q3_K,
    [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")],
)
class Q3_K(Block):
    """w = d (sc - 32) (q - 4), q in 0..7 with its top bit in hmask, 16 sub-blocks. block_q3_K."""

    hmask: Leaf
    qs: Leaf
    scales: Leaf
    d: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc - 32) (q - 4)."""
        *lead, _ = self.qs.shape
        top = bit_fields(self.hmask, 1, 8) << np.uint8(2)
        q = signed(_halves(self.qs, 2, 4) | top, 4).reshape(*lead, 16, 16)
        low = bit_fields(self.scales[..., :8], 4, 2).reshape(*lead, 16)
        high = bit_fields(self.scales[..., 8:], 2, 4).reshape(*lead, 16)
        sc = signed(low | (high << np.uint8(4)), 32)
        scale = as_float(self.d)[..., None] * as_float(sc)
        return rows(scale[..., None] * as_float(q))


@block_format(
    GGMLQuantizationType.Q4_K,
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)],
)
class Q4_K(Block):
    """w = d sc q - dmin m, q in 0..15, sc and m in 0..63 for 8 sub-blocks of 32. block_q4_K."""

    d: Leaf
    dmin: Leaf
    scales: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d sc q - dmin m."""
        *lead, _ = self.qs.shape
        q = bit_fields(self.qs.reshape(*lead, 4, 32), 4, 2).reshape(*lead, 8, 32)
        sc, m = _six_bit_scales(self.scales)
        return _affine(self.d, sc, self.dmin, m, q)


@block_format(
    GGMLQuantizationType.Q5_K,
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)],
)
class Q5_K(Block):
    """w = d sc q - dmin m, q in 0..31; bit s of qh[l] is the fifth of sub-block s. block_q5_K."""

    d: Leaf
    dmin: Leaf
    scales: Leaf
    qh: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d sc q - dmin m."""
        *lead, _ = self.qs.shape
        low = bit_fields(self.qs.reshape(*lead, 4, 32), 4, 2).reshape(*lead, 8, 32)
        q = low | (bit_fields(self.qh, 1, 8) << np.uint8(4))
        sc, m = _six_bit_scales(self.scales)
        return _affine(self.d, sc, self.dmin, m, q)


@block_format(
    GGMLQuantizationType.Q6_K,
    [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")],
)
class Q6_K(Block):
    """w = d sc (q - 32), q in 0..63: four bits in ql, two in qh; 16 sub-blocks. block_q6_K."""

    ql: Leaf
    qh: Leaf
    scales: Leaf
    d: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d sc (q - 32)."""
        *lead, _ = self.ql.shape
        low = _halves(self.ql, 4, 2).reshape(*lead, 16, 16)
        high = _halves(self.qh, 2, 4).reshape(*lead, 16, 16)
        q = signed(low | (high << np.uint8(4)), 32)
        scale = as_float(self.d)[..., None] * as_float(self.scales)
        return rows(scale[..., None] * as_float(q))


@block_format(GGMLQuantizationType.Q8_K, [("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])
class Q8_K(Block):
    """w = d q, q in -128..127; bsums are the sums of 16 q, for dot products alone. block_q8_K."""

    d: Leaf
    qs: Leaf
    bsums: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d q."""
        return rows(float_times_int(self.d[..., None, None], self.qs[..., None, :]))
