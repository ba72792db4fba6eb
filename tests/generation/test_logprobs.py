"""Log-probabilities are those of the unmodified logits, whichever way tokens are asked for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import qllama_jax as ql
from generation_calls import PROMPTS, SAMPLED, run
from reference import Reference


def test_logprobs_are_the_references_of_the_unmodified_logits(model, path):
    result = ql.generate(model, PROMPTS[2], max_new_tokens=8, ignore_eos=True, **SAMPLED)
    logits = Reference(path).logits(PROMPTS[2] + result.tokens)[len(PROMPTS[2]) - 1 : -1]
    chosen = logits[np.arange(8), result.tokens]
    expected = chosen - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    expected -= logits.max(-1)
    np.testing.assert_allclose(result.logprobs, expected, atol=2e-5)


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
