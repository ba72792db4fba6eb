"""The same tokens come out streamed, at once, resumed, alone or in a batch; traces are few."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax import decoding, layerwise, session
from qllama_jax.metadata import Metadata
from qllama_jax.params import Linear
from reference import Reference

PROMPTS = [[5, 17, 300, 42, 9], [7], [11, 12, 13, 250, 251, 252, 253, 254, 100, 101, 102, 3, 8]]
SAMPLED: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "repeat_penalty": 1.2,
}
#: A prompt of 150 tokens, of which the last 64 do not hold the first few, and penalties for these.
LONG = [300, 301, 302, 303] * 10 + [20 + i % 30 for i in range(110)]
FAR: dict[str, Any] = {
    "temperature": 1.0,
    "frequency_penalty": 0.4,
    "presence_penalty": -0.3,
    "typical_p": 0.9,
}


@pytest.fixture(scope="module")
def path(tiny_llama):
    return tiny_llama("Q4_0", context_length=4096)


@pytest.fixture(scope="module")
def model(path):
    # Blocks as in the file meet exact activations, and compile fastest.
    return ql.load(path, layout="file")


@pytest.fixture(scope="module")
def generate_tokens():
    static = ("config", "max_new_tokens", "activations", "penalty_window", "top_logprobs")
    return jax.jit(ql.generate_tokens, static_argnames=static)


def padded(prompts, filler=0):
    width = max(16, max(map(len, prompts)))
    tokens = np.full((len(prompts), width), filler, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    return jnp.asarray(tokens), jnp.asarray(lengths)


def run(
    generate_tokens,
    model,
    prompts,
    n,
    *,
    key=None,
    stop=(),
    filler=0,
    cache=None,
    history=None,
    penalty_window=64,
    top_logprobs=0,
    **fields,
):
    tokens, lengths = padded(prompts, filler=filler)
    return generate_tokens(
        model.params,
        tokens,
        lengths,
        jax.random.key(0) if key is None else key,
        config=model.config,
        sampling=ql.Sampling(**fields),
        max_new_tokens=n,
        stop_tokens=np.asarray(stop, np.int32),
        cache=cache,
        history=history,
        penalty_window=penalty_window,
        top_logprobs=top_logprobs,
    )


def test_greedy_tokens_are_the_float64_references(model, path):
    reference = Reference(path)
    results = ql.generate(model, PROMPTS, max_new_tokens=24, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == reference.greedy(prompt, 24)


def test_logprobs_are_the_references_of_the_unmodified_logits(model, path):
    result = ql.generate(model, PROMPTS[2], max_new_tokens=8, ignore_eos=True, **SAMPLED)
    logits = Reference(path).logits(PROMPTS[2] + result.tokens)[len(PROMPTS[2]) - 1 : -1]
    chosen = logits[np.arange(8), result.tokens]
    expected = chosen - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    expected -= logits.max(-1)
    np.testing.assert_allclose(result.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("last_n", [0, 3, 64, 100, 150, -1])
def test_a_penalty_window_of_any_width_streams_resumes_and_is_the_pure_functions(
    model, generate_tokens, last_n
):
    fields = FAR | {"penalty_last_n": last_n}
    whole = ql.generate(model, LONG, max_new_tokens=20, ignore_eos=True, **fields)
    pieces = list(ql.stream(model, LONG, max_new_tokens=20, ignore_eos=True, **fields))
    assert [piece.token for piece in pieces] == whole.tokens
    pure = run(generate_tokens, model, [LONG], 20, penalty_window=256, **fields)
    assert pure.tokens[0].tolist() == whole.tokens
    assert pure.history.shape == (1, 255)
    options: dict[str, Any] = fields | {
        "penalty_window": 256,
        "key": ql.row_keys(jax.random.key(0), 1),
    }
    cache = ql.init_cache(model.config, 1, 256)
    first = run(generate_tokens, model, [LONG], 7, cache=cache, **options)
    last = first.tokens[0, -1:].tolist()
    options |= {"cache": first.cache, "history": first.history}
    second = run(generate_tokens, model, [last], 13, **options)
    assert first.tokens[0].tolist() + second.tokens[0].tolist() == whole.tokens


def test_tokens_beyond_the_64_last_count_where_they_are_asked_for(model):
    def tokens(last_n):
        options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
        options |= {"frequency_penalty": 100.0, "penalty_last_n": last_n}
        return ql.generate(
            model, LONG, logit_bias={t: 50.0 for t in range(300, 304)}, **options
        ).tokens

    first = {300, 301, 302, 303}
    assert first <= set(tokens(64))
    assert not first & set(tokens(150))
    assert tokens(-1) == tokens(2**31 - 1) == tokens(180)
    # Nothing comes twice within the tokens looked back on.
    every = LONG + tokens(-1)
    assert len(set(every)) == len(set(LONG)) + 30


def test_a_row_looks_back_as_far_as_it_does_alone(model):
    last_n = [100, 0, -1]
    prompts = [LONG, PROMPTS[0], LONG[:80]]
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "repeat_penalty": 3.0}
    batch = ql.generate(model, prompts, penalty_last_n=np.asarray(last_n), **options)
    for prompt, n, result in zip(prompts, last_n, batch, strict=True):
        assert result.tokens == ql.generate(model, prompt, penalty_last_n=n, **options).tokens


def test_a_window_too_narrow_is_refused_or_ends_the_row_in_error(model, generate_tokens):
    with pytest.raises(ValueError, match=r"penalty_last_n=100: .*penalty_window\) has 64"):
        ql.generate_tokens(
            model.params,
            *padded([LONG]),
            jax.random.key(0),
            config=model.config,
            sampling=ql.Sampling(penalty_last_n=100),
            max_new_tokens=2,
            stop_tokens=jnp.zeros((0,), jnp.int32),
        )
    last_n = np.asarray([64, 65, -1, -1], np.int32)
    prompts = [LONG, LONG, LONG, LONG[:60]]
    out = run(generate_tokens, model, prompts, 6, penalty_last_n=last_n, repeat_penalty=1.1)
    length, error = ql.Finish.LENGTH, ql.Finish.ERROR
    assert out.finish.tolist() == [length, error, error, error]
    assert out.lengths.tolist() == [6, 0, 0, 4]  # the fifth sees a window of 64 that is full
    with pytest.raises(ValueError, match="penalty_window=0"):
        run(generate_tokens, model, prompts, 6, penalty_window=0)


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


def test_bfloat16_streamed_equals_one_shot_equals_the_pure_function(model):
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
    assert result.tokens == wanted.tokens[0].tolist()
    assert [piece.token for piece in ql.stream(model, PROMPTS[0], **options)] == result.tokens
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


def test_banned_tokens_never_come_out_and_biased_ones_do(model):
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 30.0}
    banned = list(range(0, 384, 2))
    results = ql.generate(model, PROMPTS, banned_tokens=banned, **options)
    came = {token for result in results for token in result.tokens}
    assert all(token % 2 for token in came)
    assert len(came) > 60
    by_bias = ql.generate(model, PROMPTS, logit_bias={t: -np.inf for t in banned}, **options)
    assert [row.tokens for row in by_bias] == [row.tokens for row in results]
    array = np.where(np.arange(384) % 2, np.float32(0), -np.inf)
    by_array = ql.generate(model, PROMPTS, logit_bias=array, **options)
    assert [row.tokens for row in by_array] == [row.tokens for row in results]
    one_a_row = np.zeros((3, 384), np.float32)
    one_a_row[np.arange(3), [7, 8, 9]] = 1e6
    results = ql.generate(model, PROMPTS, logit_bias=one_a_row, banned_tokens=[8], **options)
    assert [set(row.tokens) for row in results][::2] == [{7}, {9}]
    assert 8 not in results[1].tokens
    # Log-probabilities are those of the unmodified logits, also of a token that was forced.
    forced = ql.generate(model, PROMPTS[0], max_new_tokens=1, logit_bias={7: 1e6}, top_logprobs=384)
    assert forced.tokens == [7]
    assert dict(forced.top_logprobs[0])[7] == pytest.approx(float(forced.logprobs[0]), abs=1e-6)
    assert forced.logprobs[0] < -1


def test_no_token_left_by_a_traced_bias_ends_the_row_in_error(model, generate_tokens):
    bias = np.zeros((3, 384), np.float32)
    bias[1] = -np.inf
    out = run(generate_tokens, model, PROMPTS, 4, logit_bias=bias)
    assert out.finish.tolist() == [ql.Finish.LENGTH, ql.Finish.ERROR, ql.Finish.LENGTH]
    assert out.lengths.tolist() == [4, 0, 4]


def test_top_logprobs_are_the_largest_of_the_float64_references(model, path):
    result = ql.generate(
        model, PROMPTS[2], max_new_tokens=8, ignore_eos=True, top_logprobs=5, **SAMPLED
    )
    logits = Reference(path).logits(PROMPTS[2] + result.tokens)[len(PROMPTS[2]) - 1 : -1]
    largest = logits.max(-1, keepdims=True)
    logprobs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :5]
    assert [[token for token, _ in top] for top in result.top_logprobs] == order.tolist()
    found = [[logprob for _, logprob in top] for top in result.top_logprobs]
    np.testing.assert_allclose(found, np.take_along_axis(logprobs, order, -1), atol=2e-5)


def test_logprobs_are_log_softmax_of_forwards_logits(model):
    result = ql.generate(model, PROMPTS[0], max_new_tokens=6, ignore_eos=True, top_logprobs=384)
    tokens = jnp.asarray([PROMPTS[0] + result.tokens])
    cache = ql.init_cache(model.config, 1, 16)
    logits, _ = ql.forward(model.params, tokens, cache, config=model.config)
    logits = np.asarray(logits[0, len(PROMPTS[0]) - 1 : -1], np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for step, top in enumerate(result.top_logprobs):
        assert sorted(token for token, _ in top) == list(range(384))
        ids, logprobs = zip(*top, strict=True)
        np.testing.assert_allclose(logprobs, expected[step][list(ids)], atol=1e-5)
        assert list(logprobs) == sorted(logprobs, reverse=True)
        # Greedy: the likeliest is the one that was chosen.
        assert top[0] == (result.tokens[step], float(result.logprobs[step]))


def test_top_logprobs_are_the_same_streamed_at_once_in_a_batch_and_pure(model, generate_tokens):
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "ignore_eos": True,
        "top_logprobs": 3,
        **SAMPLED,
    }
    whole = ql.generate(model, PROMPTS[0], **options)
    pieces = list(ql.stream(model, PROMPTS[0], **options))
    assert [piece.top_logprobs for piece in pieces] == whole.top_logprobs
    batch = ql.generate(model, PROMPTS, seed=[0, 1, 2], **options)
    ids = [[token for token, _ in top] for top in whole.top_logprobs]
    assert [[token for token, _ in top] for top in batch[0].top_logprobs] == ids
    pure = run(generate_tokens, model, PROMPTS[:1], 8, top_logprobs=3, **SAMPLED)
    assert pure.top_tokens[0].tolist() == ids
    assert pure.top_logprobs.shape == (1, 8, 3)
    assert pure.top_logprobs.dtype == np.float32
    found = [[logprob for _, logprob in top] for top in whole.top_logprobs]
    np.testing.assert_allclose(pure.top_logprobs[0], found, atol=1e-5)
    none = ql.generate(model, PROMPTS[0], max_new_tokens=8, ignore_eos=True, **SAMPLED)
    assert (none.tokens, none.top_logprobs) == (whole.tokens, [[]] * 8)
    assert run(generate_tokens, model, PROMPTS[:1], 8, **SAMPLED).top_tokens.shape == (1, 8, 0)


def test_rows_that_have_stopped_have_no_top_logprobs(model, generate_tokens):
    free = run(generate_tokens, model, PROMPTS, 8)
    stop = [int(free.tokens[0, 2])]
    out = run(generate_tokens, model, PROMPTS, 8, stop=stop, top_logprobs=2)
    for row in range(3):
        end = int(out.lengths[row])
        assert (out.top_logprobs[row, :end] < 0).all()
        assert not out.top_logprobs[row, end:].any()
        assert not out.top_tokens[row, end:].any()
    assert min(out.lengths.tolist()) <= 3


def test_rows_stop_at_their_stop_token_and_the_loop_with_the_last_of_them(model, generate_tokens):
    free = run(generate_tokens, model, PROMPTS, 12)
    stop = [int(free.tokens[0, 3]), int(free.tokens[1, 5])]
    out = run(generate_tokens, model, PROMPTS[:2], 12, stop=stop)
    for row in range(2):
        expected = free.tokens[row].tolist()
        end = min(expected.index(token) for token in stop if token in expected) + 1
        assert int(out.lengths[row]) == end
        assert out.tokens[row].tolist() == expected[:end] + [0] * (12 - end)
        assert int(out.finish[row]) == ql.Finish.STOP
        assert out.logprobs[row, end:].tolist() == [0.0] * (12 - end)
        # Nothing is stored for a row that has stopped.
        assert int(out.cache.lengths[row]) == len(PROMPTS[row]) + end - 1


def test_decoding_ends_early_when_every_row_has_stopped(model):
    tokens, lengths = padded(PROMPTS[:1])
    cache = ql.init_cache(model.config, 1, 64)
    logits, cache = ql.prefill(model.params, tokens, lengths, cache, config=model.config)
    state, _ = ql.start_decoding(
        logits,
        cache,
        ql.recent_tokens(tokens, lengths),
        ql.row_keys(jax.random.key(0), 1),
        ql.Sampling(),
        jnp.zeros((0,), jnp.int32),
    )
    every = jnp.arange(model.config.vocab_size, dtype=jnp.int32)
    arguments = (model.params, state, ql.Sampling(), every, 9)
    *_, ran = ql.decode_many(*arguments, config=model.config, max_steps=9)
    assert int(ran) == 1


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


TRACED = layerwise._enter, layerwise._layer, layerwise._logits, session._start, session._decode


def trace_counts() -> tuple[int, ...]:
    # jax's own counter, which its type stubs leave out
    return tuple(getattr(f, "_cache_size")() for f in TRACED)  # noqa: B009


def test_sampling_parameters_and_steps_compile_nothing_again(model):
    for temperature, top_k in ((0.0, 0), (0.5, 3), (1, 40)):
        ql.generate(model, PROMPTS[0], max_new_tokens=9, temperature=temperature, top_k=top_k)
    sizes = trace_counts()
    ql.generate(model, PROMPTS[0], max_new_tokens=17, seed=5, temperature=2, top_p=0.5, min_p=0.2)
    ql.generate(model, PROMPTS[0], max_new_tokens=17, seed=[5], **FAR, penalty_last_n=9)
    assert trace_counts() == sizes


def test_biases_and_bans_compile_nothing_again_once_there_is_one(model):
    ql.generate(model, PROMPTS[0], max_new_tokens=9, banned_tokens=[3])
    sizes = trace_counts()
    cases: tuple[dict[str, Any], ...] = (
        {"banned_tokens": [5, 6, 7]},
        {"logit_bias": {1: 2.5, 300: -1e9}},
        {"logit_bias": np.linspace(-1, 1, 384), "banned_tokens": (9,), "temperature": 1.0},
        {"logit_bias": np.zeros((1, 384))},
    )
    for options in cases:
        ql.generate(model, PROMPTS[0], max_new_tokens=9, **options)
    assert trace_counts() == sizes


@pytest.mark.slow
def test_200_prompt_lengths_make_at_most_9_prefill_traces_and_one_decode_trace_a_cache(
    tiny_llama, monkeypatch
):
    model = ql.load(tiny_llama("F32", layers=1, context_length=4096, embed=32, ffn=64, vocab=384))
    traces = {"prefill": [], "decode": []}

    def layer(block, x, *arguments, **static):
        traces["prefill"].append(x.shape)
        return layerwise._run_layer(block, x, *arguments, **static)

    def decode(params, state, *arguments, **static):
        traces["decode"].append(state.cache.max_length)
        return decoding.decode_many(params, state, *arguments, **static)

    static = ("config", "max_steps", "activations", "top_logprobs", "dtype")
    monkeypatch.setattr(
        layerwise, "_layer", jax.jit(layer, static_argnames=("config", "activations"))
    )
    monkeypatch.setattr(session, "_decode", jax.jit(decode, static_argnames=static))
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[1, 2048], rng.integers(1, 2049, 198)])
    for length in lengths:
        ql.generate(model, rng.integers(0, 384, length), max_new_tokens=3, ignore_eos=True)
    assert len(traces["prefill"]) <= 9
    assert len(traces["decode"]) == len(set(traces["decode"])) <= 6
    before = sum(map(len, traces.values()))
    for length in lengths[:40]:
        ql.generate(model, rng.integers(0, 384, length), max_new_tokens=3, ignore_eos=True)
    assert sum(map(len, traces.values())) == before


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


def test_a_bad_row_ends_in_error_and_leaves_the_others(model, generate_tokens):
    good = run(generate_tokens, model, PROMPTS, 6)
    bad = run(generate_tokens, model, [PROMPTS[0], [384], PROMPTS[2]], 6)
    assert bad.finish.tolist() == [ql.Finish.LENGTH, ql.Finish.ERROR, ql.Finish.LENGTH]
    assert bad.lengths.tolist() == [6, 0, 6]
    for row in (0, 2):
        assert bad.tokens[row].tolist() == good.tokens[row].tolist()


def test_a_row_that_outgrows_a_given_cache_ends_in_error_with_the_tokens_that_fitted(
    model, generate_tokens
):
    cache = ql.init_cache(model.config, 1, 32)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([18], jnp.int32))
    out = run(generate_tokens, model, [PROMPTS[2]], 8, cache=cache)  # 18 + 13 + 7 > 32
    assert int(out.finish[0]) == ql.Finish.ERROR
    assert int(out.lengths[0]) == 2


@pytest.mark.parametrize("where", ["token_embd", "output_norm", "ffn_norm", "attn_q"])
def test_nan_in_a_weight_raises_with_row_and_token(model, where):
    params, nan = model.params, np.float32(np.nan)
    if where == "output_norm":
        broken = params.output_norm.weight.at[3].set(nan)
        params = params.replace(output_norm=Linear(weight=broken))
    elif where == "token_embd":
        packed = params.token_embd.weight
        packed = packed.replace(d=packed.d.at[PROMPTS[0][0], 0].set(np.float16(np.nan)))
        params = params.replace(token_embd=Linear(weight=packed))
    else:
        layer = getattr(params.blk[1], where)
        weight = layer.weight
        if where == "attn_q":
            weight = weight.replace(d=weight.d.at[0, 0].set(np.float16(np.nan)))
        else:
            weight = weight.at[0].set(nan)
        block = params.blk[1].replace(**{where: layer.replace(weight=weight)})
        params = params.replace(blk=(params.blk[0], block))
    broken_model = dataclasses.replace(model, params=params)
    with pytest.raises(ql.NumericalError, match="row 0: the logits for generated token 0"):
        ql.generate(broken_model, PROMPTS[0], max_new_tokens=4)


def test_a_stop_string_ends_the_text_before_it_also_across_tokens(model):
    free = ql.generate(model, "hello world", max_new_tokens=40, ignore_eos=True)
    assert len(free.text) > 8
    stop = free.text[4:7]
    cut = ql.generate(model, "hello world", max_new_tokens=40, ignore_eos=True, stop=stop)
    assert cut.text == free.text[: free.text.find(stop)]
    assert cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    pieces = list(ql.stream(model, "hello world", max_new_tokens=40, ignore_eos=True, stop=stop))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert pieces[-1].finish_reason == "stop"


def test_stats_count_tokens(model):
    results = ql.generate(model, PROMPTS, max_new_tokens=5, ignore_eos=True)
    stats = results[0].stats
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert (stats.generated_tokens, stats.decode_steps) == (15, 4)


def test_a_cache_with_room_goes_on_and_a_full_one_says_so(model, path, generate_tokens):
    tokens = Reference(path).greedy(PROMPTS[0], 7)
    first = run(generate_tokens, model, PROMPTS[:1], 3)
    assert first.tokens[0].tolist() == tokens[:3]
    with pytest.raises(ql.ContextOverflowError, match="the cache has 19"):
        run(generate_tokens, model, [tokens[2:3]], 4, cache=first.cache)
    roomy = ql.resize_cache(first.cache, 64)
    second = run(generate_tokens, model, [tokens[2:3]], 4, cache=roomy, history=first.history)
    assert second.tokens[0].tolist() == tokens[3:]


def test_the_pure_function_checks_lengths_statically(model, generate_tokens):
    with pytest.raises(ql.ContextOverflowError, match="the cache has 20"):
        run(generate_tokens, model, [[1]], 5, cache=ql.init_cache(model.config, 1, 20))
    with pytest.raises(ql.ContextOverflowError, match="context is 4096"):
        run(generate_tokens, model, [[1]], 4081)


def test_one_token_is_the_first_of_many(model, generate_tokens):
    many = run(generate_tokens, model, PROMPTS, 4)
    one = run(generate_tokens, model, PROMPTS, 1)
    assert one.tokens.tolist() == many.tokens[:, :1].tolist()
    assert one.lengths.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        run(generate_tokens, model, PROMPTS, 0)


@pytest.mark.parametrize("most_steps", [1, 64])
def test_a_failing_row_gives_all_its_good_tokens_first_however_the_work_is_cut(
    model, monkeypatch, most_steps
):
    free = ql.generate(model, PROMPTS[0], max_new_tokens=20, ignore_eos=True).tokens
    fatal = next(i for i in range(3, 20) if free[i] not in free[:i] and free[i] not in PROMPTS[0])
    table = model.params.token_embd.weight
    table = table.replace(d=table.d.at[free[fatal], 0].set(np.float16(np.nan)))
    params = model.params.replace(token_embd=Linear(weight=table))
    params = params.replace(output=model.params.output or model.params.token_embd)
    broken = dataclasses.replace(model, params=params)
    monkeypatch.setattr(session, "MAX_STEPS", most_steps)
    monkeypatch.setattr(session, "DISPATCH_SECONDS", 1e9)
    tokens = []
    pieces = ql.stream(broken, PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    with pytest.raises(ql.NumericalError, match=f"generated token {fatal + 1} "):
        tokens.extend(piece.token for piece in pieces)
    assert tokens == free[: fatal + 1]


def test_a_file_of_an_unknown_pre_tokenizer_takes_ids_and_gives_text(tiny_llama):
    path = tiny_llama("Q8_0", tokenizer="gpt2", layers=1)
    known = ql.load(path, layout="file")
    metadata = Metadata({**known.metadata, "tokenizer.ggml.pre": "gpt-99"})
    model = dataclasses.replace(known, metadata=metadata)
    result = ql.generate(model, PROMPTS[0], max_new_tokens=6, ignore_eos=True)
    assert result.tokens == Reference(path).greedy(PROMPTS[0], 6)
    assert result.text == known.tokenizer.decode(result.tokens, continues=True)
    (perplexity,) = ql.perplexity(model, PROMPTS[2], context=12)
    assert np.isfinite(perplexity.value)
    with pytest.raises(ql.GGUFError, match="gpt-99"):
        ql.generate(model, "text")


def test_a_file_without_a_vocabulary_takes_and_gives_ids(tiny_llama):
    model = ql.load(tiny_llama("F32", tokenizer=None, vocab=97))
    result = ql.generate(model, [1, 2, 3], max_new_tokens=4)
    assert (len(result.tokens), result.text) == (4, "")
    with pytest.raises(ql.GGUFError):
        ql.generate(model, "text")


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA fuses across a barrier, and copies the cache"
)
def test_a_decoding_step_writes_to_the_cache_in_place(path):
    model = ql.load(path)
    config, S = model.config, 272
    K, H = config.num_kv_heads, config.head_dim
    row = jnp.zeros((1,), jnp.int32)
    state = decoding.DecodeState(
        cache=ql.init_cache(config, 1, S),
        token=row,
        recent=jnp.zeros((1, 64), jnp.int32),
        keys=ql.row_keys(jax.random.key(0), 1),
        finish=row,
        generated=row,
    )
    decode = jax.jit(
        decoding.decode_many, static_argnames=("config", "max_steps"), donate_argnames="state"
    )
    arguments = model.params, state, ql.Sampling(), jnp.zeros((0,), jnp.int32), 3
    text = decode.lower(*arguments, config=config, max_steps=4).compile().as_text()
    assert text is not None
    shape = rf"f32\[1,{K},(?:{S},{H}|{H},{S})\]"
    assert len(re.findall(rf"dynamic-update-slice\S* = {shape}\S* fusion\(", text)) >= 2
    assert re.findall(rf"= {shape}\S* copy\(", text) == []
