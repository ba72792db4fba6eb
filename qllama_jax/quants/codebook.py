"""The formats whose values come from a codebook: IQ1_S, IQ1_M, IQ2_*, IQ3_* (ggml: ggml-common.h).

A super-block of 256 values holds indices into a fixed grid of 4 or 8 small integers each, and,
but for IQ1, their signs. The grids are gguf-py's, since the formats are defined by nothing shorter.
As in `legacy`, every product has fewer than 25 significant bits and is exact.
"""

from __future__ import annotations

import functools
from typing import Any

import gguf.quants
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Float, Float32, Int8, Shaped, UInt8, UInt32

from qllama_jax.quants.bits import as_float, bit_fields, rows
from qllama_jax.quants.block import Block, Leaf, block_format

# Seven stored signs imply the eighth: the number of negative values is even. ggml: ksigns_iq2xs.
_EVEN_SIGNS = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)
_BIT = np.arange(8, dtype=np.uint8)


@functools.cache
def _grid(qtype: str) -> Int8[np.ndarray, "entries n"]:
    """Values of a codebook, made when it is first used: 2 ms for the largest."""
    source: Any = getattr(gguf.quants, qtype)
    source.init_grid()
    return source.grid.astype(np.int8).reshape(source.grid_shape)


def _look_up(qtype: str, index: Shaped[Array, "*lead"]) -> Int8[Array, "*lead n"]:
    grid = jnp.asarray(_grid(qtype))
    return grid.at[index.astype(jnp.int32)].get(mode="promise_in_bounds")


def _negate(grid: Int8[Array, "*lead 8"], signs: UInt8[Array, "*lead"]) -> Int8[Array, "*lead 8"]:
    """Negate value i of each eight whose bit i is set."""
    bits = (signs[..., None] >> _BIT.reshape((1,) * signs.ndim + (8,))) & np.uint8(1)
    return jnp.where(bits == 1, -grid, grid)


def _even_signs(index: Shaped[Array, "*lead"]) -> UInt8[Array, "*lead"]:
    table = jnp.asarray(_EVEN_SIGNS)
    return table.at[(index & np.array(127, index.dtype)).astype(jnp.int32)].get(
        mode="promise_in_bounds"
    )


def _words(word: UInt32[Array, "*lead"], shifts: tuple[int, ...]) -> UInt32[Array, "*lead n"]:
    steps = np.array(shifts, np.uint32).reshape((1,) * word.ndim + (len(shifts),))
    return word[..., None] >> steps


def _nibble_pairs(scales: UInt8[Array, "*lead n"]) -> UInt8[Array, "*lead n2"]:
    """Low and high nibble of each byte, side by side: `[*lead, n] -> [*lead, 2 n]`."""
    *lead, n = scales.shape
    shifts = np.array([0, 4], np.uint8).reshape((1,) * scales.ndim + (2,))
    return ((scales[..., None] >> shifts) & np.uint8(15)).reshape(*lead, 2 * n)


def _scaled(
    scale: Float32[Array, "*out nb sub"], q: Shaped[Array, "*out nb values"]
) -> Float[Array, "*out in"]:
    """Multiply the values of each sub-block by its scale."""
    *lead, sub = scale.shape
    q = q.reshape(*lead, sub, -1)
    return rows(scale[..., None] * (q if jnp.issubdtype(q.dtype, jnp.floating) else as_float(q)))


def _flat(q: Shaped[Array, ...], lead: tuple[int, ...]) -> Shaped[Array, ...]:
    return q.reshape(*lead, -1)


@block_format(GGMLQuantizationType.IQ2_XXS, [("d", "<f2"), ("qs", "<u4", 16)])
class IQ2_XXS(Block):
    """w = d (sc + 1/2) / 4 * ±grid[i]; of 32 values a word of 4 i, one of signs and sc << 28.

    block_iq2_xxs.
    """

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc + 1/2) / 4 * ±grid[i]."""
        *lead, _ = self.qs.shape
        words = self.qs.reshape(*lead, 8, 2)
        index = _words(words[..., 0], (0, 8, 16, 24)) & np.uint32(255)
        signs = _even_signs(_words(words[..., 1], (0, 7, 14, 21)))
        q = _negate(_look_up("IQ2_XXS", index), signs)
        sc = as_float(words[..., 1] >> np.uint32(28)) + np.float32(0.5)
        return _scaled(as_float(self.d)[..., None] * sc * np.float32(0.25), _flat(q, tuple(lead)))


@block_format(GGMLQuantizationType.IQ2_XS, [("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
class IQ2_XS(Block):
    """w = d (sc + 1/2) / 4 * ±grid[i]; of 8 values 9 bits of i, 7 of signs. block_iq2_xs."""

    d: Leaf
    qs: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc + 1/2) / 4 * ±grid[i]."""
        *lead, _ = self.qs.shape
        q = _negate(
            _look_up("IQ2_XS", self.qs & np.uint16(511)), _even_signs(self.qs >> np.uint16(9))
        )
        sc = as_float(_nibble_pairs(self.scales)) + np.float32(0.5)
        return _scaled(as_float(self.d)[..., None] * sc * np.float32(0.25), _flat(q, tuple(lead)))


