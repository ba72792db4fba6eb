"""The cache of all layers in tiles holds what is written to it, and keeps it when it grows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from formulas import in_tiles, normal
from qllama_jax.cache import write

L, B, K, H = 2, 2, 2, 3


def flat(room: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(L, B, K, H, room), normal(L, B, K, room, H, seed=1)


@pytest.mark.parametrize(
    ("room", "T"),
    [
        *((192, T) for T in (1, 2, 63, 64, 65, 66, 129, 192, 300)),
        *((100, T) for T in (1, 3, 5, 40)),  # in tiles of 4
        *((65, T) for T in (1, 2, 70)),  # in tiles of 1
    ],
)
def test_write_stores_count_positions_from_start_in_their_tiles(room: int, T: int):
    jitted = jax.jit(write, static_argnames="axis")
    keys, values = flat(room)
    new = normal(B, K, H, T, seed=2), normal(B, K, T, H, seed=3)
    tiled, layer = in_tiles(keys, values), jnp.int32(1)
    starts = {0, 1, 3, 4, 63, 64, 65, 100, 127, 128, room - T, room - 1, room}
    starts = sorted(s for s in starts if 0 <= s <= room)
    for start in starts:
        most = min(T, room - start)
        # Of the other row nothing is written.
        at, count = np.asarray([start, starts[-1]], np.int32), np.asarray([most, 0], np.int32)
        wanted = keys.copy(), values.copy()
        wanted[0][1, 0, :, :, start : start + most] = new[0][0, :, :, :most]
        wanted[1][1, 0, :, start : start + most] = new[1][0, :, :most]
        for i, axis in enumerate((3, 2)):
            found = jitted(tiled[i], new[i], at, count, layer, axis=axis)
            np.testing.assert_array_equal(found, in_tiles(*wanted)[i])


@pytest.mark.parametrize(
    ("old", "new"), [(64, 192), (128, 129), (16, 128), (100, 320), (65, 66), (192, 192)]
)
def test_resizing_keeps_the_contents_whatever_the_tiles(old: int, new: int):
    keys, values = flat(old)
    k, v = map(jnp.asarray, in_tiles(keys, values))
    cache = ql.KVCache(k=k, v=v, lengths=jnp.asarray([3, old], jnp.int32))
    assert (cache.max_length, cache.batch_size, cache.is_stacked) == (old, B, True)
    found = ql.resize_cache(cache, new)
    assert (found.max_length, found.lengths.tolist()) == (new, [3, old])
    none, more = (0, 0), (0, new - old)
    keys = np.pad(keys, [none, none, none, none, more])
    values = np.pad(values, [none, none, none, more, none])
    for array, tiles in zip((found.k, found.v), in_tiles(keys, values), strict=True):
        np.testing.assert_array_equal(array, tiles)
