"""The whole chain, logits to token, against a model of it in float64 that shares no code."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qllama_jax as ql
from qllama_jax.penalties import penalize
from qllama_jax.sampling import kept, sample

B, V, W = 3, 12, 8

#: A decision that float32 may take either way: a comparison of numbers this close.
CLOSE = 1e-5

eighths = st.integers(-64, 64).map(lambda n: n / 8)  # sums and halves of them are exact
likelihoods = st.sampled_from([0.001, 0.05, 0.2, 0.5, 0.7, 0.95]) | st.floats(
    2**-9, 0.984375, width=32
)


@dataclasses.dataclass
class Row:
    """One row's logits, parameters and recent tokens."""

    logits: list[float]
    bias: list[float]
    recent: list[int]
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_last_n: int
    top_k: int
    typical_p: float
    top_p: float
    min_p: float
    temperature: float


def fixed_list(element: st.SearchStrategy, length: int) -> st.SearchStrategy:
    return st.lists(element, min_size=length, max_size=length)


rows = st.builds(
    Row,
    logits=fixed_list(eighths, V) | fixed_list(st.sampled_from([0.0, 1.0, -0.125]), V),
    bias=fixed_list(st.just(0.0) | eighths | st.just(-np.inf), V) | st.just([0.0] * V),
    recent=fixed_list(st.integers(-2, V + 1), W)
    | st.integers(-1, V).map(lambda token: [-1] * (W - 2) + [token] * 2),
    repeat_penalty=st.sampled_from([0.5, 1.0, 1.0, 2.0, 4.0]),
    presence_penalty=st.just(0.0) | eighths,
    frequency_penalty=st.just(0.0) | eighths,
    penalty_last_n=st.integers(-1, W + 1),
    top_k=st.just(0) | st.integers(0, V + 1),
    typical_p=st.just(1.0) | likelihoods,
    top_p=st.just(1.0) | likelihoods,
    min_p=st.sampled_from([0.0, 0.0, 1.0]) | likelihoods,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)


def changed(row: Row) -> list[float]:
    """Logits after bias and penalties, one token at a time."""
    window = row.recent[max(W - row.penalty_last_n, 0) :] if row.penalty_last_n >= 0 else row.recent
    logits = []
    for token in range(V):
        logit, count = row.logits[token] + row.bias[token], window.count(token)
        if count > 0:
            if logit <= 0:
                logit *= row.repeat_penalty
            else:
                logit /= row.repeat_penalty
            logit -= count * row.frequency_penalty + row.presence_penalty
        logits.append(logit)
    return logits


def probabilities(logits: list[float], tokens: list[int]) -> dict[int, float]:
    """Of those tokens alone; equal logits have equal ones, bit for bit."""
    largest = max(logits[token] for token in tokens)
    weights = {token: math.exp(logits[token] - largest) for token in tokens}
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def left_by_filters(row: Row, logits: list[float]) -> list[int]:
    """Tokens that the filters leave, the likeliest first; assumes that no decision is close."""
    left = sorted(range(V), key=lambda token: -logits[token])
    left = left[: row.top_k or V]
    left = [token for token in left if logits[token] > -np.inf]
    if row.typical_p < 1:
        p = probabilities(logits, left)
        entropy = -sum(p[token] * math.log(p[token]) for token in left)
        surprise = {token: abs(-math.log(p[token]) - entropy) for token in left}
        order = sorted(left, key=lambda token: surprise[token])
        for a, b in pairwise(order):
            assume(logits[a] == logits[b] or abs(surprise[a] - surprise[b]) > CLOSE)
        left = sorted(until(row.typical_p, order, p, strict=True), key=left.index)
    if row.top_p < 1:
        p = probabilities(logits, left)
        left = until(row.top_p, left, p, strict=False)
    likeliest = logits[left[0]]
    ratio = {token: math.exp(logits[token] - likeliest) for token in left}
    for token in left:
        assume(ratio[token] == 1 or abs(ratio[token] / max(row.min_p, 1e-30) - 1) > CLOSE)
    return [token for token in left if ratio[token] >= row.min_p]


