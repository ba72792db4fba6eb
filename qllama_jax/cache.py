"""The KV cache: preallocated, carried through every call, written in place when donated."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from qllama_jax.cache_tiles import from_tiles, room_of, tile_width, to_tiles
from qllama_jax.calls import apart_on_a_cpu
from qllama_jax.config import ModelConfig
from qllama_jax.memory import Needs, cache_bytes, check_fits
from qllama_jax.quants import Leaf
from qllama_jax.rope import MAX_POSITIONS
from qllama_jax.sharding import Partitioning


@struct.dataclass
class KVCache:
    """Keys and values of every layer for B rows of at most S positions.

    Positions are the last axis of k and not that of v, so both products of attention are of the
    plain form [rows, inner] @ [inner, columns]: with the axes the other way round a decoding step's
    attention to 128 or 2,048 positions takes 1.5 times as long on a CPU (jax 0.10 and 0.12). Where
    all layers lie in one array, they do so in tiles of t = gcd(S, 64) positions (`cache_tiles`): a
    room of a multiple of 64 decodes fastest.

    A row whose length is above S is poisoned: something went past its end or a token was out of
    range, and every logit computed with it is NaN until the row is set back to a valid length.
    """

    k: tuple[Leaf, ...] | Leaf  # a layer: float[B, K, H, S]; stacked: float[L, B, S/t, K, H, t]
    v: tuple[Leaf, ...] | Leaf  # a layer: float[B, K, S, H]; stacked: float[L, B, S/t, K, t, H]
    lengths: Leaf  # int32[B]: filled positions a row

    @property
    def is_stacked(self) -> bool:
        """Whether all layers lie in one array, as `StackedBlocks` want them."""
        return not isinstance(self.k, tuple | list)

    @property
    def max_length(self) -> int:
        """S, the positions that a row has room for."""
        return room_of(self._values)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self._values.shape[1 if self.is_stacked else 0]

    @property
    def _values(self) -> Any:
        return self.v if self.is_stacked else self.v[0]


def buffer_shapes(
    config: ModelConfig, batch_size: int, max_length: int, *, stacked: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a layer's keys and values, or with `stacked` those of all layers."""
    B, S = batch_size, max_length
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    if not stacked:
        return (B, K, H, S), (B, K, S, H)
    width = tile_width(S)
    tiles = L, B, S // width, K
    return (*tiles, H, width), (*tiles, width, H)


def init_cache(
    config: ModelConfig,
    batch_size: int = 1,
    max_length: int = 512,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | Partitioning | None = None,
    *,
    stacked: bool = False,
) -> KVCache:
    """Return an empty cache, 2 * layers * B * K * S * H numbers.

    With `stacked`, and no mesh, all layers lie in one array, as `StackedBlocks` want them: a room
    of a multiple of 64 decodes fastest (see `KVCache`).

    On a mesh, that which the weights were loaded to (`model.params.partitioning` where they were
    with rules of their own), it is cut by kv heads and by rows; where the heads do not divide, by
    rows over the mesh axes of the heads too, if these divide.

    Raises:
        ValueError: batch_size or max_length below 1, or max_length above the 2^20 positions for
            which rotary angles are exact; a mesh with an axis that no rule names, or `stacked` too.
        OutOfMemoryError: there is no room for it. Inside a trace nothing is allocated or refused.
    """
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"init_cache: batch_size={batch_size}, max_length={max_length}: below 1")
    _check_positions(max_length)
    B, S, dtype = operator.index(batch_size), operator.index(max_length), jnp.dtype(dtype)
    if not isinstance(mesh, Mesh | Partitioning | None):
        raise TypeError(f"mesh={mesh!r}: expected a jax.sharding.Mesh or a model's partitioning")
    partitioning = Partitioning.of(mesh) if isinstance(mesh, Mesh) else mesh
    over, whole = None, None
    if partitioning is not None:
        over = partitioning.sharding(
            *partitioning.cache_axes(B, config.num_heads, config.num_kv_heads)
        )
        whole = partitioning.sharding()
    lengths = jnp.zeros((B,), jnp.int32, device=whole)
    a_position = cache_bytes(config, B, 1, dtype.itemsize, partitioning)
    what = f"init_cache: batch_size={B}, max_length={S}"
    _check_fits(what, lengths, a_position, S)
    shapes = buffer_shapes(config, B, S, stacked=stacked)
    if stacked and partitioning is not None:
        raise ValueError("init_cache: stacked, but on a mesh each layer has its own arrays")
    if stacked:
        k, v = (jnp.zeros(shape, dtype) for shape in shapes)
        return KVCache(k=k, v=v, lengths=lengths)
    # On a mesh a program would have to suit a surrounding `jax.set_mesh` too.
    zeros = _zeros if over is not None else _zeros_at_once
    k, v = zeros(shapes, config.num_layers, dtype, over)
    return KVCache(k=k, v=v, lengths=lengths)


