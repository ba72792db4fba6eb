"""The portable implementation, and the definition of what every other one computes.

The weight is dequantized a tile of rows at a time inside a rolled loop, so the dense copy that
lives at any moment is one tile, whatever the size of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.carries import varying

# Values of a dequantized tile: 2 MiB of float32. On a CPU a prompt of 512 tokens takes 2 % (Q4_0)
# to 12 % (Q4_K_M) less than with half of that, and 3 % less than with twice as much.
TILE_VALUES = 2**19

# The rounding group of "int8" and "int8x2" activations, as ggml's block_q8_0.
GROUP = 32


@runtime_checkable
class Rows(Protocol):
    """A packed weight `[out, in]` of which a tile of rows can be taken and dequantized."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        ...

    def slice_rows(self, start: Array, count: int) -> Rows:
        """Return `count` rows from row `start`, which may be traced."""
        ...

    def dequantize_transposed(self) -> Float32[Array, "in out"]:
        """Return the values, rows as columns."""
        ...


def dequantize_transposed(w: Rows) -> Float32[Array, "in out"]:
    """Return the values, rows as columns."""
    return w.dequantize_transposed()


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Keep float32 products in float32 where the hardware would round them (TF32, bfloat16)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float32[Array, "n m"]:
    """Compute a @ b in the dtype of a, summed in float32."""
    return jnp.dot(
        a, b.astype(a.dtype), precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


def round_activations(x: Float[Array, "*batch in"], activations: str) -> Float[Array, "*batch in"]:
    """Return x as the integer kernels see it: d q ("int8") or d (q + r / 254) ("int8x2").

    d is the largest magnitude of each GROUP values over 127; q and r are integers in -127..127.
    """
    if activations not in ("int8", "int8x2"):
        return x
    *batch, width = x.shape
    groups = x.astype(jnp.float32).reshape(*batch, width // GROUP, GROUP)
    d = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) * np.float32(1 / 127)
    inverse = jnp.where(d > 0, 1 / jnp.where(d > 0, d, 1), 0)
    scaled = groups * inverse
    q = jnp.round(scaled)
    if activations == "int8x2":
        q = q + jnp.round((scaled - q) * 254) * np.float32(1 / 254)
    rounded = (d * q).reshape(x.shape).astype(x.dtype)
    # The gradient passes straight through: that of rounding is zero everywhere.
    return lax.stop_gradient(rounded) + (x - lax.stop_gradient(x))


def by_tiles(
    x: Float[Array, "n in"],
    w: Rows,
    first: Int32[Array, ""],
    count: int,
    *,
    size: int | None = None,
    dequantize: Callable[[Any], Array] = dequantize_transposed,
    product: Callable[[Array, Array], Array] = dot,
) -> Float32[Array, "n out"]:
    """Compute x @ w.dequantize()[first : first + count].T in a rolled loop; no gradient.

    A tile is of `size` rows; None: of as many as TILE_VALUES are. `dequantize` returns them
    `[in, tile]`, in the order in which x has them, and `product` multiplies x with them.
    """

    def write_tile(tile: Tile, y: Array) -> Array:
        part = product(x, tile.dense)
        return lax.dynamic_update_slice(y, part, (np.int32(0), tile.start))

    init = varying(jnp.zeros((x.shape[0], count), jnp.float32), x, w, first)
    return _over_tiles(w, first, count, write_tile, init, size, dequantize)


def pull_back(
    dy: Float[Array, "*batch out"],
    w: Rows,
    first: Int32[Array, ""],
    count: int,
    *,
    size: int | None = None,
) -> Float[Array, "*batch in"]:
    """Compute dy @ w.dequantize()[first : first + count], a tile at a time: the gradient to x.

    It dequantizes the tiles again, so that no forward pass keeps a dense weight. `size` is as in
    `by_tiles`.
    """
    *batch, _ = dy.shape
    rows = dy.reshape(-1, count)
    _, width = w.shape

    def add_tile(tile: Tile, dx: Array) -> Array:
        slab = lax.dynamic_slice_in_dim(rows, tile.start, tile.fresh.size, axis=1)
        return dx + dot(jnp.where(tile.fresh[None], slab, 0), tile.dense.T)

    init = varying(jnp.zeros((rows.shape[0], width), jnp.float32), rows, w, first)
    dx = _over_tiles(w, first, count, add_tile, init, size)
    return dx.reshape(*batch, width).astype(dy.dtype)


def tile_rows(count: int, width: int, tile_values: int) -> int:
    """Return how many of `count` rows of `width` values are dequantized at once."""
    # Two tiles at least: a loop of one trip is inlined, and a dequantization without an input to
    # wait for is live in many layers at once. SmolLM2's generation: 10 MB of temporaries, not 35.
    most = max(1, min(-(-count // 2), tile_values // width))
    # Of one size, as far as possible, so that the last tile repeats few rows.
    tiles = -(-count // most)
    return -(-count // tiles)


class Tile(NamedTuple):
    """Some consecutive rows of those that are multiplied."""

    start: Array  # int32: the first of them
    fresh: Array  # bool[tile]: False for rows that the tile before held already
    dense: Array  # float32[in, tile]


def _over_tiles(
    w: Rows,
    first: Array,
    count: int,
    visit: Callable[[Tile, Array], Array],
    init: Array,
    size: int | None = None,
    dequantize: Callable[[Any], Array] = dequantize_transposed,
) -> Array:
    """Fold `visit(tile, carry)` over all tiles of the rows first .. first + count - 1 of w."""
    _, width = w.shape
    size = tile_rows(count, width, TILE_VALUES) if size is None else size

    def body(i: Array, carry: Array) -> Array:
        i = i.astype(jnp.int32)  # int64 where jax_enable_x64 is set
        # Where `size` does not divide `count` the last tile starts earlier and repeats some rows.
        start = jnp.minimum(i * size, count - size)
        fresh = start + np.arange(size, dtype=np.int32) >= i * size
        # A slice fused into the arithmetic would turn XLA's CPU code for it scalar.
        packed = lax.optimization_barrier(w.slice_rows(first + start, size))
        return visit(Tile(start, fresh, dequantize(packed)), carry)

    return lax.fori_loop(0, -(-count // size), body, init)
