"""The formats of 256 values in groups of 8 or 4 that a code book lists: IQ1, IQ2, IQ3.

A code says a whole group, a row of a grid of small integers; IQ2 and IQ3 add a sign a value, IQ1
one shift a group. Eighths of the half-float scale times an odd number below 32 times an integer
below 64 have at most 22 significant bits, so products are exact, as in `legacy` and `k_quants`.
ggml: ggml-common.h, which has the grids; here they are gguf-py's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from gguf import quants as tables
from jaxtyping import Array, Bool, Float32, Int8, UInt, UInt8, UInt16

from qllama_jax.quants.bits import as_float, fields_of_each, lookup, rows
from qllama_jax.quants.block import Block, Leaf, block_format

_SIGNS = np.frombuffer(tables.IQ2_XXS.ksigns, np.uint8)  # 7 bits, and their parity as the eighth


@functools.cache
def _grid(name: str) -> Int8[np.ndarray, "codes values"]:
    """The code book of a format; unpacked when first asked for."""
    table = getattr(tables, name)
    table.init_grid()
    return table.grid.reshape(table.grid_shape).astype(np.int8)


def _groups(name: str, code: UInt[Array, "*lead n"]) -> Int8[Array, "*lead m 8"]:
    """Return the values of the codes, eight by eight."""
    *lead, n = code.shape
    grid = _grid(name)
    _, values = grid.shape
    return lookup(grid, code).reshape(*lead, n * values // 8, 8)


def _with_signs(
    q: Int8[Array, "*lead m 8"], signs: UInt8[Array, "*lead m"]
) -> Int8[Array, "*lead m 8"]:
    """Return q, negative where its bit of the group's byte of signs is 1."""
    return jnp.where(fields_of_each(signs, 1, 8) == 0, q, -q)


def _odd_scale(d: Leaf, sc: UInt8[Array, "*lead sub"], unit: float) -> Float32[Array, "*lead sub"]:
    """Return d (2 sc + 1) unit, unit a power of two."""
    odd = as_float((sc << np.uint8(1)) | np.uint8(1))
    return as_float(d)[..., None] * odd * np.float32(unit)


