"""Filters and penalties leave what tests/test-sampling.cpp of llama.cpp expects."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.sampling import sample
from sampling_calls import draw, kept_ids, keys_of, logits_of, looking_back, normal, penalized


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"top_k": 1}, [1.0]),
        ({"top_k": 3}, [0.44444, 0.33333, 0.22222]),
        ({"top_k": 4}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 0}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.0}, [1.0]),
        ({"top_p": 0.7}, [0.571429, 0.428571]),
        ({"top_p": 0.8}, [0.44444, 0.33333, 0.22222]),
        ({"top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"min_p": 0.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"min_p": 0.24}, [0.4, 0.3, 0.2, 0.1]),
        ({"min_p": 0.26}, [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9]),
        ({"min_p": 0.49}, [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9]),
        ({"min_p": 0.51}, [0.4 / 0.7, 0.3 / 0.7]),
        ({"min_p": 0.74}, [0.4 / 0.7, 0.3 / 0.7]),
        ({"min_p": 0.76}, [1.0]),
        ({"min_p": 1.0}, [1.0]),
        ({"min_p": 1.05}, [1.0]),
    ],
    ids=str,
)
def test_filters_leave_the_probabilities_that_llama_cpp_expects(
    parameters: dict[str, float], expected: list[float]
):
    probabilities = np.asarray([0.1, 0.2, 0.3, 0.4])
    ids = kept_ids(logits_of(probabilities), **parameters)
    assert ids == list(range(4 - len(expected), 4))
    left = probabilities[ids[::-1]]
    np.testing.assert_allclose(left / left.sum(), expected, atol=1e-5)


def expected_first_id(V: int, top_k: int, top_p: float, min_p: float) -> int:
    """Smallest id left of V tokens of weight id, by exact arithmetic: top-k, top-p, then min-p."""
    first = max(0, V - top_k) if top_k else 0
    total, reached, last = sum(range(first, V)), 0, V
    while last > first and (top_p >= 1 or reached < Fraction(top_p) * total or last == V):
        last -= 1
        reached += last
    weights = range(last, V)
    return next(i for i in weights if i >= Fraction(min_p) * (V - 1) or i == V - 1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (10_000, 1.0, 0.0),
        (1, 1.0, 0.0),
        (0, 0.0, 0.0),
        (0, 1.0, 1.0),
        (0, 1.0, 1e-12),
        (100, 1.0, 0.0),
        (0, 0.0003, 0.0),
        (0, 0.8, 0.0),
        (0, 1.0, 9997.9 / 9999),
        (0, 1.0, 0.1),
        (100, 0.8, 0.0),
        (100, 1.0, 0.1),
        (0, 0.8, 0.1),
        (0, 0.8, 9997.9 / 9999),
        (100, 0.8, 0.1),
        (100, 0.8, 0.995),
    ],
)
def test_queued_filters_cut_10000_tokens_at_the_exact_place(top_k: int, top_p: float, min_p: float):
    V = 10_000
    first = expected_first_id(V, top_k, top_p, min_p)
    if min_p == 1e-12:
        first = 1  # token 0 has probability 0
    ids = kept_ids(logits_of(np.arange(V)), top_k=top_k, top_p=top_p, min_p=min_p)
    assert ids == list(range(first, V))


def test_top_p_counts_the_probabilities_that_top_k_left():
    # Of all, 0.4 + 0.3 reach 0.55; of the two that top-k leaves, 0.4 / 0.7 alone does.
    probabilities = logits_of([0.1, 0.2, 0.3, 0.4])
    assert kept_ids(probabilities, top_p=0.55) == [2, 3]
    assert kept_ids(probabilities, top_p=0.55, top_k=2) == [3]


def test_filters_come_before_temperature():
    # At temperature 100 all four are equally likely, and top-p alone would keep three or four.
    tokens = draw(logits_of([0.1, 0.2, 0.3, 0.4]), keys_of(500), temperature=100.0, top_p=0.7)
    assert set(tokens.tolist()) == {2, 3}


def test_of_equal_tokens_the_smaller_ids_are_kept():
    equal = jnp.zeros((1, 6))
    assert kept_ids(equal, top_k=1) == [0]
    assert kept_ids(equal, top_k=4) == [0, 1, 2, 3]
    assert kept_ids(equal, top_p=0.4) == [0, 1, 2]
    assert kept_ids(equal, min_p=1.0) == [0, 1, 2, 3, 4, 5]
    some_equal = jnp.asarray([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert kept_ids(some_equal, top_k=1) == [1]
    assert kept_ids(some_equal, top_k=4) == [1, 2, 3, 4]
    assert kept_ids(jnp.asarray([[-0.0, 0.0]]), top_k=1) == [0]


@pytest.mark.parametrize("top_k", [8, 9, 2**31 - 1])
def test_top_k_of_the_vocabulary_and_more_keeps_all(top_k: int):
    assert kept_ids(logits_of(np.full(8, 1 / 8)), top_k=top_k) == list(range(8))
    assert kept_ids(logits_of(np.full(8, 1 / 8)), top_k=top_k, top_p=0.99999) == list(range(8))


# The repeat penalty.


def test_penalty_divides_positive_and_multiplies_negative_logits_once_a_token():
    logits = jnp.asarray([[6.0, -1.5, 0.0, 4.0, -2.0]])
    recent = jnp.asarray([[0, 1, 1, 0, 2, 0]], jnp.int32)
    found = penalized(logits, recent, 3.0)
    np.testing.assert_array_equal(found, [[2.0, -4.5, 0.0, 4.0, -2.0]])


@pytest.mark.parametrize(
    ("probabilities", "typical_p", "expected"),
    [([0.97, 0.01, 0.01, 0.01], 0.5, [0]), ([0.4, 0.2, 0.2, 0.2], 0.5, [1, 2, 3])],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_typical_p_leaves_the_tokens_that_llama_cpp_expects(
    probabilities: list[float], typical_p: float, expected: list[int], temperature: float
):
    logits = logits_of(probabilities)
    assert kept_ids(logits, typical_p=typical_p) == expected
    tokens = draw(logits, keys_of(100), temperature=temperature, typical_p=typical_p)
    assert set(tokens.tolist()) == set(expected if temperature else expected[:1])


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        ([0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
        ([0, 1, 2], [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),
        ([0, 1, 2, 0, 0], [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),
    ],
    ids=str,
)
def test_presence_and_frequency_leave_the_probabilities_that_llama_cpp_expects(
    recent: list[int], expected: list[float]
):
    found = penalized(logits_of([0.2] * 5), [recent], 1.0, frequency=5.0, presence=5.0)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(found))[0], expected, atol=1e-5)


@pytest.mark.parametrize("recent", [[0], [0, 1, 2], [0, 1, 2, 0, 0]], ids=str)
def test_penalty_leaves_the_probabilities_that_llama_cpp_expects(recent: list[int]):
    found = penalized(logits_of([0.2] * 5), [recent], 50.0)
    seen = len(set(recent))
    expected = [0.0] * seen + [1 / (5 - seen)] * (5 - seen)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(found))[0], expected, atol=1e-5)


def test_penalty_ignores_ids_that_are_no_tokens():
    logits = jnp.asarray(normal(2, 7))
    recent = jnp.asarray([[-1, 7, -7, 8], [2**31 - 1, -(2**31), -1, 3]], jnp.int32)
    found = np.asarray(penalized(logits, recent, 2.0))
    changed = np.argwhere(found != np.asarray(logits))
    assert changed.tolist() == [[1, 3]]


def test_penalty_of_1_changes_no_bit_and_rows_have_penalties_of_their_own():
    logits = jnp.full((3, 4), 2.0)
    recent = jnp.asarray([[0], [1], [2]], jnp.int32)
    found = penalized(logits, recent, [1.0, 4.0, 0.5])
    np.testing.assert_array_equal(found, [[2, 2, 2, 2], [2, 0.5, 2, 2], [2, 2, 4, 2]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalty_comes_before_the_filters_and_greedy(temperature: float):
    logits = jnp.asarray([[1.0, 3.0, 2.0]])
    plain = draw(logits, keys_of(50), temperature=temperature, top_k=1)
    for penalty in ({"repeat_penalty": 2.0}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}):
        fields = {"temperature": temperature, "top_k": 1} | penalty
        changed = draw(logits, keys_of(50), looking_back([[1]]), **fields)
        assert (set(plain.tolist()), set(changed.tolist())) == ({1}, {2})


def test_penalties_look_back_on_last_n_tokens_and_on_no_other():
    logits = jnp.full((6, 5), 2.0)
    recent = [[0, 1, 1, 2, 1]] * 6
    last_n = np.asarray([0, 1, 2, 4, 5, -1], np.int32)
    found = penalized(logits, recent, 2.0, frequency=0.25, presence=0.5, last_n=last_n)
    times = [[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 3, 1], [1, 3, 1], [1, 3, 1]]
    expected = [[1 - 0.25 * c - 0.5 if c else 2 for c in row] + [2, 2] for row in times]
    np.testing.assert_array_equal(found, expected)


def test_a_row_whose_window_is_not_held_gets_no_token():
    logits = jnp.asarray(normal(1, 9))
    full, room = jnp.zeros((1, 64), jnp.int32), looking_back([[0] * 63])
    for recent, last_n, chooses in (
        (full, 64, True),
        (full, 65, False),
        (full, -1, False),
        (room, 65, False),
        (room, -1, True),
    ):
        sampling = ql.Sampling(penalty_last_n=last_n).per_row(1)
        token = sample(logits, keys_of(1), sampling, recent)
        assert int(token[0]) == (np.argmax(logits) if chooses else -1)


def test_a_bias_is_added_first_and_minus_infinity_bans():
    logits = jnp.asarray([[1.0, 3.0, 2.0, -4.0]])
    bias = np.asarray([2.5, -np.inf, 0.0, 0.0])
    assert draw(logits, keys_of(1), logit_bias=bias).tolist() == [0]
    # 1 + 2.5 is halved; 1 / 2 + 2.5 would be the largest.
    fields = {"logit_bias": bias, "repeat_penalty": 2.0}
    assert draw(logits, keys_of(1), looking_back([[0]]), **fields).tolist() == [2]
    for filters in ({}, {"top_k": 2}, {"typical_p": 0.5}, {"top_p": 0.5}, {"min_p": 0.5}):
        tokens = draw(logits, keys_of(2000), temperature=50.0, logit_bias=bias, **filters)
        assert 1 not in tokens
    bans = np.asarray([0.0, -np.inf, 0.0, -np.inf])
    tokens = draw(logits, keys_of(100), temperature=1e38, logit_bias=bans)  # 1 / 1e38 is subnormal
    assert set(tokens.tolist()) == {0, 2}
    every = np.full(4, -np.inf)
    assert draw(logits, keys_of(2), temperature=1.0, logit_bias=every).tolist() == [-1, -1]


def test_a_batch_has_biases_of_its_own_or_one_for_all():
    logits = jnp.zeros((2, 3))
    bias = np.asarray([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    sampling = ql.Sampling(logit_bias=bias).per_row(2)
    recent = jnp.full((2, 64), -1, jnp.int32)
    assert sample(logits, keys_of(2), sampling, recent).tolist() == [1, 2]
