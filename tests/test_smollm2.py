"""A real model, SmolLM2-135M-Instruct in Q4_1: the float64 reference's logits, tokens and text."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from reference import Float64, Reference
from smollm2 import (
    NEW_TOKENS,
    PROMPTS,
    TEXTS,
    bytes_of_dense_layer,
    bytes_of_temporaries,
)

# float32 against float64, max|a - b| / max|b| over the vocabulary of one position.
FLOAT32 = 1e-5
DEMO = (
    ", the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling"
    " streets. But as the years went by, the city began to lose its original essence. The once-blue"
    " skies of the planet Earth began to fade, and the once-blue oceans of the ocean began to fade."
    " The once-blue"
)


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> ql.Model:
    return ql.load(smollm2_path)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Reference:
    return Reference(smollm2_path)


@pytest.fixture(scope="module")
def generated(model: ql.Model) -> dict[str, ql.Result]:
    results = ql.generate(
        model, list(PROMPTS), max_new_tokens=NEW_TOKENS, activations="float", ignore_eos=True
    )
    return dict(zip(PROMPTS, results, strict=True))


@pytest.fixture(scope="module")
def continued(
    model: ql.Model, reference: Reference, generated: dict[str, ql.Result]
) -> dict[str, Float64]:
    """Reference logits [NEW_TOKENS, V] that each generated token is chosen from."""
    logits = {}
    for prompt, result in generated.items():
        tokens = model.tokenizer.encode(prompt) + result.tokens
        hidden = reference.hidden(tokens)[-NEW_TOKENS - 1 : -1]
        logits[prompt] = reference.unembed(hidden)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("count", TEXTS)
def test_logits_equal_the_float64_reference_at_every_position(
    model: ql.Model, reference: Reference, count: int
):
    ids = model.tokenizer.encode(TEXTS[count])[:count]
    assert len(ids) == count
    tokens = np.zeros((1, 48), np.int32)
    tokens[0, :count] = ids
    logits, _ = ql.forward(
        model.params,
        jnp.asarray(tokens),
        ql.init_cache(model.config, 1, 64),
        config=model.config,
        lengths=jnp.asarray([count], jnp.int32),
    )
    found, wanted = np.asarray(logits[0, :count], np.float64), reference.logits(ids)
    error = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    assert error.max() <= FLOAT32
    assert found.argmax(axis=1).tolist() == wanted.argmax(axis=1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_the_reference(
    generated: dict[str, ql.Result], continued: dict[str, Float64], prompt: str
):
    # Each token is the reference's choice after those before it, which are its choices too: by
    # induction this is its greedy text, in one pass of the reference instead of 64.
    tokens = generated[prompt].tokens
    assert len(tokens) == NEW_TOKENS
    assert continued[prompt].argmax(axis=1).tolist() == tokens


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_log_probabilities_are_those_of_the_reference(
    generated: dict[str, ql.Result], continued: dict[str, Float64], prompt: str
):
    logits = continued[prompt] - continued[prompt].max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = logprobs[np.arange(NEW_TOKENS), generated[prompt].tokens]
    # Logits reach 40, and 1e-5 of that is the error of one.
    np.testing.assert_allclose(generated[prompt].logprobs, wanted, rtol=0, atol=8e-4)


@pytest.mark.slow
def test_greedy_text_of_the_demo_is_a_fixed_string(generated: dict[str, ql.Result]):
    assert generated[PROMPTS[0]].text == DEMO


@pytest.mark.slow
def test_no_dense_weight_outlives_its_use_in_generate_tokens(model: ql.Model):
    layer = bytes_of_dense_layer(model.config)
    assert layer == 14_155_776
    assert bytes_of_temporaries(model) < layer  # all dense weights would be 38 layers' worth
