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
from qllama_jax.matmul.cpu.weight import CPUWeight

# XLA multiplies by tiles of its own: with 192 or 384 rows of a weight at 0.75 to 0.95 of the speed
# that it has with 256 or 512, and with 1,024, which leave the caches, at 0.9. So a tile is of whole
# units, where a weight has so many rows that the last one repeats few of them.
UNIT = 128
MANY_ROWS = 1024
MOST_ROWS = 512
MOST_VALUES = 2**21  # of several units
# A tile takes as long to begin and to end as about so many of its rows: 128 rows times Q4_0
# [5632, 2048] take 12.6 ms in tiles of 128 and 10.8 of 256, 80 us for each that is more.
ROWS_OF_OVERHEAD = 32


def by_tiles(
    x: Float[Array, "B in"],
    w: CPUWeight,
    product: Callable[[Array, Array], Array] = xla.dot,
) -> Float32[Array, "B out"]:
    """Compute x @ w.dequantize().T; `product` multiplies x with a tile, float32 `[in, tile]`.

    `xla.dot` does in the dtype of x: where that is bfloat16, it rounds the tile to it too.
    """
    size = tile_rows(w.padded, w.shape[-1], w.words.shape[-1])
    y = xla.by_tiles(x, w, jnp.int32(0), w.padded, size=size, product=product)
    return y[:, : w.out]


def tile_rows(rows: int, width: int, lanes: int) -> int:
    """Return how many of a weight's rows, a multiple of `lanes`, are dequantized at once."""
    unit = UNIT if rows >= MANY_ROWS else lanes
    # Two tiles at least, see `xla.tile_rows`.
    most = min(MOST_ROWS, MOST_VALUES // width, -(-rows // 2) + unit - 1) // unit
    sizes = [unit * n for n in range(max(1, most), 0, -1)]
    return min(sizes, key=lambda size: -(-rows // size) * (size + ROWS_OF_OVERHEAD))
