"""A step's attention to keys and values of a stack of layers, which it reads where they lie.

XLA's products of matrices on a CPU take no part of an array: a layer's keys and values would be
copied out of the stack for them, in two thirds of the time that attention takes. The sums here are
loops of one kernel each, over a number of a key, or a position, a term. 32 heads of 64 on 4 kv
heads, a layer of 22, least times in us of the copies and products, and of this (jax 0.12, two cores
of an EPYC Turin; in brackets with AVX2 alone):

    filled, of   120, 128   250, 256   500, 512   2,200, 4,096
    copied       30 (33)    45 (50)    69 (63)    279 (282)
    float32      22 (34)    35 (47)    56 (75)    212 (291)
    float16      23 (28)    32 (43)    50 (69)    170 (255)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.cache_tiles import TILE
from qllama_jax.matmul.cpu.fence import fence_for
from qllama_jax.softmax_sums import MASKED, Sums, over_blocks

# Sums of one chain of additions wait for each of them: 228 us in 1, 185 in 8 (2,560 positions in
# float16, as above).
CHAINS = 8
# A smaller room is looked at all at once.
SMALLEST_HALVED = 256
# Half of a larger room, and less, is looked at in blocks.
MOST_IN_ONE_PIECE = 512
# A larger room is looked at in blocks however much is filled: its scores would be large.
MOST_AT_ONCE = 8192
LARGEST_BLOCK = 2048


class _Heads(NamedTuple):
    q: Float[Array, "heads H"]
    first: Int32[Array, " heads"]  # the number of its first tile among all
    last: Int32[Array, " heads"]  # position that the query sees


def attend_to_tiles(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "L B tiles K H width"],
    values: Float[Array, "L B tiles K width H"],
    positions: Int32[Array, "B 1"],
    layer: Int32[Array, ""],
) -> Float[Array, "B K G H"]:
    """Compute softmax(q k^T) v over the keys at positions up to each row's own.

    In a time that follows what is filled, not the room that there is.
    """
    B, K, G, H = q.shape
    n, width = keys.shape[2], keys.shape[-1]
    room = n * width
    # The rows' first tiles of each kv head, numbered among those of all layers, rows and heads.
    first = (layer * np.int32(B) + np.arange(B, dtype=np.int32)) * np.int32(n * K)
    first = jnp.repeat(first[:, None] + np.arange(K, dtype=np.int32)[None], G)
    heads = _Heads(q.reshape(B * K * G, H), first, jnp.repeat(positions[:, 0], K * G))

    def at_once(length: int, heads: _Heads, keys: Array, values: Array) -> Sums:
        return _sums(heads, keys, values, np.int32(0), np.int32(0), length=length)

    def in_blocks(heads: _Heads, keys: Array, values: Array) -> Sums:
        size = block_size(room)

        def add(sums: Sums, block: Array) -> Sums:
            # Where `size` does not divide the room, the last block starts earlier and repeats some.
            begin = block * np.int32(size)
            start = jnp.minimum(begin, np.int32(room - size))
            return _merge(sums, _sums(heads, keys, values, start, begin, length=size))

        def seen(block: Array) -> Array:
            return block * np.int32(size) <= heads.last.max()

        return over_blocks(add, -(-room // size), heads.q.shape, seen, heads, keys, values)

    lengths = lengths_at_once(room)
    branches: list[Callable[..., Sums]] = [functools.partial(at_once, n) for n in lengths]
    ends = lengths[:-1]  # of all branches but the last
    if room > MOST_IN_ONE_PIECE:
        branches, ends = [in_blocks, *branches], [room // 2, *ends] if lengths else []
    passed = ((positions.max() >= end).astype(jnp.int32) for end in ends)
    choice = functools.reduce(lax.add, passed, jnp.int32(0))
    sums = lax.switch(choice, branches, heads, keys, values)
    return sums.mean.astype(q.dtype).reshape(B, K, G, H)


def lengths_at_once(room: int) -> list[int]:
    """Return of how many first positions a step looks at the least that hold what is filled.

    In a room of more than MOST_IN_ONE_PIECE at most a fifth and two tiles in vain; half of it and
    less is looked at in blocks. XLA compiles a branch for each, in some 0.2 s and 15 to 40 MB.
    """
    if room <= MOST_IN_ONE_PIECE:
        half = room // 2 // TILE * TILE
        return [half, room] if room >= SMALLEST_HALVED else [room]
    if room > MOST_AT_ONCE:
        return []
    lengths = {int(room / 2 * 2 ** (i / 4)) // TILE * TILE for i in (1, 2, 3)}
    return sorted({n for n in lengths if 2 * n > room} | {room})


def block_size(room: int) -> int:
    """Return how many positions a step looks at at a time where it does so in blocks."""
    return min(max(MOST_IN_ONE_PIECE, room // 8 // TILE * TILE), LARGEST_BLOCK)


def _sums(
    heads: _Heads,
    keys: Float[Array, "L B tiles K H width"],
    values: Float[Array, "L B tiles K width H"],
    start: Int32[Array | np.int32, ""],
    begin: Int32[Array | np.int32, ""],
    *,
    length: int,
) -> Sums:
    """Sum over `length` positions from `start` on that are not below `begin` nor above `last`.

    `start` and `length` are multiples of the tiles' width.
    """
    (*_, K, H, width), fence = keys.shape, fence_for(heads.q)
    tiles = length // width
    # By row numbers a loop reads out of an array what XLA would store as a slice of it first.
    numbers = start // np.int32(width) + np.arange(tiles, dtype=np.int32)
    rows = fence(heads.first[None] + numbers[:, None] * np.int32(K))
    keys, values = keys.reshape(-1, H, width), values.reshape(-1, width, H)
    q = fence(heads.q.astype(jnp.float32))

    def of_heads(part: Float[Array, "all lanes"]) -> Float32[Array, "tiles heads lanes"]:
        found = part.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return found.astype(jnp.float32)

    scores = _add([of_heads(keys[:, h]) * q[None, :, h, None] for h in range(H)])
    index = start + lax.broadcasted_iota(jnp.int32, scores.shape, 0) * np.int32(width)
    index += lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    seen = (index <= heads.last[None, :, None]) & (index >= begin)
    scores = fence(jnp.where(seen, scores, MASKED))
    largest = fence(scores.max(0)).max(-1)
    weights = fence(jnp.exp(scores - largest[None, :, None]))
    total = fence(weights.sum(0)).sum(-1)
    out = fence(_add([of_heads(values[:, i]) * weights[:, :, i, None] for i in range(width)]))
    # As a reduction this takes 97 us where it takes 3 as a product.
    ones = jnp.ones((1, tiles), jnp.float32)
    out = jnp.matmul(ones, out.reshape(tiles, -1), precision=lax.Precision.HIGHEST)
    return Sums(largest, total, out.reshape(q.shape))


def _merge(a: Sums, b: Sums) -> Sums:
    largest = jnp.maximum(a.largest, b.largest)
    to_a, to_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    out = to_a[:, None] * a.out + to_b[:, None] * b.out
    return Sums(largest, to_a * a.total + to_b * b.total, out)


def _add(terms: Sequence[Array]) -> Array:
    chains = [functools.reduce(lax.add, terms[i::CHAINS]) for i in range(min(CHAINS, len(terms)))]
    return functools.reduce(lax.add, chains)
