"""How far penalties look back; what biases and bans do to a generation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from generation_calls import FAR, PROMPTS, padded, run

#: A prompt of 150 tokens, of which the last 64 do not hold the first few.
LONG = [300, 301, 302, 303] * 10 + [20 + i % 30 for i in range(110)]


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
