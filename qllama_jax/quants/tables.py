"""The formats of four bits that index a table of 16 values: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

ggml: ggml-common.h. As in `legacy`, every product has fewer than 25 significant bits and is exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Float32, Int8, UInt8

from qllama_jax.quants.bits import as_float, bit_fields, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format

# ggml: kvalues_iq4nl, quantiles of weights.
_NONLINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
# Twice the numbers of four-bit floats E2M1 (OCP Microscaling Formats 1.0); the eighth is no -0.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
# Exponents from which on a weight may be too large for float32: 12 * 2^(253 - 128).
_MXFP4_OVERFLOW = 253


def _mxfp4_weights() -> np.ndarray:
    """Bits of 2^(e - 128) E2M1[q] for every e and q, uint32 `[256 * 16]`."""
    with np.errstate(over="ignore"):
        weights = np.ldexp(_E2M1.astype(np.float32)[None], np.arange(256)[:, None] - 128)
    return weights.astype(np.float32).reshape(-1).view(np.uint32)


def _half_ue4m3() -> Float32[np.ndarray, " 256"]:
    """Half of each unsigned float of 4 exponent and 3 fraction bits; bit 7 is ignored, NaN is 0."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    return np.where(code == 0x7F, 0, value / 2).astype(np.float32)


_MXFP4, _HALF_UE4M3 = _mxfp4_weights(), _half_ue4m3()


def _look_up(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index.astype(jnp.int32)].get(mode="promise_in_bounds")


def _nonlinear(nibbles: UInt8[Array, "*lead"]) -> Int8[Array, "*lead"]:
    return _look_up(_NONLINEAR, nibbles)


@block_format(GGMLQuantizationType.IQ4_NL, [("d", "<f2"), ("qs", "u1", 16)])
class IQ4_NL(Block):
    """w = d table[q], q in 0..15 in the order of Q4_0. block_iq4_nl."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d table[q]."""
        q = _nonlinear(bit_fields(self.qs, 4, 2))
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(
    GGMLQuantizationType.IQ4_XS,
    [("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)],
)
class IQ4_XS(Block):
    """w = d (sc - 32) table[q], sc in 0..63 for 8 sub-blocks of 32. block_iq4_xs."""

    d: Leaf
    scales_h: Leaf
    scales_l: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc - 32) table[q]."""
        *lead, _ = self.qs.shape
        q = bit_fields(self.qs.reshape(*lead, 8, 16), 4, 2).reshape(*lead, 8, 32)
        low = bit_fields(self.scales_l[..., None], 4, 2).reshape(*lead, 8)
        shifts = np.arange(0, 16, 2, dtype=np.uint16).reshape((1,) * len(lead) + (8,))
        high = ((self.scales_h[..., None] >> shifts) & np.uint16(3)).astype(jnp.uint8)
        sc = signed(low | (high << np.uint8(4)), 32)
        scale = as_float(self.d)[..., None] * as_float(sc)
        return rows(scale[..., None] * as_float(_nonlinear(q)))


@block_format(GGMLQuantizationType.MXFP4, [("e", "u1"), ("qs", "u1", 16)])
class MXFP4(Block):
    """w = 2^(e - 128) table[q]: four-bit floats with a power of two. block_mxfp4.

    Read from a table of bit patterns: some are subnormal, which XLA on CPU takes for zero in
    arithmetic.
    """

    e: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return 2^(e - 128) table[q]."""
        q = bit_fields(self.qs, 4, 2).astype(jnp.uint16)
        index = self.e[..., None, None].astype(jnp.uint16) * np.uint16(16) + q
        return rows(jax.lax.bitcast_convert_type(_look_up(_MXFP4, index), jnp.float32))

    def non_finite(self) -> dict[str, np.ndarray]:
        """As in `Block`: exponents with which a weight may be infinite."""
        return {"e": np.asarray(self.e) >= _MXFP4_OVERFLOW}


@block_format(GGMLQuantizationType.NVFP4, [("d", "u1", 4), ("qs", "u1", 32)])
class NVFP4(Block):
    """w = d table[q] / 2: four-bit floats, d an unsigned E4M3 float of each 16. block_nvfp4."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d table[q] / 2."""
        *lead, _ = self.qs.shape
        q = bit_fields(self.qs.reshape(*lead, 4, 8), 4, 2).reshape(*lead, 4, 16)
        return rows(_look_up(_HALF_UE4M3, self.d)[..., None] * as_float(_look_up(_E2M1, q)))
