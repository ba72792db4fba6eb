"""How a generation ends: at stop tokens and strings, full caches, rows that fail."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from generation_calls import PROMPTS, padded, run
from qllama_jax import session
from qllama_jax.metadata import Metadata
from qllama_jax.params import Linear
from reference import Reference


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