def until(limit: float, order: list[int], p: dict[int, float], strict: bool) -> list[int]:
    """Tokens up to the one whose probability makes the sum reach, or exceed, the limit."""
    total, taken = 0.0, []
    for token in order:
        taken.append(token)
        total += p[token]
        assume(abs(total - limit) > CLOSE)
        if total > limit or (total == limit and not strict):
            break
    return taken


def chosen(row: Row, logits: list[float], left: list[int], noise: np.ndarray) -> int:
    """The token that the noise `[V]` makes of what is left."""
    if row.temperature == 0:
        return left[0]
    noisy = {token: logits[token] / row.temperature + float(noise[token]) for token in left}
    best, *others = sorted(left, key=lambda token: -noisy[token])
    assume(all(noisy[best] - noisy[token] > 1e-4 for token in others))
    return best


def held(row: Row) -> bool:
    return row.penalty_last_n <= W and (row.penalty_last_n >= 0 or row.recent[0] < 0)


@jax.jit
def run(logits: Any, recent: Any, sampling: ql.Sampling, key: Any) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, B)
    penalized = penalize(
        logits + sampling.logit_bias,
        recent,
        repeat=sampling.repeat_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        last_n=sampling.penalty_last_n,
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys)
    return penalized, kept(penalized, sampling), noise, sample(logits, keys, sampling, recent)


@settings(max_examples=400, deadline=None)
@given(fixed_list(rows, B), st.integers(0, 2**32 - 1))
def test_the_chain_is_the_models_in_float64(batch: list[Row], seed: int):
    names = [field.name for field in dataclasses.fields(Row)][3:]
    fields = {name: jnp.asarray([getattr(row, name) for row in batch]) for name in names}
    sampling = ql.Sampling(logit_bias=np.asarray([row.bias for row in batch]), **fields)
    penalized, keep, noise, tokens = run(
        jnp.asarray([row.logits for row in batch], jnp.float32),
        jnp.asarray([row.recent for row in batch], jnp.int32),
        sampling.per_row(B),
        jax.random.key(seed),
    )
    for b, row in enumerate(batch):
        row = dataclasses.replace(
            row, **{n: float(np.float32(getattr(row, n))) for n in ("typical_p", "top_p", "min_p")}
        )
        logits = changed(row)
        np.testing.assert_array_equal(penalized[b], logits)
        if max(logits) == -np.inf or not held(row):
            assert int(tokens[b]) == -1
            continue
        left = left_by_filters(row, logits)
        finite = np.isfinite(logits)
        assert np.flatnonzero(np.asarray(keep[b]) & finite).tolist() == sorted(left)
        assert int(tokens[b]) == chosen(row, logits, left, np.asarray(noise[b]))


finite = st.floats(-100, 100, width=32)


@settings(max_examples=200, deadline=None)
@given(
    fixed_list(finite, V),
    fixed_list(st.integers(-1, V), W),
    st.floats(0.125, 8, width=32),
    finite,
    finite,
)
def test_penalties_of_any_numbers_are_the_models(logits, recent, repeat, presence, frequency):
    row = Row(logits, [0.0] * V, recent, repeat, presence, frequency, W, 0, 1, 1, 0, 0)
    one = {"repeat": repeat, "frequency": frequency, "presence": presence}
    found = penalize(
        jnp.asarray([logits], jnp.float32),
        jnp.asarray([recent], jnp.int32),
        last_n=jnp.asarray([W], jnp.int32),
        **{name: jnp.asarray([value], jnp.float32) for name, value in one.items()},
    )
    # Terms of up to 800 cancel; each rounds once or twice.
    np.testing.assert_allclose(found[0], changed(row), rtol=1e-6, atol=2e-4)
