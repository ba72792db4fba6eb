"""What is out of range poisons its row, and no other."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from matrix import V
from reference import Reference
from small_model import FLOAT32, ROUNDING, Array, B, Small, T, errors


def assert_only_row_is_poisoned(
    row: int, found: tuple[Array, ql.KVCache], healthy: tuple[Array, ql.KVCache], before: ql.KVCache
) -> None:
    """Its logits are NaN and its cache is as before; the others' bits are those of `healthy`."""
    logits, cache = found
    others = [other for other in range(B) if other != row]
    assert np.isnan(logits[row]).all()
    np.testing.assert_array_equal(logits[others], healthy[0][others])
    lengths, wanted = np.asarray(cache.lengths), np.asarray(healthy[1].lengths)
    assert lengths[row] > cache.max_length
    assert lengths[others].tolist() == wanted[others].tolist()
    for new, old in zip((*cache.k, *cache.v), (*before.k, *before.v), strict=True):
        np.testing.assert_array_equal(new[row], old[row])
    for new, other in zip((*cache.k, *cache.v), (*healthy[1].k, *healthy[1].v), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[others], np.asarray(other)[others])


@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("at", [0, 3])
def test_an_id_outside_the_vocabulary_poisons_its_row_alone_for_good(
    small: Small, bad: int, at: int
):
    _, before = small.forward(small.tokens[:, :4])
    tokens = small.tokens[:, 4:].copy()
    healthy = small.forward(tokens, before)
    tokens[1, at] = bad
    found = small.forward(tokens, before)
    assert_only_row_is_poisoned(1, found, healthy, before)
    # And in the next call, whatever it holds.
    again, healthy_again = (small.forward(small.tokens[:, :4], x[1]) for x in (found, healthy))
    assert_only_row_is_poisoned(1, again, healthy_again, before)


def test_the_largest_and_smallest_ids_are_no_poison(small: Small):
    tokens = np.asarray([[0, V - 1, 0, V - 1]])
    logits, _ = small.forward(tokens)
    assert errors(logits[0], Reference(small.path).logits(tokens[0])).max() <= FLOAT32


def test_a_position_past_the_end_poisons_its_row_alone_for_good(small: Small):
    room = 10
    _, before = small.forward(small.tokens, small.cache(room=room), [8, 7, 2])
    tokens = small.tokens[:, :3]
    healthy = small.forward(tokens, before, [2, 3, 3])
    assert healthy[1].lengths.tolist() == [10, 10, 5]
    assert np.isfinite(healthy[0][0, :2]).all()
    assert np.isfinite(healthy[0][1:]).all()
    found = small.forward(tokens, before, [3, 3, 3])
    assert_only_row_is_poisoned(0, found, healthy, before)
    lengths = [0, 0, 3]  # nothing of its own: still poisoned
    again, healthy_again = (small.forward(tokens, x[1], lengths) for x in (found, healthy))
    assert_only_row_is_poisoned(0, again, healthy_again, before)


@pytest.mark.parametrize("length", [-1, T + 1, 2**31 - 1, -(2**31)])
def test_a_length_outside_0_to_T_poisons_its_row_alone(small: Small, length: int):
    before = small.cache()
    healthy = small.forward(small.tokens, before, [5, 8, 8])
    found = small.forward(small.tokens, before, [5, 8, length])
    assert_only_row_is_poisoned(2, found, healthy, before)


def test_a_poisoned_row_is_whole_again_when_its_length_is_set_back(small: Small):
    wanted, before = small.forward(small.tokens[:, :4])
    bad = small.tokens[:, 4:].copy()
    bad[1, 0] = -1
    _, poisoned = small.forward(bad, before)
    healed = replace(poisoned, lengths=jnp.asarray([4, 4, 4], jnp.int32))
    logits, _ = small.forward(small.tokens[:, 4:], healed)
    assert errors(logits, small.wanted[:, 4:]).max() <= FLOAT32
    assert errors(wanted, small.wanted[:, :4]).max() <= FLOAT32


@pytest.mark.parametrize(("filled", "more"), [(0, 100), (0, 120), (100, 20), (119, 1)])
def test_padding_that_reaches_past_the_end_is_right_where_the_tokens_fit(
    small: Small, filled: int, more: int
):
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, V, (1, filled + 128)).astype(np.int32)
    results = []
    for room in (120, 256):
        cache = small.cache(1, room)
        if filled:
            _, cache = small.forward(tokens[:, :128], cache, [filled])
        logits, cache = small.forward(tokens[:, filled:], cache, [more])
        assert cache.lengths.tolist() == [filled + more]
        keys = np.asarray(cache.k[1])[..., : filled + more]
        values = np.asarray(cache.v[1])[:, :, : filled + more]
        results.append((logits[0, :more], keys[0], values[0]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * np.abs(b).max())
