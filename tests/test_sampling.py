"""Sampling keeps the tokens that llama.cpp keeps, and draws them as often as their probability."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.penalties import penalize
from qllama_jax.sampling import kept, sample
from qllama_jax.sampling_ranges import check_sampling

#: Chi-square that a correct sampler exceeds once in 10,000 times, by degrees of freedom.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 7: 29.88}


def looking_back(tokens: Any, width: int = 64) -> jax.Array:
    """Recent tokens [B, W], the last ones those given, [B, n] with n <= W."""
    tokens = jnp.asarray(tokens, jnp.int32)
    B, n = tokens.shape
    return jnp.concatenate([jnp.full((B, width - n), -1, jnp.int32), tokens], axis=1)


NOTHING_RECENT = looking_back(np.zeros((1, 0)))


def logits_of(probabilities: Any) -> jax.Array:
    """Logits [1, V] of probabilities [V]."""
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.asarray(probabilities, np.float32)))[None]


def kept_ids(logits: jax.Array, **parameters: Any) -> list[int]:
    """Ids of the tokens that the filters leave in a single row, jitted."""
    keep = jax.jit(kept)(logits, ql.Sampling(**parameters).per_row(1))
    return np.flatnonzero(np.asarray(keep)[0]).tolist()


def draw(logits: jax.Array, keys: jax.Array, recent: Any = None, **parameters: Any) -> np.ndarray:
    """One token a key, all from the same logits [1, V]."""
    B = keys.shape[0]
    recent = jnp.broadcast_to(NOTHING_RECENT if recent is None else recent, (B, 64))
    rows = jnp.broadcast_to(logits, (B, logits.shape[-1]))
    tokens = jax.jit(sample)(rows, keys, ql.Sampling(**parameters).per_row(B), recent)
    assert tokens.dtype == np.int32
    return np.asarray(tokens)


def penalized(logits: jax.Array, recent: Any, repeat: Any, **penalties: Any) -> jax.Array:
    """`penalize` with numbers or [B] numbers; by default of all of `recent`."""
    B = logits.shape[0]
    fields = {"frequency": 0.0, "presence": 0.0, "last_n": np.int32(-1)} | penalties
    rows = {name: jnp.broadcast_to(jnp.asarray(x), (B,)) for name, x in fields.items()}
    repeat = jnp.broadcast_to(jnp.asarray(repeat), (B,))
    return penalize(logits, jnp.asarray(recent, jnp.int32), repeat=repeat, **rows)


def keys_of(number: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), number)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# Filters and penalties: what tests/test-sampling.cpp of llama.cpp expects.


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
    every = np.full(4, -np.inf)
    assert draw(logits, keys_of(2), temperature=1.0, logit_bias=every).tolist() == [-1, -1]


def test_a_batch_has_biases_of_its_own_or_one_for_all():
    logits = jnp.zeros((2, 3))
    bias = np.asarray([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    sampling = ql.Sampling(logit_bias=bias).per_row(2)
    recent = jnp.full((2, 64), -1, jnp.int32)
    assert sample(logits, keys_of(2), sampling, recent).tolist() == [1, 2]


# Draws.


@pytest.mark.parametrize("parameters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_filter_that_leaves_one_token_is_greedy_at_any_temperature(parameters: dict[str, float]):
    for seed, temperature in enumerate([0.01, 1.0, 100.0]):
        logits = jnp.asarray(normal(1, 33, seed=seed))
        tokens = draw(logits, keys_of(50), temperature=temperature, **parameters)
        assert set(tokens.tolist()) == {int(np.argmax(logits))}


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-42, 1.5e-38, 1e-30, 1e-10, 1e-6])
def test_temperature_0_and_its_limit_are_greedy(temperature: float):
    for offset in (-50, 0, 50):  # 50 / 1.5e-38 is infinite
        logits = normal(1, 33) + np.float32(offset)
        tokens = draw(jnp.asarray(logits), keys_of(50), temperature=temperature)
        assert set(tokens.tolist()) == {int(np.argmax(logits))}


def test_greedy_takes_the_smaller_id_of_equal_ones():
    assert draw(jnp.asarray([[1.0, 2.0, 2.0, 2.0]]), keys_of(1)).tolist() == [1]


@pytest.mark.parametrize(
    ("parameters", "left"),
    [
        ({"temperature": 1.0}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 2.0}, range(8)),
        ({"temperature": 1.0, "top_k": 4}, [1, 3, 4, 6]),
        ({"temperature": 1.5, "top_p": 0.6}, [1, 3, 4]),
        ({"temperature": 0.7, "min_p": 0.75}, [1, 4]),
    ],
    ids=str,
)
def test_20000_draws_are_distributed_as_the_softmax_of_what_is_left(
    parameters: dict[str, float], left: Any
):
    weights = np.asarray([1, 6, 2, 4, 5, 1, 3, 2]) / 24
    powered = weights ** (1 / parameters["temperature"])
    ids = list(left)
    expected = 20_000 * powered[ids] / powered[ids].sum()
    tokens = draw(logits_of(weights), keys_of(20_000), **parameters)
    counts = np.bincount(tokens, minlength=8)
    assert counts[ids].sum() == 20_000
    chi_square = ((counts[ids] - expected) ** 2 / expected).sum()
    assert chi_square <= CHI_SQUARE[len(ids) - 1]


@pytest.mark.parametrize(
    "parameters",
    [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 9, "min_p": 0.2}],
    ids=str,
)
def test_a_filter_changes_only_the_draws_of_tokens_that_it_cuts(parameters: dict[str, float]):
    logits = jnp.asarray(normal(1, 40))
    plain = draw(logits, keys_of(2000), temperature=1.2)
    filtered = draw(logits, keys_of(2000), temperature=1.2, **parameters)
    ids = kept_ids(logits, **parameters)
    assert 1 < len(ids) < 20
    survives = np.isin(plain, ids)
    assert 200 < survives.sum() < 1800
    np.testing.assert_array_equal(filtered[survives], plain[survives])
    assert np.isin(filtered, ids).all()


def test_different_keys_give_different_draws_and_the_same_key_the_same():
    uniform = jnp.zeros((1, 1000))
    tokens = draw(uniform, keys_of(100), temperature=1.0)
    assert len(set(tokens.tolist())) > 80  # 95 on average
    np.testing.assert_array_equal(draw(uniform, keys_of(100), temperature=1.0), tokens)
    same = jnp.repeat(keys_of(1), 50)
    assert len(set(draw(uniform, same, temperature=1.0).tolist())) == 1


ROWS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 1.0, "repeat_penalty": 3.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.1},
    {"repeat_penalty": 5.0},
    {"temperature": 0.9, "presence_penalty": 1.5, "penalty_last_n": 2},
    {"temperature": 0.9, "frequency_penalty": -0.5, "penalty_last_n": 0},
    {"temperature": 1.1, "typical_p": 0.4},
    {"typical_p": 0.3},
]


def test_each_row_of_a_batch_draws_what_it_draws_alone():
    B, V = len(ROWS), 50
    alone = [ql.Sampling(**row).per_row(1) for row in ROWS]
    together = jax.tree.map(lambda *fields: jnp.concatenate(fields), *alone)
    logits = jnp.asarray(2 * normal(B, V))
    recent = looking_back(np.argsort(-logits, axis=1)[:, :4])
    jitted = jax.jit(sample)
    drawn = set()
    for seed in range(25):
        keys = keys_of(B, seed)
        batch = jitted(logits, keys, together, recent)
        for i in range(B):
            row = slice(i, i + 1)
            single = jitted(logits[row], keys[row], alone[i], recent[row])
            assert int(batch[i]) == int(single[0])
            drawn.add((i, int(single[0])))
    assert len(drawn) > 3 * B  # draws, not constants


def test_sample_under_vmap_equals_rows_of_a_batch():
    B, V = len(ROWS), 50
    alone = [ql.Sampling(**row).per_row(1) for row in ROWS]
    together = jax.tree.map(lambda *fields: jnp.concatenate(fields), *alone)
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *alone)
    logits, recent = jnp.asarray(2 * normal(B, V)), jnp.zeros((B, 64), jnp.int32)
    keys = keys_of(B)
    arguments = logits[:, None], keys[:, None], stacked, recent[:, None]
    vmapped = jax.jit(jax.vmap(sample))(*arguments)
    batch = jax.jit(sample)(logits, keys, together, recent)
    np.testing.assert_array_equal(vmapped[:, 0], batch)


def test_no_value_of_any_parameter_traces_again():
    traces = []

    @jax.jit
    def step(logits: jax.Array, keys: jax.Array, sampling: ql.Sampling) -> jax.Array:
        traces.append(logits.shape)
        B = logits.shape[0]
        recent = jnp.zeros((B, 64), jnp.int32)
        return sample(logits, keys, sampling.per_row(B), recent)

    logits = jnp.asarray(normal(2, 16))
    for values in (*ROWS, {"temperature": 0.1, "top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        step(logits, keys_of(2), ql.Sampling(**values))
    assert len(traces) == 1


DTYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repeat_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "penalty_last_n": np.int32,
    "typical_p": np.float32,
    "logit_bias": np.float32,
}


def test_per_row_broadcasts_numbers_and_keeps_rows():
    rows = ql.Sampling(temperature=np.asarray([0.5, 1.0, 2.0], np.float32), top_k=7).per_row(3)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(rows)] == [
        ((3, 1) if name == "logit_bias" else (3,), np.dtype(dtype))
        for name, dtype in DTYPES.items()
    ]
    assert rows.temperature.tolist() == [0.5, 1.0, 2.0]
    assert rows.top_k.tolist() == [7, 7, 7]
    for bias in (np.arange(5.0), np.ones((3, 5), np.float32)):
        rows = ql.Sampling(logit_bias=bias).per_row(3)
        np.testing.assert_array_equal(rows.logit_bias, np.broadcast_to(bias, (3, 5)))
        again = rows.per_row(3)
        jax.tree.map(np.testing.assert_array_equal, rows, again)


# Refusals.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", float("nan")),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.0001),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.05),
        ("min_p", float("nan")),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", -1.0),
        ("repeat_penalty", float("inf")),
        ("repeat_penalty", float("nan")),
        ("presence_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("presence_penalty", 1e39),  # infinite in float32
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", float("-inf")),
        ("penalty_last_n", -2),
        ("penalty_last_n", 2.5),
        ("penalty_last_n", float("nan")),
        ("penalty_last_n", float("inf")),
        ("penalty_last_n", 2**31),
        ("typical_p", 0.0),
        ("typical_p", -0.5),
        ("typical_p", 1.0001),
        ("typical_p", float("nan")),
        ("typical_p", float("inf")),
    ],
)
def test_a_parameter_out_of_its_range_is_refused_by_name(name: str, value: float):
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        check_sampling(ql.Sampling(**{name: value}))
    good = getattr(ql.Sampling(), name)
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        check_sampling(ql.Sampling(**{name: np.asarray([good, value])}))


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"logit_bias"}))
def test_a_parameter_that_is_no_number_is_refused_by_name(name: str):
    for value in (True, "1", None, np.asarray([False])):
        with pytest.raises(TypeError, match=rf"^{name}=.*: expected "):
            check_sampling(ql.Sampling(**{name: value}))
    with pytest.raises(ValueError, match=rf"^{name}: \(3,\) numbers for 2 rows"):
        check_sampling(ql.Sampling(**{name: np.ones(3)}), 2)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (1.0, ValueError, r"expected 0, or floats of shape \(3,\) or \(2, 3\), found 1.0"),
        (float("nan"), ValueError, "found nan"),
        (np.zeros(4), ValueError, r"found shape \(4,\)"),
        (np.zeros((3, 3)), ValueError, r"found shape \(3, 3\)"),
        (np.zeros((1, 2, 3)), ValueError, r"found shape \(1, 2, 3\)"),
        (np.zeros(3, bool), TypeError, "found bool"),
        ("1", TypeError, "found <U1"),
        (np.asarray([0, np.nan, 0]), ValueError, "nan for token 1"),
        (np.asarray([[0, 0, 0], [0, 0, np.inf]]), ValueError, "inf for token 2"),
        (np.asarray([1e39, 0, 0]), ValueError, "inf for token 0"),
        (np.full(3, -np.inf), ValueError, "none to choose"),
        (np.asarray([[0, 0, 0], [-np.inf] * 3]), ValueError, "none to choose"),
    ],
    ids=str,
)
def test_a_bias_of_another_form_or_value_is_refused(bias: Any, error: type, message: str):
    with pytest.raises(error, match=rf"^logit_bias: .*{message}"):
        check_sampling(ql.Sampling(logit_bias=bias), 2, 3)


def test_the_ends_of_every_range_are_allowed_and_traced_values_not_looked_at():
    for values in (
        {},
        {"temperature": 1e9, "top_k": 2**31 - 1, "top_p": 1e-9, "min_p": 1.0},
        {"repeat_penalty": 1e-9, "min_p": 0, "top_p": 1, "temperature": np.asarray([0.0, 2.0])},
        {"top_k": np.asarray([0, 40], np.int32), "repeat_penalty": jnp.asarray(2.0)},
        {"presence_penalty": -2.0, "frequency_penalty": -2, "penalty_last_n": -1},
        {"penalty_last_n": 2**31 - 1, "typical_p": 1e-9},
        {"penalty_last_n": np.asarray([0, 64]), "typical_p": 1},
        {"logit_bias": np.asarray([[-np.inf, 0.0], [1e30, -np.inf]])},
        {"logit_bias": jnp.asarray([-100.0, 100.0])},
        {"logit_bias": jnp.asarray([-1, 1], jnp.bfloat16)},
        {"logit_bias": 0},
    ):
        check_sampling(ql.Sampling(**values))
    for values in ({}, {"logit_bias": np.ones((2, 3))}, {"logit_bias": np.ones(3)}):
        check_sampling(ql.Sampling(**values).per_row(2), 2, 3)

    @jax.jit
    def traced(value: jax.Array) -> jax.Array:
        check_sampling(ql.Sampling(temperature=value, top_p=value))
        return value

    assert float(traced(-1.0)) == -1.0


def test_of_traced_parameters_the_shapes_are_looked_at():
    @jax.jit
    def traced(sampling: ql.Sampling) -> None:
        check_sampling(sampling, 2, 5)

    traced(ql.Sampling())
    traced(ql.Sampling(logit_bias=np.zeros(5, np.float32)).per_row(2))
    with pytest.raises(ValueError, match=r"^top_p: \(3,\) numbers for 2 rows"):
        traced(ql.Sampling(top_p=np.ones(3, np.float32)))
    for shape in ((4,), (3, 5), (5, 1)):
        with pytest.raises(ValueError, match=r"^logit_bias: .*found shape"):
            traced(ql.Sampling(logit_bias=np.zeros(shape, np.float32)))
