"""The formats of 4-bit codes with a table of 16 values: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

A code stands for an integer of 7 bits and sign at most, so, as in `legacy` and `k_quants`, every
product has at most 24 significant bits and is exact. Only MXFP4's can be subnormal.
ggml: ggml-common.h; the tables are gguf-py's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from gguf import quants as tables
from jaxtyping import Array, Bool, Float32, Int8, UInt8

from qllama_jax.quants.bits import as_float, fields_of_each, lookup, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format
from qllama_jax.quants.float_scales import float_times_int


def _values_of_bytes(of_code: tuple[int, ...]) -> Int8[np.ndarray, "2 256"]:
    """The values of a byte's low nibble and of its high one.

    Looked up by byte: XLA's CPU code for it is twice as fast as for a look-up of each nibble.
    """
    values, byte = np.array(of_code, np.int8), np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]])


_IQ4 = _values_of_bytes(tables.IQ4_NL.kvalues)
_E2M1 = _values_of_bytes(tables.MXFP4.kvalues)  # twice the value, which makes it an integer


def _decode(table: Int8[np.ndarray, "2 256"], qs: UInt8[Array, "*a n"]) -> Int8[Array, "*a 2 n"]:
    """Values of the low nibbles, then of the high ones."""
    planes = jnp.asarray(table).at[:, qs.astype(jnp.int32)].get(mode="promise_in_bounds")
    return jnp.moveaxis(planes, 0, -2)


@block_format(GGMLQuantizationType.IQ4_NL, [("d", "<f2"), ("qs", "u1", 16)])
class IQ4_NL(Block):
    """w = d v[q], q in 0..15, v from -127 to 113, denser around 0. ggml: block_iq4_nl."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d v[q]."""
        return rows(as_float(self.d)[..., None, None] * as_float(_decode(_IQ4, self.qs)))


@block_format(
    GGMLQuantizationType.IQ4_XS,
    [("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)],
)
class IQ4_XS(Block):
    """w = d (sc - 32) v[q], v of IQ4_NL, sc in 0..63 for 8 sub-blocks of 32. block_iq4_xs."""

    d: Leaf
    scales_h: Leaf
    scales_l: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc - 32) v[q]."""
        *lead, _ = self.qs.shape
        q = _decode(_IQ4, self.qs.reshape(*lead, 8, 16)).reshape(*lead, 8, 32)
        low = fields_of_each(self.scales_l, 4, 2).reshape(*lead, 8)
        high = fields_of_each(self.scales_h, 2, 8).astype(jnp.uint8)
        scale = as_float(self.d)[..., None] * as_float(signed(low | (high << np.uint8(4)), 32))
        return rows(scale[..., None] * as_float(q))


@block_format(GGMLQuantizationType.MXFP4, [("e", "u1"), ("qs", "u1", 16)])
class MXFP4(Block):
    """w = 2^(e - 128) v[q], v = 0 1 2 3 4 6 8 12 and negatives: twice E2M1. ggml: block_mxfp4."""

    e: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return 2^(e - 128) v[q], also where that is subnormal."""
        e = self.e.astype(jnp.uint32)
        subnormal = np.uint32(1 << 21) << jnp.minimum(e, np.uint32(1))  # 2^-128 and 2^-127
        bits = jnp.where(e < 2, subnormal, (e - np.uint32(1)) << np.uint32(23))
        d = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return rows(float_times_int(d[..., None, None], _decode(_E2M1, self.qs)))

    def not_finite(self) -> dict[str, Bool[np.ndarray, ...]]:
        """255 is E8M0's NaN, which ggml refuses but, where it computes, takes for 2^127."""
        return {"e": self.e == 255}


def _halved_ue4m3() -> Float32[np.ndarray, 256]:
    """Half the value of each byte as E4M3 without a sign; ggml ignores bit 7 and has 127 be 0."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    whole = np.where(exponent == 0, mantissa, 8 + mantissa).astype(np.float32)
    return np.where(byte == 127, np.float32(0), np.ldexp(whole, np.maximum(exponent, 1) - 11))


_UE4M3 = _halved_ue4m3()


@block_format(GGMLQuantizationType.NVFP4, [("d", "u1", 4), ("qs", "u1", 32)])
class NVFP4(Block):
    """w = s[d] v[q], v of MXFP4, s = E4M3 / 2 for 4 sub-blocks of 16. ggml: block_nvfp4.

    Every byte is a finite scale. A tensor may have a factor of its own in another tensor of the
    file, named `.scale`; that is no part of the blocks.
    """

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return s[d] v[q]."""
        *lead, _ = self.qs.shape
        q = _decode(_E2M1, self.qs.reshape(*lead, 4, 8)).reshape(*lead, 4, 16)
        return rows(lookup(_UE4M3, self.d)[..., None] * as_float(q))