def _scaled(
    scale: Float32[Array, "*out nb sub"], q: Int8[Array, "*out nb m 8"]
) -> Float32[Array, "*out in"]:
    """Return scale q, one scale a sub-block of 256 / sub values."""
    *lead, sub = scale.shape
    return rows(scale[..., None] * as_float(q.reshape(*lead, sub, 256 // sub)))


def _signs_and_scale(
    words: UInt[Array, "*lead 8"],
) -> tuple[UInt8[Array, "*lead 32"], UInt8[Array, "*lead 8"]]:
    """Unpack words of four 7-bit codes of signs and a 4-bit scale."""
    *lead, _ = words.shape
    signs = lookup(_SIGNS, fields_of_each(words, 7, 4).reshape(*lead, 32))
    return signs, (words >> np.uint32(28)).astype(jnp.uint8)


def _with_high_bits(low: Leaf, high: UInt[Array, "*lead n"]) -> UInt16[Array, "*lead n"]:
    """Return low + 256 high: the codes of a grid of more than 256 groups."""
    return low.astype(jnp.uint16) | (high.astype(jnp.uint16) << np.uint16(8))


@block_format(GGMLQuantizationType.IQ2_XXS, [("d", "<f2"), ("qs", "<u4", (8, 2))])
class IQ2_XXS(Block):
    """w = d (2 sc + 1) / 8 (+-g), g in {8, 25, 43}, 8 sub-blocks of 32. ggml: block_iq2_xxs.

    A sub-block has a word of four codes, and one of four 7-bit codes of signs and sc in 0..15.
    """

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) / 8 (+-g)."""
        *lead, _, _ = self.qs.shape
        code = fields_of_each(self.qs[..., 0], 8, 4).reshape(*lead, 32)
        signs, sc = _signs_and_scale(self.qs[..., 1])
        q = _with_signs(_groups("IQ2_XXS", code), signs)
        return _scaled(_odd_scale(self.d, sc, 1 / 8), q)


@block_format(GGMLQuantizationType.IQ2_XS, [("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
class IQ2_XS(Block):
    """w = d (2 sc + 1) / 8 (+-g), g in {8, 25, 43}, 16 sub-blocks of 16. ggml: block_iq2_xs.

    A word of qs is a code of 9 bits and a code of signs of 7.
    """

    d: Leaf
    qs: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) / 8 (+-g)."""
        *lead, _ = self.qs.shape
        sc = fields_of_each(self.scales, 4, 2).reshape(*lead, 16)
        signs = lookup(_SIGNS, self.qs >> np.uint16(9))
        q = _with_signs(_groups("IQ2_XS", self.qs & np.uint16(511)), signs)
        return _scaled(_odd_scale(self.d, sc, 1 / 8), q)


@block_format(
    GGMLQuantizationType.IQ2_S,
    [("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)],
)
class IQ2_S(Block):
    """w = d (2 sc + 1) / 8 (+-g), g in {8, 25, 43}, 16 sub-blocks of 16. ggml: block_iq2_s.

    A code has 10 bits, its top two in qh. ggml's qs are qs and signs here.
    """

    d: Leaf
    qs: Leaf
    signs: Leaf
    qh: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) / 8 (+-g)."""
        *lead, _ = self.qs.shape
        sc = fields_of_each(self.scales, 4, 2).reshape(*lead, 16)
        code = _with_high_bits(self.qs, fields_of_each(self.qh, 2, 4).reshape(*lead, 32))
        q = _with_signs(_groups("IQ2_S", code), self.signs)
        return _scaled(_odd_scale(self.d, sc, 1 / 8), q)


@block_format(GGMLQuantizationType.IQ3_XXS, [("d", "<f2"), ("qs", "u1", 64), ("scales", "<u4", 8)])
class IQ3_XXS(Block):
    """w = d (2 sc + 1) / 4 (+-g), g in 4..62, groups of 4, 8 sub-blocks of 32. block_iq3_xxs.

    A word of scales is four 7-bit codes of signs, each of 8 values, and sc in 0..15.
    """

    d: Leaf
    qs: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) / 4 (+-g)."""
        signs, sc = _signs_and_scale(self.scales)
        q = _with_signs(_groups("IQ3_XXS", self.qs), signs)
        return _scaled(_odd_scale(self.d, sc, 1 / 4), q)


@block_format(
    GGMLQuantizationType.IQ3_S,
    [("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)],
)
class IQ3_S(Block):
    """w = d (2 sc + 1) (+-g), g in {1, 3, .., 15}, groups of 4, 8 sub-blocks of 32. block_iq3_s.

    A code has 9 bits, its top one in qh.
    """

    d: Leaf
    qs: Leaf
    qh: Leaf
    signs: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) (+-g)."""
        *lead, _ = self.qs.shape
        sc = fields_of_each(self.scales, 4, 2).reshape(*lead, 8)
        code = _with_high_bits(self.qs, fields_of_each(self.qh, 1, 8).reshape(*lead, 64))
        q = _with_signs(_groups("IQ3_S", code), self.signs)
        return _scaled(_odd_scale(self.d, sc, 1.0), q)


def _shifted(
    g: Int8[Array, "*lead 32 8"], negative: UInt[Array, "*lead 32"]
) -> Int8[Array, "*lead 32 8"]:
    """Return g + 1/8 in eighths, g - 1/8 where the group's bit is 1."""
    eighth = np.int8(1) - (negative.astype(jnp.int8) << np.int8(1))
    return (g << np.int8(3)) + eighth[..., None]


@block_format(GGMLQuantizationType.IQ1_S, [("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
class IQ1_S(Block):
    """w = d (2 sc + 1) (g +- 1/8), g in {-1, 0, 1}, 8 sub-blocks of 32. ggml: block_iq1_s.

    A word of qh is the top 3 of the 11 bits of four codes, sc in 0..7, and the sign of the eighth.
    """

    d: Leaf
    qs: Leaf
    qh: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) / 8 (8 g +- 1)."""
        *lead, _ = self.qs.shape
        code = _with_high_bits(self.qs, fields_of_each(self.qh, 3, 4).reshape(*lead, 32))
        sc = ((self.qh >> np.uint16(12)) & np.uint16(7)).astype(jnp.uint8)
        q = _shifted(_groups("IQ1_S", code), jnp.repeat(self.qh >> np.uint16(15), 4, axis=-1))
        return _scaled(_odd_scale(self.d, sc, 1 / 8), q)


@block_format(
    GGMLQuantizationType.IQ1_M, [("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)]
)
class IQ1_M(Block):
    """w = d (2 sc + 1) (g +- 1/8), g in {-1, 0, 1}, 16 sub-blocks of 16. ggml: block_iq1_m.

    A nibble of qh is the top 3 of the 11 bits of a code and the sign of the eighth. A word of
    scales is four sc in 0..7, and in its top nibble a quarter of the half float d.
    """

    qs: Leaf
    qh: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) / 8 (8 g +- 1)."""
        *lead, _ = self.qs.shape
        d = jax.lax.bitcast_convert_type(self._d_bits, jnp.float16)
        sc = fields_of_each(self.scales, 3, 4).reshape(*lead, 16).astype(jnp.uint8)
        high = fields_of_each(self.qh, 4, 2).reshape(*lead, 32)
        code = _with_high_bits(self.qs, high & np.uint8(7))
        q = _shifted(_groups("IQ1_M", code), high >> np.uint8(3))
        return _scaled(_odd_scale(d, sc, 1 / 8), q)

    @property
    def _d_bits(self) -> Leaf:
        """The bits of d, uint16 `[*out, nb]`: lowest nibble first."""
        d = self.scales[..., 0] >> 12
        for word in (1, 2, 3):
            d = d | ((self.scales[..., word] >> 12) << 4 * word)
        return d

    def not_finite(self) -> dict[str, Bool[np.ndarray, ...]]:
        """Those of d, one a block."""
        return {"scales": (self._d_bits & 0x7C00) == 0x7C00}