def _zeros(
    shapes: tuple[tuple[int, ...], ...], count: int, dtype: Any, device: Any
) -> tuple[tuple[Array, ...], ...]:
    """Return `count` arrays of each shape."""
    return tuple(tuple(jnp.zeros(s, dtype, device=device) for _ in range(count)) for s in shapes)


# Made one by one the 44 arrays of 22 layers take an H100 20 ms, and a prompt of 512 tokens 9.
_zeros_at_once = jax.jit(_zeros, static_argnums=(0, 1, 2, 3))


def resize_cache(cache: KVCache, max_length: int) -> KVCache:
    """Return the cache with room for `max_length` positions a row, its contents kept.

    A poisoned row stays poisoned.

    Raises:
        ValueError: `max_length` is smaller than the room the cache has, or above 2^20.
        OutOfMemoryError: there is no room for it; inside a trace as in `init_cache`.
    """
    _check_positions(max_length)
    more = max_length - cache.max_length
    if more < 0:
        raise ValueError(f"resize_cache: max_length={max_length} < {cache.max_length}")
    buffers = jax.tree.leaves((cache.k, cache.v))
    a_position = sum(map(_device_nbytes, buffers)) // cache.max_length
    _check_fits(f"resize_cache: max_length={max_length}", buffers[0], a_position, max_length)

    def longer(buffer: Any, axis: int) -> Array:
        width = tile_width(max_length)
        if not cache.is_stacked:
            return _with_zeros(buffer, axis, more)
        if buffer.shape[axis] == width:
            return _with_zeros(buffer, -4, more // width)
        return to_tiles(_with_zeros(from_tiles(buffer, axis), axis, more), width, axis)

    return KVCache(
        k=jax.tree.map(lambda k: longer(k, -1), cache.k),
        v=jax.tree.map(lambda v: longer(v, -2), cache.v),
        lengths=jnp.where(cache.lengths > cache.max_length, max_length + 1, cache.lengths),
    )


def _with_zeros(x: Any, axis: int, count: int) -> Array:
    """Return x with so many zeros behind it along an axis."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count)
    return jnp.pad(x, padding)


def _check_fits(what: str, like: Any, a_position: int, max_length: int) -> None:
    """Refuse a cache of `a_position` bytes a position on a device; `like` is an array of it.

    A trace allocates nothing.
    """
    if _is_traced(like):
        return
    mesh = like.sharding.mesh if isinstance(like.sharding, NamedSharding) else None
    devices = mesh if isinstance(mesh, Mesh) else None
    check_fits(what, lambda n: Needs(cache=a_position * n), max_length, "max_length", devices)


def _device_nbytes(x: Any) -> int:
    """Return the bytes that one device holds of an array, or of all of it inside a trace."""
    if _is_traced(x):
        return x.nbytes
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _is_traced(x: Any) -> bool:
    return isinstance(x, Tracer) or not isinstance(x, jax.Array)


def _check_positions(max_length: int) -> None:
    if max_length > MAX_POSITIONS:
        raise ValueError(f"max_length={max_length}: rotary angles are exact up to {MAX_POSITIONS}")


def write(
    buffer: Float[Array, "L B tiles K X Y"] | Float[Array, "B K X Y"],
    new: Float[Array, "B K X2 Y2"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    *layer: Int32[Array, ""],
    axis: int,
) -> Array:
    """Write new[b, :, :count[b]] at position start[b] of each row (positions lie along `axis`).

    The buffer is a layer's, or those of all layers, in tiles, and `layer` the number of the one.

    Nothing else changes: columns of `new` past count[b] are padding and are never stored, and there
    may be more of them than the row has room for. Needs start[b] + count[b] <= S. Rows are written
    one by one: a vmapped dynamic_update_slice would become a scatter, which copies.
    """
    return _write_rows(buffer, new, start, count, *layer, axis=axis % 4 - 4)


def _one_by_one(
    buffer: Array, new: Array, start: Array, count: Array, *layer: Array, axis: int
) -> Array:
    for b in range(start.size):
        row = lax.slice_in_dim(new, b, b + 1, axis=0)
        where = (*layer, np.int32(b))
        write_one = _write_to_tiles if layer else _write_row
        buffer = write_one(buffer, row, where, start[b], count[b], axis)
    return buffer


# Inlined on a CPU it is fused with each reader of the cache, and writes once more for it into a
# copy: jax 0.10 copied the keys and values of a layer three times a step.
_write_rows = apart_on_a_cpu(_one_by_one, static_argnames=("axis",))


def _write_to_tiles(
    tiles: Array, new: Array, row: tuple, start: Array, count: Array, axis: int
) -> Array:
    """Write as `_write_row` does, to those tiles alone in which T positions can lie."""
    n, width, T = tiles.shape[2], tiles.shape[axis], new.shape[axis]
    zero = np.int32(0)
    if T == 1:
        at = jnp.minimum(start, n * width - 1)
        column: list[Any] = [*row, at // width, zero, zero, zero]
        column[axis] = at % width
        new = new[None, None].astype(tiles.dtype)
        old = lax.dynamic_slice(tiles, column, new.shape)
        fresh = (start == at) & (count > 0)
        return lax.dynamic_update_slice(tiles, jnp.where(fresh, new, old), column)
    touched = min(n, -(-(T - 1) // width) + 1)
    first = jnp.minimum(start // width, n - touched)
    where = (*row, first, zero, zero, zero)
    window = lax.dynamic_slice(tiles, where, (1, 1, touched, *tiles.shape[3:]))[0]
    window = from_tiles(window, axis)
    window = _write_row(window, new, (zero,), start - first * width, count, axis)
    return lax.dynamic_update_slice(tiles, to_tiles(window, width, axis)[None], where)


def _write_row(
    buffer: Array, new: Array, row: tuple, start: Array, count: Array, axis: int
) -> Array:
    S = buffer.shape[axis]
    T = min(new.shape[axis], S)
    new = lax.slice_in_dim(new, 0, T, axis=axis)  # what lies past S is padding
    # dynamic_update_slice moves a window that sticks out past the end: move it here, knowingly,
    # and shift the contents back by as much.
    at = jnp.minimum(start, S - T)
    shift = start - at
    where: list[Any] = [*row, *[np.int32(0)] * 3]
    where[axis] = at
    old = lax.dynamic_slice(buffer, where, new.shape)
    index = lax.broadcasted_iota(jnp.int32, new.shape, new.ndim + axis) - shift
    fresh: Bool[Array, "*1 K X Z"] = (index >= 0) & (index < count)
    if T > 1:
        new = jnp.roll(new, shift, axis)
    return lax.dynamic_update_slice(buffer, jnp.where(fresh, new.astype(buffer.dtype), old), where)