@block_format(
    GGMLQuantizationType.IQ2_S,
    [("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)],
)
class IQ2_S(Block):
    """w = d (sc + 1/2) / 4 * ±grid[i]; of 8 values i has a byte and two bits in qh. block_iq2_s."""

    d: Leaf
    qs: Leaf
    signs: Leaf
    qh: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc + 1/2) / 4 * ±grid[i]."""
        *lead, _ = self.qs.shape
        high = bit_fields(self.qh[..., None], 2, 4).reshape(*lead, 32).astype(jnp.uint16)
        index = self.qs.astype(jnp.uint16) | (high << np.uint16(8))
        q = _negate(_look_up("IQ2_S", index), self.signs)
        sc = as_float(_nibble_pairs(self.scales)) + np.float32(0.5)
        return _scaled(as_float(self.d)[..., None] * sc * np.float32(0.25), _flat(q, tuple(lead)))


@block_format(
    GGMLQuantizationType.IQ3_XXS, [("d", "<f2"), ("qs", "u1", 64), ("scales_signs", "<u4", 8)]
)
class IQ3_XXS(Block):
    """w = d (sc + 1/2) / 2 * ±grid[i], i a byte of 4 values; scales_signs as in IQ2_XXS.

    block_iq3_xxs.
    """

    d: Leaf
    qs: Leaf
    scales_signs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (sc + 1/2) / 2 * ±grid[i]."""
        *lead, _ = self.qs.shape
        signs = _even_signs(_words(self.scales_signs, (0, 7, 14, 21)))
        grid = _look_up("IQ3_XXS", self.qs).reshape(*lead, 8, 4, 8)
        q = _negate(grid, signs)
        sc = as_float(self.scales_signs >> np.uint32(28)) + np.float32(0.5)
        return _scaled(as_float(self.d)[..., None] * sc * np.float32(0.5), _flat(q, tuple(lead)))


@block_format(
    GGMLQuantizationType.IQ3_S,
    [("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)],
)
class IQ3_S(Block):
    """w = d (2 sc + 1) * ±grid[i]; of 4 values i has a byte and a bit in qh. block_iq3_s."""

    d: Leaf
    qs: Leaf
    qh: Leaf
    signs: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) * ±grid[i]."""
        *lead, _ = self.qs.shape
        high = bit_fields(self.qh[..., None], 1, 8).reshape(*lead, 64).astype(jnp.uint16)
        index = self.qs.astype(jnp.uint16) | (high << np.uint16(8))
        q = _negate(_look_up("IQ3_S", index).reshape(*lead, 32, 8), self.signs)
        sc = as_float(_nibble_pairs(self.scales)) * np.float32(2) + np.float32(1)
        return _scaled(as_float(self.d)[..., None] * sc, _flat(q, tuple(lead)))


@block_format(GGMLQuantizationType.IQ1_S, [("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
class IQ1_S(Block):
    """w = d (2 sc + 1) (grid[i] ± 1/8); qh of 32 values: 4 times 3 bits of i, sc, the sign.

    block_iq1_s.
    """

    d: Leaf
    qs: Leaf
    qh: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) (grid[i] ± 1/8)."""
        *lead, _ = self.qs.shape
        shifts = np.array([0, 3, 6, 9], np.uint16).reshape((1,) * self.qh.ndim + (4,))
        high = ((self.qh[..., None] >> shifts) & np.uint16(7)).reshape(*lead, 32)
        index = self.qs.astype(jnp.uint16) | (high << np.uint16(8))
        grid = as_float(_look_up("IQ1_S", index)).reshape(*lead, 8, 32)
        delta = jnp.where(self.qh >= np.uint16(0x8000), np.float32(-0.125), np.float32(0.125))
        sc = as_float((self.qh >> np.uint16(12)) & np.uint16(7)) * np.float32(2) + np.float32(1)
        q = grid + delta[..., None]
        return _scaled(as_float(self.d)[..., None] * sc, _flat(q, tuple(lead)))


@block_format(
    GGMLQuantizationType.IQ1_M, [("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)]
)
class IQ1_M(Block):
    """w = d (2 sc + 1) (grid[i] ± 1/8), d spread over the top four bits of the four scales words.

    Each word has four sc of three bits below, for 16 values each; a nibble of qh for each 8 values
    three bits of i and the sign. block_iq1_m.
    """

    qs: Leaf
    qh: Leaf
    scales: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 sc + 1) (grid[i] ± 1/8)."""
        *lead, _ = self.qs.shape
        nibble = _nibble_pairs(self.qh)
        high = (nibble & np.uint8(7)).astype(jnp.uint16)
        index = self.qs.astype(jnp.uint16) | (high << np.uint16(8))
        delta = jnp.where(nibble >= np.uint8(8), np.float32(-0.125), np.float32(0.125))
        q = as_float(_look_up("IQ1_M", index)) + delta[..., None]
        shifts = np.array([0, 3, 6, 9], np.uint16).reshape((1,) * self.scales.ndim + (4,))
        sc = ((self.scales[..., None] >> shifts) & np.uint16(7)).reshape(*lead, 16)
        d = self._half_bits().view(jnp.float16)
        scale = as_float(d)[..., None] * (as_float(sc) * np.float32(2) + np.float32(1))
        return _scaled(scale, _flat(q, tuple(lead)))

    def _half_bits(self) -> Any:
        """Bits of d, uint16, lowest nibble first; for arrays of jax and of numpy."""
        top = self.scales >> np.uint16(12)
        low = top[..., 0] | top[..., 1] << np.uint16(4)
        return low | top[..., 2] << np.uint16(8) | top[..., 3] << np.uint16(12)

    def non_finite(self) -> dict[str, np.ndarray]:
        """As in `Block`: of each block's d."""
        return {"scales": ~np.isfinite(self._half_bits().view(np.float16))}
