"""Scores are the log-softmax of forward's logits in float64; perplexity follows its recipe."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from reference import Reference
from tiny import write_tiny_llama

SMALL: dict[str, Any] = {"layers": 1, "embed": 64, "ffn": 96, "heads": 4, "context_length": 64}
V = 384


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("score") / "a.gguf", "Q8_0", **SMALL)


@pytest.fixture(scope="module")
def model(path: Path) -> ql.Model:
    return ql.load(path)


def wanted(path: Path, tokens: Any) -> np.ndarray:
    logits = Reference(path).logits(tokens)
    logits = logits - logits.max(axis=-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logprobs[np.arange(len(tokens) - 1), np.asarray(tokens)[1:]]


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, V, count).tolist()


@pytest.mark.parametrize("count", [2, 7, 8, 9, 33])
def test_scores_of_any_length_equal_the_float64_reference(model: ql.Model, path: Path, count: int):
    tokens = tokens_of(count)
    found = ql.score(model, tokens)
    assert found.tokens == tokens
    assert found.logprobs.shape == (count - 1,)
    np.testing.assert_allclose(found.logprobs, wanted(path, tokens), atol=3e-5)


def test_a_list_of_texts_gives_a_list_in_their_order(model: ql.Model, path: Path):
    texts = ["one two", "three"]
    for text, found in zip(texts, ql.score(model, texts), strict=True):
        assert found.tokens == model.tokenizer.encode(text)
        np.testing.assert_allclose(found.logprobs, wanted(path, found.tokens), atol=3e-5)


def test_one_token_has_no_score(model: ql.Model):
    assert ql.score(model, [5]).logprobs.shape == (0,)


@pytest.mark.parametrize("logits", [1, 3 * V, 5 * V, 10**9])
def test_chunks_of_any_size_change_no_score(
    model: ql.Model, path: Path, logits: int, monkeypatch: pytest.MonkeyPatch
):
    import sys

    monkeypatch.setattr(sys.modules["qllama_jax.score"], "LOGITS", logits)
    rows = [tokens_of(14, 1), tokens_of(14, 2)]
    lengths = jnp.asarray([14, 6], jnp.int32)
    jax.clear_caches()
    found = ql.token_logprobs(
        model.params, jnp.asarray(rows, jnp.int32), lengths, config=model.config, first=2
    )
    assert found.shape == (2, 11)
    np.testing.assert_allclose(found[0], wanted(path, rows[0])[2:], atol=3e-5)
    np.testing.assert_allclose(found[1, :3], wanted(path, rows[1])[2:5], atol=3e-5)
    np.testing.assert_array_equal(np.asarray(found)[1, 3:], 0)


def test_the_logits_of_all_positions_never_exist(model: ql.Model):
    T, vocab = 64, 2**17
    wide = jnp.zeros((vocab, 64), jnp.float32)
    params = model.params.replace(output=model.params.output.replace(weight=wide))  # type: ignore[attr-defined]
    config = type(model.config)(**{**vars(model.config), "vocab_size": vocab})
    arguments = (params, jnp.zeros((8, T), jnp.int32))
    compiled = ql.token_logprobs.lower(*arguments, config=config).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 8 * T * vocab * 4 // 2


def test_perplexity_is_that_of_the_second_halves_after_bos(model: ql.Model, path: Path):
    tokens = tokens_of(3 * 16 + 5)
    results = list(ql.perplexity(model, tokens, context=16))
    losses: list[float] = []
    for i in range(3):
        chunk = [1, *tokens[16 * i + 1 : 16 * (i + 1)]]  # 1 is BOS
        losses += (-wanted(path, chunk)[8:]).tolist()
        assert results[i].chunks == i + 1
        assert results[i].tokens == len(losses) == 7 * (i + 1)
        assert math.isclose(results[i].value, math.exp(np.mean(losses)), rel_tol=3e-5)
    error = results[-1].value * np.std(losses) / math.sqrt(len(losses) - 1)
    assert math.isclose(results[-1].error, error, rel_tol=1e-3)


def test_what_cannot_be_scored_is_refused(model: ql.Model):
    with pytest.raises(ql.ContextOverflowError, match="65 tokens, the model's context is 64"):
        ql.score(model, tokens_of(65))
    with pytest.raises(ValueError, match="token id 384 at index 1"):
        ql.score(model, [1, V])
    with pytest.raises(ValueError, match="15 tokens, wanted at least 16"):
        ql.perplexity(model, tokens_of(15), context=16)
    with pytest.raises(ValueError, match=r"context=3: expected 4\.\."):
        ql.perplexity(model, tokens_of(15), context=3)
    with pytest.raises(ql.ContextOverflowError, match="context=65: the model's is 64"):
        ql.perplexity(model, tokens_of(80), context=65)


TEN = list(range(3, 13))


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ("a text of some length", {}, TypeError, "tokens: .*, found str"),
        (b"a text of some length", {}, TypeError, "tokens: .*, found bytes"),
        ([float(t) for t in TEN], {}, TypeError, "tokens: .*, found float64"),
        ([True] * 10, {}, TypeError, "tokens: .*bool"),
        ([*TEN, V], {}, ValueError, f"tokens: token id {V} at index 10 is outside"),
        ([3, -1, *TEN], {}, ValueError, "tokens: token id -1 at index 1 is outside"),
        ([2**32 + 5, *TEN], {}, ValueError, "tokens: token id 4294967301 at index 0"),
        (np.asarray([TEN, TEN]), {}, TypeError, r"tokens: .* of shape \(2, 10\)"),
        (TEN, {"context": 8.0}, TypeError, "context=8.0: expected an integer"),
        (TEN, {"activations": "int4"}, ValueError, "activations='int4'"),
    ],
    ids=str,
)
def test_perplexity_refuses_at_the_call_what_are_no_tokens(
    model: ql.Model, tokens: Any, options: dict[str, Any], error: type, message: str
):
    unchecked: Any = inspect.unwrap(ql.perplexity)  # types are checked in tests alone
    with pytest.raises(error, match=message):
        unchecked(model, tokens, **{"context": 8, **options})


def test_perplexity_takes_an_array_and_leaves_it_as_it_is(model: ql.Model, path: Path):
    tokens = np.asarray(TEN, np.int32)
    (found,) = ql.perplexity(model, tokens, context=8)
    losses = -wanted(path, [1, *TEN[1:8]])[4:]  # 1 is BOS
    assert math.isclose(found.value, math.exp(np.mean(losses)), rel_tol=3e-5)
    assert tokens.tolist() == TEN


def test_a_weight_that_is_nan_is_an_error_not_a_score(model: ql.Model):
    norm = model.params.output_norm
    bad = model.params.replace(output_norm=norm.replace(weight=norm.weight * np.float32(np.nan)))  # type: ignore[attr-defined]
    spoiled = ql.Model(bad, model.config, model.metadata, model.path)
    with pytest.raises(ql.NumericalError, match="text 0: the log-probability of token 1 is nan"):
        ql.score(spoiled, [1, 2, 3])
    with pytest.raises(ql.NumericalError, match="chunk 0"):
        list(ql.perplexity(spoiled, tokens_of(8), context=8))


def test_a_first_position_without_a_next_token_is_refused(model: ql.Model):
    for first in (-1, 7):
        with pytest.raises(ValueError, match=f"first={first}: expected 0..6 for rows of 8 tokens"):
            ql.token_logprobs(
                model.params, jnp.zeros((1, 8), jnp.int32), config=model.config, first=first
            )
    with pytest.raises(ValueError, match="rows of 1 tokens: expected at least 2"):
        ql.token_logprobs(model.params, jnp.zeros((1, 1), jnp.int32), config=model.config)
