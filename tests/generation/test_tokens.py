"""The same tokens come out streamed, at once, resumed, alone or in a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from generation_calls import PROMPTS, SAMPLED, padded, run
from qllama_jax import layerwise, session
from reference import Reference


def test_greedy_tokens_are_the_float64_references(model, path):
    reference = Reference(path)
    results = ql.generate(model, PROMPTS, max_new_tokens=24, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == reference.greedy(prompt, 24)


@pytest.mark.parametrize("fields", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_equals_one_shot_equals_the_pure_function(model, generate_tokens, fields):
    for prompt in PROMPTS:
        whole = ql.generate(model, prompt, max_new_tokens=20, ignore_eos=True, **fields)
        pieces = list(ql.stream(model, prompt, max_new_tokens=20, ignore_eos=True, **fields))
        assert [piece.token for piece in pieces] == whole.tokens
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [piece.finish_reason for piece in pieces] == [None] * 19 + ["length"]
        pure = run(generate_tokens, model, [prompt], 20, **fields)
        assert pure.tokens[0].tolist() == whole.tokens
        assert int(pure.finish[0]) == ql.Finish.LENGTH


@pytest.mark.parametrize("fields", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_is_that_row_alone_with_its_key(model, generate_tokens, fields):
    keys = jax.random.split(jax.random.key(7), len(PROMPTS))
    batch = run(generate_tokens, model, PROMPTS, 12, key=keys, filler=383, **fields)
    for row, prompt in enumerate(PROMPTS):
        alone = run(generate_tokens, model, [prompt], 12, key=keys[row : row + 1], **fields)
        assert batch.tokens[row].tolist() == alone.tokens[0].tolist()
    assert len({tuple(row) for row in batch.tokens.tolist()}) == len(PROMPTS)


def test_bfloat16_chooses_as_exact_logits_do_but_for_its_rounding(model, path):
    wanted = jax.jit(ql.generate_tokens, static_argnames=("config", "max_new_tokens", "dtype"))(
        model.params,
        *padded(PROMPTS[:1]),
        jax.random.key(0),
        config=model.config,
        sampling=ql.Sampling(),
        max_new_tokens=12,
        stop_tokens=[],
        dtype=jnp.bfloat16,
    )
    assert {leaf.dtype for leaf in wanted.cache.k} == {jnp.dtype(jnp.bfloat16)}
    options = {"max_new_tokens": 12, "ignore_eos": True, "dtype": jnp.bfloat16}
    result = ql.generate(model, PROMPTS[0], **options)
    assert [piece.token for piece in ql.stream(model, PROMPTS[0], **options)] == result.tokens
    pure = wanted.tokens[0].tolist()
    # A number is rounded where it leaves a fusion: elsewhere two programs may part at near tokens.
    assert pure == result.tokens or jax.default_backend() != "cpu"
    for tokens in (pure, result.tokens):
        logits = Reference(path).logits([*PROMPTS[0], *tokens])[len(PROMPTS[0]) - 1 : -1]
        assert (logits.max(axis=-1) - logits[np.arange(12), tokens]).max() <= 0.1
    exact = ql.generate(model, PROMPTS[0], **{**options, "dtype": jnp.float32})
    assert result.logprobs[0] != exact.logprobs[0]
    assert abs(result.logprobs[0] - exact.logprobs[0]) < 0.1


@pytest.mark.parametrize(
    "fields", [{}, {"repeat_penalty": 1.5}, SAMPLED], ids=["greedy", "penalized", "sampled"]
)
def test_resumed_equals_one_shot(model, generate_tokens, fields):
    keys = ql.row_keys(jax.random.key(3), 1)
    cache = ql.init_cache(model.config, 1, 64)
    whole = run(generate_tokens, model, PROMPTS[:1], 12, key=keys, **fields)
    first = run(generate_tokens, model, PROMPTS[:1], 5, key=keys, cache=cache, **fields)
    assert int(first.cache.lengths[0]) == len(PROMPTS[0]) + 4
    last = first.tokens[0, -1:].tolist()
    second = run(
        generate_tokens,
        model,
        [last],
        7,
        key=keys,
        cache=first.cache,
        history=first.history,
        **fields,
    )
    assert first.tokens[0].tolist() + second.tokens[0].tolist() == whole.tokens[0].tolist()


def test_a_row_with_a_seed_of_its_own_is_that_row_alone_with_the_seed(model):
    seeds = [2**32 - 1, 5, 0]
    options: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True, **SAMPLED}
    batch = ql.generate(model, PROMPTS, seed=seeds, **options)
    for prompt, seed, result in zip(PROMPTS, seeds, batch, strict=True):
        assert result.tokens == ql.generate(model, prompt, seed=seed, **options).tokens
    again = ql.generate(model, PROMPTS, seed=np.asarray(seeds, np.uint32), **options)
    assert [row.tokens for row in again] == [row.tokens for row in batch]
    alike = ql.generate(model, [PROMPTS[0]] * 2, seed=[5, 5], **options)
    assert alike[0].tokens == alike[1].tokens
    one, other = ql.generate(model, [PROMPTS[0]] * 2, seed=5, **options)
    assert one.tokens == alike[0].tokens != other.tokens


def test_a_model_packed_for_its_backend_streams_and_batches_as_at_once(tiny_llama):
    model = ql.load(tiny_llama("Q4_K", layers=2))
    whole = ql.generate(model, PROMPTS[0], max_new_tokens=12, ignore_eos=True)
    pieces = [
        piece.token for piece in ql.stream(model, PROMPTS[0], max_new_tokens=12, ignore_eos=True)
    ]
    assert pieces == whole.tokens
    (_, row) = ql.generate(model, [PROMPTS[1], PROMPTS[0]], max_new_tokens=12, ignore_eos=True)
    assert row.tokens == whole.tokens
    exact = ql.generate(model, PROMPTS[0], max_new_tokens=1, activations="float", top_logprobs=3)
    assert abs(exact.logprobs[0] - whole.logprobs[0]) < 0.1


def test_a_prefill_a_layer_at_a_time_is_that_of_the_whole(model):
    tokens, lengths = padded(PROMPTS[:2])
    tokens, lengths = jnp.concatenate([tokens, tokens]), jnp.concatenate([lengths, lengths])
    tokens = tokens.at[3, 0].set(-1)  # poisons its row
    arguments = {"config": model.config, "activations": "float"}
    cache = ql.init_cache(model.config, 4, 16)
    wanted, whole = ql.prefill(model.params, tokens, lengths, cache, **arguments)
    found, parts = layerwise.prefill(model.params, tokens, lengths, cache, **arguments)
    assert np.isnan(found[3]).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert parts.lengths.tolist() == whole.lengths.tolist()
    for mine, others in zip((*parts.k, *parts.v), (*whole.k, *whole.v), strict=True):
        np.testing.assert_allclose(mine, others, rtol=0, atol=1e-5)


def test_a_prompt_of_several_chunks_equals_one_chunk(model, monkeypatch):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 384, n).tolist() for n in (70, 33, 64)]
    whole = ql.generate(model, prompts, max_new_tokens=6, ignore_eos=True)
    monkeypatch.setattr(session, "PREFILL_CHUNK", 32)
    parts = ql.generate(model, prompts, max_new_tokens=6, ignore_eos=True)
    assert [part.tokens for part in parts] == [result.tokens for result in whole]


def test_tokens_do_not_depend_on_the_cut_into_dispatches_and_caches(model, monkeypatch):
    whole = ql.generate(model, PROMPTS[0], max_new_tokens=40, ignore_eos=True)
    monkeypatch.setattr(session, "SMALLEST_CACHE", 8)
    monkeypatch.setattr(session, "DISPATCH_SECONDS", 1e-9)
    parts = ql.generate(model, PROMPTS[0], max_new_tokens=40, ignore_eos=True)
    assert parts.tokens == whole.tokens


def test_vmap_over_temperatures_equals_single_calls(model, generate_tokens):
    temperatures = jnp.asarray([0.0, 0.7, 1.5])
    tokens, lengths = padded(PROMPTS[:1])

    def one(temperature):
        return ql.generate_tokens(
            model.params,
            tokens,
            lengths,
            jax.random.key(0),
            config=model.config,
            sampling=ql.Sampling(temperature=temperature),
            max_new_tokens=6,
            stop_tokens=jnp.zeros((0,), jnp.int32),
        ).tokens

    together = jax.jit(jax.vmap(one))(temperatures)
    for temperature, row in zip(temperatures, together, strict=True):
        alone = run(generate_tokens, model, PROMPTS[:1], 6, temperature=temperature)
        assert row[0].tolist() == alone.tokens[0].tolist()


def test_generation_nests_in_scan(model, generate_tokens):
    tokens, lengths = padded(PROMPTS[:1])

    def step(carry, key):
        out = ql.generate_tokens(
            model.params,
            tokens,
            lengths,
            key,
            config=model.config,
            sampling=ql.Sampling(temperature=1.0),
            max_new_tokens=4,
            stop_tokens=jnp.zeros((0,), jnp.int32),
        )
        return carry, out.tokens[0]

    keys = jax.random.split(jax.random.key(1), 3)
    _, scanned = jax.jit(lambda keys: jax.lax.scan(step, 0, keys))(keys)
    for key, row in zip(keys, scanned, strict=True):
        alone = run(generate_tokens, model, PROMPTS[:1], 4, key=key, temperature=1.0)
        assert row.tolist() == alone.tokens[0].tolist()


def test_one_token_is_the_first_of_many(model, generate_tokens):
    many = run(generate_tokens, model, PROMPTS, 4)
    one = run(generate_tokens, model, PROMPTS, 1)
    assert one.tokens.tolist() == many.tokens[:, :1].tolist()
    assert one.lengths.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        run(generate_tokens, model, PROMPTS, 0)
