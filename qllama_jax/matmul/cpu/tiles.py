"""x @ w.T by dequantized tiles, for many rows of x: XLA's own products of matrices are the fastest.

Billion operations a second of 128 rows of x and of 512, times Q4_0 [5632, 2048]: by tiles in
float32 165 and 185, in bfloat16 275 and 360, by the integer kernel 200 and 180 (jax 0.12, two cores
of an EPYC Genoa).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qllama_jax.matmul import xla
from qllama_jax.matmul.cpu.weight import LANES, CPUWeight

# XLA multiplies by tiles of its own: with 192 or 384 rows of a weight at 0.75 to 0.95 of the speed
# that it has with 256 or 512, and with 1,024, which leave the caches, at 0.9.
TILE_ROWS = 512
TILE_UNIT = 128
TILE_VALUES = 2**21
# Rows of a weight from which on tiles of whole units repeat few of them.
MANY_ROWS = 1024


def by_tiles(
    x: Float[Array, "B in"],
    w: CPUWeight,
    product: Callable[[Array, Array], Array] = xla.dot,
) -> Float32[Array, "B out"]:
    """Compute x @ w.dequantize().T; `product` multiplies x with a tile, float32 `[in, tile]`.

    Without one in the dtype of x: of bfloat16, for which a weight is rounded too.
    """
    size = tile_rows(w.padded, w.shape[-1])
    y = xla.by_tiles(x, w, jnp.int32(0), w.padded, size=size, product=product)
    return y[:, : w.out]


def tile_rows(rows: int, width: int) -> int:
    """Return how many of a weight's rows are dequantized at once."""
    unit = TILE_UNIT if rows >= MANY_ROWS else LANES
    return xla.tile_rows(rows, width, min(TILE_VALUES, TILE_ROWS * width), unit)
