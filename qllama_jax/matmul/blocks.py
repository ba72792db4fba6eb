"""Products with the blocks of a file, in the form that each of XLA's compilers makes most of.

A trace knows no device, so it holds every form, and what is lowered is that of the platform. A
hand-written kernel is none of these: it is a packing, chosen at load, with a file of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.matmul import xla
from qllama_jax.quants import Block

# A GPU takes up to so many rows one by one, all of them in one pass over the weight.
FEW_ROWS = 8

# Formats that take so many operations to dequantize that XLA's GPU compiler would do it once for
# all of these rows and write the dense weight to memory: they are dequantized for each row anew.
APART = frozenset(
    {"IQ4_XS", "MXFP4", "NVFP4", "Q8_0 (GGJT v2)"}
    | {f"{name} (GGJT v{version})" for name in ("Q4_0", "Q4_1") for version in (1, 2)}
)

# Rows of the smallest product that XLA gives a TPU's matrix unit; a smaller one it sums up lane by
# lane, in a time that grows with the rows.
MATRIX_UNIT_ROWS = 8

# A TPU has so many numbers side by side: the blocks of a row, where a block has fewer fields.
LANES = 128

# Bytes that a TPU and, for many rows, a GPU dequantize at once, in the dtype of x: the one's vector
# memory and an H100's cache hold them. (What has 64 MiB XLA writes to a v6e's main memory.)
TILE_BYTES = 2**25

# On a TPU of formats whose numbers are looked up in a table: what a lookup returns, a few numbers,
# it pads to whole lanes, up to 64 times as much. IQ4_XS, 4096 x 4096 in bfloat16 on a v5e: 5 GiB of
# temporaries and 40 million cycles at once, none and 20 in tiles of this size.
LOOKED_UP_TILE_BYTES: dict[str, int] = {
    **dict.fromkeys(("IQ4_XS", "IQ4_NL", "MXFP4", "NVFP4"), 2**19),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), 2**21),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul_blocks(
    x: Float[Array, "*batch in"], w: Block, first: Int32[Array, ""] | None, count: int
) -> Float[Array, "*batch out"]:
    """Compute x @ w.dequantize()[first : first + count].T; first = None: of all rows.

    Differentiable with respect to x alone; packed leaves have no gradient.
    """
    *batch, width = x.shape
    rows = x.reshape(-1, width)
    few = 0 < rows.shape[0] <= FEW_ROWS
    y = lax.platform_dependent(
        rows,
        w,
        first,
        cpu=functools.partial(by_tiles, count=count),
        tpu=functools.partial(by_padded_tiles, count=count),
        default=functools.partial(row_by_row, count=count)
        if few
        else functools.partial(by_large_tiles, count=count),
    )
    return y.reshape(*batch, count).astype(x.dtype)


def _forward(
    x: Array, w: Block, first: Array | None, count: int
) -> tuple[Array, tuple[Block, Array | None]]:
    return matmul_blocks(x, w, first, count), (w, first)


def _backward(
    count: int, residuals: tuple[Block, Array | None], dy: Float[Array, "*batch out"]
) -> tuple[Array, None, None]:
    w, first = residuals
    return xla.pull_back(dy, w, _start(first), count), None, None


matmul_blocks.defvjp(_forward, _backward)


def _start(first: Array | None) -> Array:
    return jnp.int32(0) if first is None else first


def by_tiles(
    x: Float[Array, "B in"], w: Block, first: Array | None, count: int
) -> Float32[Array, "B out"]:
    """Multiply a tile of rows at a time."""
    return xla.by_tiles(x, w, _start(first), count)


def _as_it_is(rows: Float[Array, "n in"]) -> Float[Array, "n in"]:
    return rows


def by_large_tiles(
    x: Float[Array, "B in"],
    w: Block,
    first: Array | None,
    count: int,
    order: Callable[[Array], Array] = _as_it_is,
    tile_bytes: int | None = None,
) -> Float32[Array, "B out"]:
    """Multiply all rows at once where they are one tile, else a tile at a time.

    A loop is six kernels a tile on a GPU (H100, a prompt of 512 tokens in Q4_K_M: 12,600 tokens a
    second in tiles of 8 MiB, 17,700 so), and keeps a TPU from fusing what dequantizes with what
    multiplies. `order` is that in which the values of a row of x and of w meet; a tile has at most
    `tile_bytes`, None: TILE_BYTES.
    """

    def dequantize(tile: Block) -> Float32[Array, "in tile"]:
        return order(tile.dequantize()).T

    tile_values = (tile_bytes or TILE_BYTES) // x.dtype.itemsize
    if count * w.shape[-1] > tile_values:
        size = xla.tile_rows(count, w.shape[-1], tile_values)
        return xla.by_tiles(order(x), w, _start(first), count, size=size, dequantize=dequantize)
    part = w if first is None else w.slice_rows(first, count)
    # The barrier holds x too: what waits for nothing may be made dense long before its turn.
    part, x = lax.optimization_barrier((part, x))
    return xla.dot(order(x), dequantize(part))


def row_by_row(
    x: Float[Array, "B in"], w: Block, first: Array | None, count: int
) -> Float32[Array, "B out"]:
    """Sum w x over a row of w for each row of x, which XLA fuses into one reading of the blocks.

    For a product of matrices its GPU compiler writes the dense weight to memory first, whatever
    the number of rows, unless they are one.
    """
    part = w if first is None else w.slice_rows(first, count)

    def times(row: Float32[Array, " in"]) -> Float32[Array, " out"]:
        blocks = part
        if w.qtype.name in APART:
            # The barrier holds the row too: what does not depend on one XLA computes once for all.
            blocks, row = lax.optimization_barrier((part, row))
        return jnp.sum(blocks.dequantize().astype(x.dtype).astype(jnp.float32) * row[None], axis=-1)

    return jnp.stack([times(row) for row in x.astype(jnp.float32)])


def by_padded_tiles(
    x: Float[Array, "B in"], w: Block, first: Array | None, count: int
) -> Float32[Array, "B out"]:
    """Multiply by large tiles on the matrix unit, with rows of zeros where x has few."""
    B, _ = x.shape
    padded = jnp.pad(x, ((0, max(0, MATRIX_UNIT_ROWS - B)), (0, 0)))
    # To take the inner axis in the order in which it lies spares a transposition of the weight.
    order = functools.partial(_values_first, block_size=w.block_size)
    order = order if w.block_size < LANES else _as_it_is
    tile_bytes = LOOKED_UP_TILE_BYTES.get(w.qtype.name)
    return by_large_tiles(padded, w, first, count, order, tile_bytes)[:B]


def _values_first(rows: Float[Array, "n in"], block_size: int) -> Float[Array, "n in"]:
    """Return rows of blocks as rows of the blocks' first values, then of their second ones, ..."""
    n, width = rows.shape
    return rows.reshape(n, width // block_size, block_size).swapaxes(1, 2).reshape(n, width)
