"""Attention to the keys and values of all layers in tiles is the formula, and looks at few."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from formulas import assert_close, attention64, in_tiles, normal
from qllama_jax.attention import attention
from qllama_jax.tiled_attention import lengths_at_once


@pytest.mark.parametrize(
    ("room", "filled"),
    [
        (1, 1),
        *((300, n) for n in (1, 128, 129, 256, 257, 300)),  # in tiles of 4
        *((256, n) for n in (64, 128, 129)),
        *((512, n) for n in (64, 256, 257, 512)),
        *((704, n) for n in (1, 512, 513, 352, 353, 449, 704)),
        *((701, n) for n in (350, 351, 701)),  # in tiles of 1
        *((8192, n) for n in (1025, 5120, 8192)),
        *((8256, n) for n in (1, 4097, 8256)),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_one_query_out_of_a_stack_is_the_formula(rows: int, room: int, filled: int):
    q = 3 * normal(rows, 1, 6, 4)
    k, v = normal(3, rows, 2, 4, room), normal(3, rows, 2, room, 4)
    positions = np.asarray([[filled - 1], [filled // 2]], np.int32)[:rows]
    found = attention(*map(jnp.asarray, (q, *in_tiles(k, v), positions, np.int32(1))))
    assert_close(found, attention64(q, k[1], v[1], positions))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keys_and_values_of_a_stack_enter_the_formula_as_they_are(dtype: str):
    q, k, v = normal(1, 1, 4, 8), normal(2, 1, 2, 8, 192), normal(2, 1, 2, 192, 8)
    k, v = (np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in (k, v))
    positions = np.asarray([[150]], np.int32)
    buffers = (jnp.asarray(x, dtype) for x in in_tiles(k, v))
    found = attention(jnp.asarray(q), *buffers, jnp.asarray(positions), jnp.int32(1))
    assert_close(found, attention64(q, k[1], v[1], positions))


def test_many_queries_out_of_a_stack_are_the_formula():
    T, S = 130, 448
    q, k, v = 3 * normal(2, T, 4, 4), normal(2, 2, 2, 4, S), normal(2, 2, 2, S, 4)
    positions = np.asarray([[7], [300]], np.int32) + np.arange(T, dtype=np.int32)
    found = attention(*map(jnp.asarray, (q, *in_tiles(k, v), positions, np.int32(1))))
    assert_close(found, attention64(q, k[1], v[1], positions))


@pytest.mark.parametrize("room", [64, 1024])
def test_scores_that_overflow_are_no_number_in_a_stack_either(room: int):
    q, k, v = normal(2, 1, 2, 4), normal(2, 2, 1, 4, room), normal(2, 2, 1, room, 4)
    q[1] = -1e38
    k[:, 1] = 1e20
    positions = np.full((2, 1), 5, np.int32)
    found = attention(*map(jnp.asarray, (q, *in_tiles(k, v), positions, np.int32(1))))
    assert np.isnan(found[1]).all()
    assert_close(found[0], attention64(q, k[1], v[1], positions)[0])


@pytest.mark.parametrize(
    ("filled", "looked_at"),
    [(1, 512), (512, 512), (513, 1024), (1025, 1216), (1216, 1216), (1217, 1408), (1665, 2048)],
)
def test_one_query_looks_at_little_more_of_a_large_stack_than_is_filled(
    filled: int, looked_at: int
):
    q, k, v = normal(1, 1, 2, 4), normal(1, 1, 1, 4, 2048), normal(1, 1, 1, 2048, 4)
    v[..., looked_at:, :] = np.inf  # would make NaN of a weight of zero
    positions = np.asarray([[filled - 1]], np.int32)
    found = attention(*map(jnp.asarray, (q, *in_tiles(k, v), positions, np.int32(0))))
    assert_close(found, attention64(q, k[0], v[0], positions))


def test_what_is_looked_at_at_once_is_the_room_or_little_less():
    for room in [*range(1, 9000), 131_072]:
        lengths = lengths_at_once(room)
        assert len(lengths) <= 4
        assert bool(lengths) == (room <= 8192)  # scores of more would be large
        if not lengths:
            continue
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == room
        assert not any(n % math.gcd(room, 64) for n in lengths)  # whole tiles
        if room <= 512:
            assert lengths[0] <= max(255, room / 2)
        else:
            assert 2 * lengths[0] > room  # less is looked at in blocks
            # At most a fifth in vain, and two tiles.
            begins = [room / 2, *lengths[:-1]]
            assert all(n <= 1.2 * begin + 128 for begin, n in zip(begins, lengths, strict=True))
