"""A real model, SmolLM2-135M-Instruct in Q4_1: the float64 reference's logits, tokens and text."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from reference import Float64, Reference

# float32 against float64, max|a - b| / max|b| over the vocabulary of one position.
FLOAT32 = 1e-5
NEW_TOKENS = 64

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees because",
    "My favorite theorem is",
)
#: Number of tokens -> a text that has at least as many.
TEXTS = {
    4: "Once upon a time there was",
    12: "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    24: "The Treaty of Westphalia, signed in 1648, ended thirty years of war in Germany and eighty"
    " years of war between Spain and the Netherlands.",
    48: "Q: A train leaves at 9:40 and arrives at 13:05, and stops on the way for 25 minutes. How"
    " long was it moving?\nA: From 9:40 to 13:05 are 3 hours and 25 minutes. Without the stop of 25"
    " minutes that leaves 3 hours in which the train was moving.\n",
}
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
    config = model.config
    sampling, N = ql.Sampling(), 32
    lowered = jax.jit(
        ql.generate_tokens, static_argnames=("config", "max_new_tokens", "activations")
    ).lower(
        model.params,
        jnp.zeros((1, 16), jnp.int32),
        jnp.asarray([16], jnp.int32),
        jax.random.key(0),
        config=config,
        sampling=sampling,
        max_new_tokens=N,
        stop_tokens=jnp.zeros((1,), jnp.int32),
        activations="float",
    )
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.embed_dim * (2 * query + 2 * key + 3 * config.ffn_dim)
    assert 4 * layer == 14_155_776
    assert analysis.temp_size_in_bytes < 4 * layer  # all dense weights would be 38 layers' worth
