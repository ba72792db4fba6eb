"""x @ w.T as three products of bfloat16, for many rows of x on a CPU that has a unit for these.

Both are split, a = a_high + a_low, which keeps 16 of float32's 24 bits; of the four products of
halves that of the low ones is left out (Henry, Tang and Heinecke 2019, arXiv:1904.06376). XLA has
this as an algorithm of its dot, BF16_BF16_F32_X3, which on a CPU it computes in float32 (0.12).

512 rows times Q4_0 [4096, 2048]: 26 ms so, 37 by tiles in float32, 56 by the integer kernel; 128
rows: 10.9, 15.3 and 14.0 ms (jax 0.12, two cores of an Intel Xeon with AMX). The error is 4e-6 of
the result, where the rounding of x to 8 bits makes a thousand times that.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32

from qllama_jax.matmul import xla
from qllama_jax.matmul.cpu import processor
from qllama_jax.matmul.cpu.fence import BARRIER_HOLDS
from qllama_jax.matmul.cpu.weight import CPUWeight

# Four times as much as in float32. XLA's product packs both its operands anew for each tile: 128
# tokens of a 1.1B model in Q4_0 are read at 78 a second with half of it, 91 so and 69 with twice.
TILE_VALUES = 2**21

# Rows from which it is faster than tiles in float32: of all that the integer kernel leaves. Before
# 0.11 XLA takes three times as long to convert to bfloat16: 128 rows of Q4_0 [4096, 2048] 17.7 ms
# for 15.8, 512 rows 36 for 42.
LEAST_ROWS = 1 if BARRIER_HOLDS else 257


def is_fastest(rows: int) -> bool:
    """Return whether this is faster for so many rows of x than tiles in float32."""
    return processor.has_matrix_unit() and rows >= LEAST_ROWS


def multiply(x: Float32[Array, "B in"], w: CPUWeight) -> Float32[Array, "B padded"]:
    """Compute x @ w.dequantize().T with its fillings, to 2^-15 of sum |x| |w| at the worst."""
    B, _ = x.shape
    x_high, x_low = _halves(x)
    both = jnp.concatenate([x_high, x_low])

    def product(_: Array, dense: Float32[Array, "in tile"]) -> Float32[Array, "B tile"]:
        w_high, w_low = _halves(dense)
        of_high = xla.dot(both, w_high)
        return of_high[:B] + (of_high[B:] + xla.dot(x_high, w_low))

    return xla.by_tiles(x, w, jnp.int32(0), w.padded, tile_values=TILE_VALUES, product=product)


def _halves(a: Float32[Array, "n m"]) -> tuple[BFloat16[Array, "n m"], BFloat16[Array, "n m"]]:
    # Not a.astype(bfloat16): XLA may take the way there and back for nothing, and low would be 0.
    high = lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (a - high).astype(jnp.bfloat16)
