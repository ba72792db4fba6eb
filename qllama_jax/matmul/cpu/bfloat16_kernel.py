"""x @ w.T as two products of bfloat16, for many rows of x on a CPU that has a unit for these.

What x is rounded to are numbers of bfloat16, and a weight is split into two of these, which keep 16
of float32's 24 bits (Henry, Tang and Heinecke 2019, arXiv:1904.06376, who split both factors; XLA
has that as BF16_BF16_F32_X3, which on a CPU it computes in float32). A residual is more rows of x.

512 rows times Q4_0 [4096, 2048]: 16.6 ms so, 37 by tiles in float32, 51 by the integer kernel; 128
rows: 6.9, 15.3 and 13.6 ms (jax 0.12, two cores of an Intel Xeon with AMX; before dequantized tiles
were wide ones, see `CPUWeight.slice_rows`). The error is 5e-6 of the result, 9e-6 with a residual,
where the rounding of x makes a thousand times that.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, UInt32

from qllama_jax.matmul import xla
from qllama_jax.matmul.cpu import rounding, tiles
from qllama_jax.matmul.cpu.weight import CPUWeight


def multiply(x: Float[Array, "B in"], w: CPUWeight, with_residual: bool) -> Float32[Array, "B out"]:
    """Compute x' @ w.dequantize().T, x' = x as `rounding.round_activations` rounds it.

    To 2^-16 of sum |x'| |w| at the worst, but for float32's sums. A residual is rounded once more,
    to bfloat16: by up to 2^-10 of a step.
    """
    B, _ = x.shape
    parts = rounding.rounded_parts(x, w.layout, with_residual)
    rows = jnp.concatenate(parts).astype(jnp.bfloat16)

    def product(_: Array, dense: Float32[Array, "in tile"]) -> Float32[Array, "B tile"]:
        high, low = _halves(dense)
        y = xla.dot(rows, high) + xla.dot(rows, low)
        return y[:B] + y[B:] if with_residual else y

    return tiles.by_tiles(x, w, product)


def _halves(a: Float32[Array, "n m"]) -> tuple[BFloat16[Array, "n m"], BFloat16[Array, "n m"]]:
    """Return high, the first 8 bits of each number, and low, what is left rounded to 8 bits.

    In integers: with XLA's own conversions a product takes 1.2 times as long for 128 rows of x.
    High is not rounded, as the integers of some NaN would be rounded to a number.
    """
    high = lax.bitcast_convert_type(a, jnp.uint32) & np.uint32(0xFFFF0000)
    low = lax.bitcast_convert_type(a - lax.bitcast_convert_type(high, jnp.float32), jnp.uint32)
    # To the nearest, of two that are as near to the even one. Where high is not finite, low may be
    # anything.
    low = low + np.uint32(0x7FFF) + ((low >> np.uint32(16)) & np.uint32(1))
    return _first_16_bits(high), _first_16_bits(low)


def _first_16_bits(bits: UInt32[Array, "n m"]) -> BFloat16[Array, "n m"]:
    first = (bits >> np.uint32(16)).astype(jnp.uint16)
    return lax.bitcast_convert_type(first, jnp.bfloat16)
