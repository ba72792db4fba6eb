"""forward is the float64 reference, however it is called and cut."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from matrix import V
from qllama_jax import model as module
from reference import Reference
from small_model import FLOAT32, ROUNDING, B, D, Small, T, errors, hidden_of

# forward = reference, for every row; for every kind of file in test_matrix.py


def test_every_row_of_a_batch_equals_the_reference(small: Small):
    logits, cache = small.forward(small.tokens)
    assert errors(logits, small.wanted).max() <= FLOAT32
    assert logits.dtype == np.float32
    assert cache.lengths.tolist() == [T] * B


# Prefill, decode, rows and padding


@pytest.mark.parametrize(
    "split", [(1,) * 8, (4, 4), (1, 4, 1, 1, 1), (4, 1, 1, 1, 1), (1, 1, 4, 1, 1)]
)
def test_any_split_into_calls_equals_one_call(small: Small, split: tuple[int, ...]):
    assert sum(split) == T
    cache, parts, at = small.cache(), [], 0
    for size in split:
        logits, cache = small.forward(small.tokens[:, at : at + size], cache)
        parts.append(logits)
        at += size
        assert cache.lengths.tolist() == [at] * B
    found = np.concatenate(parts, axis=1)
    whole, _ = small.forward(small.tokens)
    assert errors(found, whole).max() <= ROUNDING
    assert errors(found, small.wanted).max() <= FLOAT32


def test_rows_of_different_lengths_go_on_from_where_each_ended(small: Small):
    first, second = np.asarray([3, 0, 4]), np.asarray([4, 1, 0])
    reference = Reference(small.path)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, V, (2, B, 4)).astype(np.int32)
    a, cache = small.forward(tokens[0], lengths=first)
    assert cache.lengths.tolist() == first.tolist()
    b, cache = small.forward(tokens[1], cache, lengths=second)
    assert cache.lengths.tolist() == (first + second).tolist()
    for row in range(B):
        one, two = first[row], second[row]
        wanted = reference.logits([*tokens[0, row, :one], *tokens[1, row, :two]])
        found = np.concatenate([a[row, :one], b[row, :two]])
        assert errors(found, wanted).max() <= FLOAT32


def test_a_row_in_a_batch_equals_that_row_alone(small: Small):
    together, _ = small.forward(small.tokens)
    for row in range(B):
        alone, _ = small.forward(small.tokens[row : row + 1])
        assert errors(together[row], alone[0]).max() <= ROUNDING


def test_what_padding_holds_changes_no_bit(small: Small):
    lengths = np.asarray([3, 8, 5])
    padding = np.arange(T)[None] >= lengths[:, None]
    results = []
    for content in (0, 7, -1, V, 2**31 - 1, -(2**31)):
        tokens = np.where(padding, content, small.tokens)
        logits, cache = small.forward(tokens, lengths=lengths)
        results.append((logits[~padding], *map(np.asarray, jax.tree.leaves(cache))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert errors(results[0][0], small.wanted[~padding]).max() <= FLOAT32


def test_a_token_changes_no_logit_before_it_and_every_one_after(small: Small):
    before, _ = small.forward(small.tokens)
    for j in (1, 4, 7):
        tokens = small.tokens.copy()
        tokens[:, j] = (tokens[:, j] + 1) % V
        after, _ = small.forward(tokens)
        np.testing.assert_array_equal(after[:, :j], before[:, :j])
        assert (np.abs(after[:, j:] - before[:, j:]).max(axis=-1) > 1e-4).all()


def test_the_same_call_gives_the_same_bits_and_leaves_its_cache_usable(small: Small):
    _, cache = small.forward(small.tokens[:, :4])
    kept = [np.array(leaf) for leaf in jax.tree.leaves(cache)]
    first, _ = small.forward(small.tokens[:, 4:], cache)
    second, _ = small.forward(small.tokens[:, 4:], cache)
    np.testing.assert_array_equal(first, second)
    for leaf, old in zip(jax.tree.leaves(cache), kept, strict=True):
        assert not leaf.is_deleted()
        np.testing.assert_array_equal(leaf, old)


def test_other_tokens_lengths_and_positions_trace_nothing_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
):
    traces = []
    real = module.rope_cos_sin
    monkeypatch.setattr(module, "rope_cos_sin", lambda *a: traces.append(1) or real(*a))
    tokens = np.full((B, 6), 5)
    _, cache = small.forward(tokens)
    assert len(traces) == 1
    for lengths in ([1, 6, 0], [2, 2, 2]):
        _, cache = small.forward(tokens + 1, cache, lengths)
    assert len(traces) == 1


def test_a_bfloat16_cache_changes_logits_by_at_most_1_percent(small: Small):
    logits, cache = small.forward(small.tokens, small.cache(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}
    error = errors(logits, small.wanted)
    assert error.max() <= 1e-2  # bfloat16 keeps 8 bits
    assert error.max() > 1e-4


def test_bfloat16_activations_change_logits_by_at_most_4_percent(small: Small):
    logits, cache = ql.forward(
        small.params,
        jnp.asarray(small.tokens),
        small.cache(dtype=jnp.bfloat16),
        config=small.config,
        dtype=jnp.bfloat16,
    )
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}
    error = errors(logits, small.wanted)
    assert error.max() <= 4e-2  # every residual keeps 8 bits
    assert error.max() > 2e-3


def test_all_activations_have_the_dtype_that_is_asked_for(small: Small):
    names = ql.sites(small.config)

    def captured(dtype: Any) -> set[Any]:
        hidden, _, aux = jax.eval_shape(
            functools.partial(ql.hidden_states, config=small.config, capture=names, dtype=dtype),
            small.params,
            jnp.asarray(small.tokens),
            small.cache(dtype=dtype),
        )
        return {hidden.dtype, *(aux[name].dtype for name in names)}

    assert captured(jnp.bfloat16) == {jnp.dtype(jnp.bfloat16)}
    assert captured(jnp.float32) == {jnp.dtype(jnp.float32)}


def test_a_dtype_that_is_none_of_the_two_is_refused(small: Small):
    with pytest.raises(ValueError, match=r"float16.*: expected float32 or bfloat16"):
        ql.forward(
            small.params,
            jnp.asarray(small.tokens),
            small.cache(),
            config=small.config,
            dtype=jnp.float16,
        )


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 2), ("cuda", 0), ("tpu", 0)])
def test_a_layer_is_kept_a_call_on_a_cpu_alone(small: Small, platform: str, calls: int):
    # XLA's GPU compiler fuses nothing in what it may not inline.
    arguments = small.params, jnp.asarray(small.tokens), small.cache()
    traced = jax.jit(functools.partial(ql.forward, config=small.config)).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    apart = [line for line in text.splitlines() if "inlineable" in line]
    assert sum("call @run_block(" in line for line in apart) == calls
    assert bool(apart) == bool(calls)


# jit, vmap, scan


def test_forward_nests_in_jit(small: Small):
    @jax.jit
    def nested(tokens: jax.Array, cache: ql.KVCache) -> jax.Array:
        logits, _ = ql.forward(small.params, tokens, cache, config=small.config)
        return logits * 2

    found = nested(jnp.asarray(small.tokens), small.cache())
    assert errors(found, 2 * small.wanted).max() <= FLOAT32


def test_vmap_over_rows_equals_the_batch(small: Small):
    lengths = np.asarray([8, 3, 5], np.int32)

    def one(row: jax.Array, length: jax.Array, cache: ql.KVCache) -> tuple[jax.Array, ql.KVCache]:
        return ql.forward(small.params, row[None], cache, config=small.config, lengths=length[None])

    caches = jax.tree.map(lambda x: jnp.stack([x] * B), small.cache(1))
    logits, caches = jax.vmap(one)(jnp.asarray(small.tokens), jnp.asarray(lengths), caches)
    batch, cache = small.forward(small.tokens, lengths=lengths)
    assert caches.lengths[:, 0].tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        assert errors(logits[row, 0, :length], batch[row, :length]).max() <= ROUNDING
    for a, b in zip((*caches.k, *caches.v), (*cache.k, *cache.v), strict=True):
        np.testing.assert_allclose(a[:, 0], b, rtol=0, atol=1e-5)


def test_a_scan_over_tokens_equals_one_call(small: Small):
    def step(cache: ql.KVCache, token: jax.Array) -> tuple[ql.KVCache, jax.Array]:
        logits, cache = ql.forward(small.params, token[:, None], cache, config=small.config)
        return cache, logits[:, 0]

    cache, logits = jax.lax.scan(step, small.cache(), jnp.asarray(small.tokens.T))
    assert cache.lengths.tolist() == [T] * B
    assert errors(jnp.swapaxes(logits, 0, 1), small.wanted).max() <= FLOAT32


# Shapes that do not fit


def test_shapes_that_do_not_fit_are_refused(small: Small):
    tokens = jnp.asarray(small.tokens)
    forward = functools.partial(ql.forward, small.params, config=small.config)
    with pytest.raises(ValueError, match="3 rows of tokens need a cache of 2 layers of"):
        forward(tokens, small.cache(2))
    with pytest.raises(ValueError, match="8 tokens a row do not fit a cache of 7 positions"):
        forward(tokens, small.cache(room=7))
    with pytest.raises(ValueError, match="0 tokens a row, expected at least 1"):
        forward(tokens[:, :0], small.cache())
    with pytest.raises(ValueError, match="neither tokens nor inputs_embeds"):
        hidden_of(small, tokens=None)
    with pytest.raises(
        ValueError, match=r"inputs_embeds of shape \(3, 8, 63\), wanted \(3, 8, 64\)"
    ):
        hidden_of(small, inputs_embeds=jnp.zeros((B, T, D - 1)))
    cache = small.cache()
    shapes = {"k": r"\(3, 2, 16, 32\) of keys", "v": r"\(3, 2, 32, 16\) of values"}
    for name, shape in shapes.items():
        x = getattr(cache, name)
        for other in (x[:1], (*x, x[0]), tuple(y[:, :1] for y in x), (x[0], x[1][:1])):
            with pytest.raises(ValueError, match=f"need a cache of 2 layers of {shape}, found"):
                forward(tokens, replace(cache, **{name: other}))


# What a profile shows


def test_lowered_text_names_the_spans_of_the_model(small: Small):
    lowered = ql.forward.lower(
        small.params, jnp.asarray(small.tokens), small.cache(), config=small.config
    )
    text = lowered.as_text(debug_info=True)
    for span in ("attn/", "attn/rope/", "mlp/", "output/"):
        assert f'"{span}' in text or f"/{span}" in text, span
