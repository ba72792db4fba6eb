"""Grouped-query attention to the keys and values of the cache.

Dimensions: B rows, T query positions, S key positions, N query heads, K kv heads, G = N // K query
heads a kv head, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax import cache_tiles
from qllama_jax.cache import write
from qllama_jax.cache_tiles import Keys, Values, room_of
from qllama_jax.matmul import xla
from qllama_jax.sharding import Partitioning, spec
from qllama_jax.softmax_sums import MASKED, Sums, over_blocks
from qllama_jax.tiled_attention import attend_to_tiles

# Queries and keys that meet at a time. On a CPU 2,048 queries and keys of 32 heads of 64 take 0.31
# s of one core so, 0.34 to 0.43 s with larger or smaller blocks, 1.9 s with all keys at once.
QUERY_BLOCK = 128
KEY_BLOCK = 128
# A GPU starts some kernels for each block, in microseconds each: larger ones. Not tuned.
GPU_QUERY_BLOCK = 512
GPU_KEY_BLOCK = 512
# For a query a row, to a layer's own cache.
STEP_KEY_BLOCK = 256


def store_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    k_cache: Keys,
    v_cache: Values,
    positions: Int32[Array, "B T"],
    count: Int32[Array, " B"],
    *layer: Int32[Array, ""],
    partitioning: Partitioning | None = None,
) -> tuple[Float[Array, "B T N H"], Array, Array]:
    """Write k and v to the cache and attend to it: what q finds, and both buffers.

    The buffers are a layer's, or those of all layers, in tiles, and `layer` the number of the one.
    (It goes by position, as arrays do in a call that is `apart_on_a_cpu`.) On a mesh each
    device does so for its own rows and heads.
    """
    if partitioning is not None:
        assert not layer  # there are no stacks on a mesh
        B, _, N, _ = q.shape
        rows, heads = partitioning.cache_axes(B, N, k.shape[2])
        by_head, buffer, by_row = spec(rows, (), heads), spec(rows, heads), spec(rows)
        in_specs = (by_head, by_head, by_head, buffer, buffer, by_row, by_row)
        arguments = (q, k, v, k_cache, v_cache, positions, count)
        return partitioning.call(store_and_attend, in_specs, (by_head, buffer, buffer), *arguments)
    start = positions[:, 0]
    k_cache = write(k_cache, k.transpose(0, 2, 3, 1), start, count, *layer, axis=3)
    v_cache = write(v_cache, v.transpose(0, 2, 1, 3), start, count, *layer, axis=2)
    return attention(q, k_cache, v_cache, positions, *layer), k_cache, v_cache


def attention(
    q: Float[Array, "B T N H"],
    k: Keys,
    v: Values,
    positions: Int32[Array, "B T"],
    *layer: Int32[Array, ""],
) -> Float[Array, "B T N H"]:
    """Compute softmax(q k^T / sqrt(H)) v over the keys at positions up to each query's own.

    The softmax is in float32; kv head n // G serves query head n. k and v are a layer's, or those
    of all layers, in tiles, and `layer` the number of the one.
    """
    B, T, N, H = q.shape
    K = v.shape[-3]
    q = (q * np.asarray(H**-0.5, q.dtype)).reshape(B, T, K, N // K, H)
    if T == 1 and layer:
        out = attend_to_tiles(q[:, 0], k, v, positions, *layer)
        return out.reshape(B, T, N, H)
    if T == 1:
        return _one_query(q[:, 0], k, v, positions).reshape(B, T, N, H)
    if layer:
        blocks = {"query_block": QUERY_BLOCK, "key_block": KEY_BLOCK, "skip_unseen": True}
        return _in_chunks(q, k, v, positions, *layer, **blocks)
    return _by_platform(
        functools.partial(
            _in_chunks, query_block=QUERY_BLOCK, key_block=KEY_BLOCK, skip_unseen=True
        ),
        functools.partial(
            _in_chunks, query_block=GPU_QUERY_BLOCK, key_block=GPU_KEY_BLOCK, skip_unseen=False
        ),
        (q, k, v, positions),
    )


def _in_chunks(
    q: Float[Array, "B T K G H"],
    k: Keys,
    v: Values,
    positions: Int32[Array, "B T"],
    *layer: Int32[Array, ""],
    query_block: int,
    key_block: int,
    skip_unseen: bool,
) -> Float[Array, "B T N H"]:
    """Attend with a block of queries at a time, each to a block of keys at a time."""
    B, T, K, G, H = q.shape
    size = min(T, query_block)
    chunks = -(-T // size)
    more = chunks * size - T  # queries that fill up the last chunk; they see the first key
    q = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, more)))
    # [chunks, B, K, G, size, H]: a product a kv head, with all of its queries as rows
    q = q.reshape(B, chunks, size, K, G, H).transpose(1, 0, 3, 4, 2, 5)
    positions = positions.reshape(B, chunks, size).swapaxes(0, 1)

    def attend(part: tuple[Array, Array]) -> Array:
        return _in_blocks(part[0], k, v, part[1], key_block, skip_unseen=skip_unseen, layer=layer)

    out = attend((q[0], positions[0]))[None] if chunks == 1 else lax.map(attend, (q, positions))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, chunks * size, K * G, H)[:, :T]


def _one_query(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    positions: Int32[Array, "B 1"],
) -> Float[Array, "B K G H"]:
    """Attend in a time that follows what is filled, not the room that there is, but on a GPU."""
    S = v.shape[-2]
    if S <= 2 * STEP_KEY_BLOCK:
        return _at_once(q, k, v, positions)

    def as_filled(*arguments: Array) -> Array:
        mostly = arguments[3].max() >= S // 2
        return lax.cond(mostly, _at_once, _one_query_in_blocks, *arguments)

    return _by_platform(as_filled, _at_once, (q, k, v, positions))


def _one_query_in_blocks(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    positions: Int32[Array, "B 1"],
) -> Float[Array, "B K G H"]:
    out = _in_blocks(q[:, :, :, None], k, v, positions, STEP_KEY_BLOCK, skip_unseen=True)
    return out[:, :, :, 0]


def _by_platform(
    elsewhere: Callable[..., Array], on_a_gpu: Callable[..., Array], arguments: tuple[Array, ...]
) -> Array:
    """Call the one for the platform that the trace is lowered for.

    On a GPU the host decides at every branch, and has to wait for the device.
    """
    call = functools.partial(
        lax.platform_dependent, cuda=on_a_gpu, rocm=on_a_gpu, default=elsewhere
    )
    # A gradient would keep what either needs, zeros for the one that is not lowered.
    return jax.checkpoint(call)(*arguments)


def _at_once(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    positions: Int32[Array, "B 1"],
) -> Float[Array, "B K G H"]:
    scores = _dot("BKGH,BKHS->BKGS", q, k.astype(q.dtype))
    index = lax.broadcasted_iota(jnp.int32, (1, 1, 1, v.shape[-2]), 3)
    scores = jnp.where(index <= positions[:, :, None, None], scores, MASKED)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(largest > MASKED, largest, np.float32(np.nan)))
    total = weights.sum(axis=-1, keepdims=True)
    out = _dot("BKGS,BKSH->BKGH", weights.astype(q.dtype), v.astype(q.dtype))
    return (out / total).astype(q.dtype)


def _in_blocks(
    q: Float[Array, "B K G T H"],
    k: Keys,
    v: Values,
    positions: Int32[Array, "B T"],
    block_size: int,
    *,
    skip_unseen: bool,
    layer: tuple[Int32[Array, ""], ...] = (),
) -> Float[Array, "B K G T H"]:
    """Attend to a block of keys at a time.

    With `skip_unseen` blocks that no query sees are not looked at.
    """
    B, K, G, T, H = q.shape
    S = room_of(v)
    rows = q.reshape(B, K, G * T, H)
    size = min(S, block_size)

    def add(sums: Sums, block: Int32[Array, ""]) -> Sums:
        # Where `size` does not divide S, the last block starts earlier and repeats some keys.
        start = jnp.minimum(block * size, S - size)
        keys, values = _positions(k, v, layer, start, size)
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        scores = _dot("BKRH,BKHS->BKRS", rows, keys)
        index = start + lax.broadcasted_iota(jnp.int32, (1, 1, size), 2)
        visible = (index <= positions[:, :, None]) & (index >= block * size)
        scores = jnp.where(visible[:, None, None], scores.reshape(B, K, G, T, size), MASKED)
        scores = scores.reshape(B, K, G * T, size)
        largest = jnp.maximum(sums.largest, scores.max(-1))
        weights = jnp.exp(scores - largest[..., None])
        old = jnp.exp(sums.largest - largest)
        out = _dot("BKRS,BKSH->BKRH", weights.astype(q.dtype), values)
        return Sums(largest, old * sums.total + weights.sum(-1), old[..., None] * sums.out + out)

    def seen(block: Int32[Array, ""]) -> Array:
        return block * size <= positions.max()

    some = seen if skip_unseen else None
    sums = over_blocks(add, -(-S // size), (B, K, G * T, H), some, q, k, v, positions)
    return sums.mean.astype(q.dtype).reshape(q.shape)


def _positions(
    k: Keys,
    v: Values,
    layer: tuple[Int32[Array, ""], ...],
    start: Int32[Array, ""],
    size: int,
) -> tuple[Float[Array, "B K H size"], Float[Array, "B K size H"]]:
    """Return keys and values at `size` positions from `start` on, of a layer or out of a stack."""
    if not layer:
        keys = lax.dynamic_slice_in_dim(k, start, size, axis=3)
        return keys, lax.dynamic_slice_in_dim(v, start, size, axis=2)
    keys = cache_tiles.positions(k, layer[0], start, size, axis=-1)
    return keys, cache_tiles.positions(v, layer[0], start, size, axis=-2)


def _dot(spec: str, a: Float[Array, ...], b: Float[Array, ...]) -> Float32[Array, ...]:
    precision = xla.precision(a.dtype)
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
