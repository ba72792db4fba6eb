"""Tokens are drawn as often as their probability, each row by its own key and parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.sampling import sample
from sampling_calls import draw, kept_ids, keys_of, logits_of, looking_back, normal

#: Chi-square that a correct sampler exceeds once in 10,000 times, by degrees of freedom.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 7: 29.88}


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
