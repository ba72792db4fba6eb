"""Nothing is written past the end of a context or a cache, and nothing before it is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from reference import Reference

#: No power of two, so that prompts near it are padded beyond it; it lies within the second cache.
CONTEXT = 140
V = 389
SMALL: dict[str, Any] = {"layers": 2, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": V}


@pytest.fixture(scope="module")
def path(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("Q8_0", context_length=CONTEXT, tokenizer=None, **SMALL)


@pytest.fixture(scope="module")
def model(path: Path) -> ql.Model:
    return ql.load(path, layout="file")


def tokens_of(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, V, count).tolist()


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 14])
def test_a_generation_that_ends_with_the_context_is_the_float64_references(
    model: ql.Model, path: Path, length: int
):
    prompt, new = tokens_of(length), CONTEXT - length
    found = ql.generate(model, prompt, max_new_tokens=new)
    assert found.tokens == Reference(path).greedy(prompt, new)
    assert found.finish_reason == "length"


@pytest.mark.parametrize(
    ("length", "new", "room"),
    [
        (CONTEXT - 1, 2, 1),
        (CONTEXT, 1, 0),
        (CONTEXT + 1, 1, 0),
        (10 * CONTEXT, 1, 0),
        (1, CONTEXT, CONTEXT - 1),
        (1, 2**31 - 1, CONTEXT - 1),
    ],
)
def test_one_token_more_is_refused_with_the_numbers(
    model: ql.Model, length: int, new: int, room: int
):
    wanted = (
        f"^prompt of {length} tokens .* max_new_tokens={new}: the model's context is {CONTEXT}"
        f" tokens; after this prompt there is room for {room}$"
    )
    prompt = tokens_of(length)
    for call in (ql.generate, ql.stream):
        with pytest.raises(ql.ContextOverflowError, match=wanted):
            call(model, prompt, max_new_tokens=new)
    with pytest.raises(ql.ContextOverflowError, match=wanted):  # the longest row's numbers
        ql.generate(model, [[1], prompt, [2]], max_new_tokens=new)


@pytest.mark.parametrize("length", [CONTEXT + 1, 10 * CONTEXT])
def test_so_is_the_score_of_a_text_that_is_longer_than_the_context(model: ql.Model, length: int):
    with pytest.raises(ql.ContextOverflowError, match=f"{length} tokens.* context is {CONTEXT}$"):
        ql.score(model, tokens_of(length))
    with pytest.raises(ql.ContextOverflowError, match=f"context={length}: the model's is"):
        ql.perplexity(model, tokens_of(length), context=length)


@pytest.mark.parametrize(("padded", "new", "room"), [(128, 1, 120), (112, 9, 120), (128, 13, 512)])
def test_the_pure_function_counts_a_prompts_padding(
    model: ql.Model, padded: int, new: int, room: int
):
    """100 tokens would fit; what lies in the padding is written nowhere, but its room is asked."""
    tokens = np.zeros((1, padded), np.int32)
    tokens[0, :100] = tokens_of(100)
    with pytest.raises(ql.ContextOverflowError, match=f"^prompt of {padded} . {new} new tokens: "):
        ql.generate_tokens(
            model.params,
            jnp.asarray(tokens),
            jnp.asarray([100], jnp.int32),
            jnp.zeros((2,), jnp.uint32),
            config=model.config,
            sampling=ql.Sampling(),
            max_new_tokens=new,
            stop_tokens=[],
            cache=ql.init_cache(model.config, 1, room),
        )


# The arrays


def filled_to(model: ql.Model, room: int, count: int) -> tuple[list[np.ndarray], ql.KVCache]:
    """Logits of tokens that fill a cache in calls of 16 (padded) and then one by one."""
    tokens, cache = np.asarray([tokens_of(count)], np.int32), ql.init_cache(model.config, 1, room)
    logits = []
    for at in range(0, 40, 13):
        part = np.zeros((1, 16), np.int32)
        part[:, :13] = tokens[:, at : at + 13]
        lengths = jnp.asarray([13], jnp.int32)
        found, cache = ql.forward(
            model.params, jnp.asarray(part), cache, config=model.config, lengths=lengths
        )
        logits.append(np.asarray(found)[0, :13])
    for at in range(52, count):
        found, cache = ql.forward(
            model.params, jnp.asarray(tokens[:, at : at + 1]), cache, config=model.config
        )
        logits.append(np.asarray(found)[0])
    return logits, cache


def test_a_cache_that_is_full_has_the_bits_of_a_larger_ones_filled_part(model: ql.Model):
    logits, full = filled_to(model, 64, 64)
    more_logits, larger = filled_to(model, 128, 64)
    assert full.lengths.tolist() == larger.lengths.tolist() == [64]
    for small, large in zip(full.k, larger.k, strict=True):
        np.testing.assert_array_equal(small, np.asarray(large)[..., :64])
        assert not np.asarray(large)[..., 64:].any()
    for small, large in zip(full.v, larger.v, strict=True):
        np.testing.assert_array_equal(small, np.asarray(large)[:, :, :64])
        assert not np.asarray(large)[:, :, 64:].any()
    for one, other in zip(logits, more_logits, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("more", [1, 2, 16])
def test_what_comes_after_a_full_cache_is_nan_and_changes_no_bit_of_it(model: ql.Model, more: int):
    _, full = filled_to(model, 64, 64)
    logits, after = ql.forward(
        model.params,
        jnp.asarray([tokens_of(16)]),
        full,
        config=model.config,
        lengths=jnp.asarray([more], jnp.int32),
    )
    assert np.isnan(np.asarray(logits)).all()
    assert after.lengths.tolist() == [65]
    for old, new in zip((*full.k, *full.v), (*after.k, *after.v), strict=True):
        np.testing.assert_array_equal(old, new)
