"""Gradients are central differences of the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from matrix import V
from small_model import Array, D, Hooked, Small

PREFIX, SUFFIX = 3, 4
GRADIENT = 2e-5  # relative to the largest component


class Differentiated:
    """A loss of the small model and of its reference after a prefix: a weighted sum of logits."""

    def __init__(self, small: Small, prefix: int) -> None:
        rng = np.random.default_rng(5)
        self.small, self.prefix = small, small.tokens[0, :prefix]
        self.embeddings = 0.2 * rng.standard_normal((SUFFIX, D))
        self.cotangent = rng.standard_normal((SUFFIX, V))
        self.reference = Hooked(small.path)
        self.past = self.reference._nothing()
        if prefix:
            self.reference.stream(self.prefix, self.past)

    def wanted(self, embeddings: Array) -> float:
        self.reference.embeddings = embeddings
        hidden = self.reference._forward(None, list(self.past))
        return float((self.reference.unembed(hidden) * self.cotangent).sum())

    def found(self, embeddings: jax.Array, steer: jax.Array, cache: ql.KVCache) -> jax.Array:
        hidden, _, _ = ql.hidden_states(
            self.small.params,
            None,
            cache,
            config=self.small.config,
            inputs_embeds=embeddings[None],
            tap=lambda name, x: x + steer[None, None] if name == "blk.0.attn_out" else x,
        )
        logits = ql.unembed(self.small.params, hidden, config=self.small.config)
        return jnp.sum(logits[0] * jnp.asarray(self.cotangent, jnp.float32))

    def gradients(self) -> tuple[Array, Array]:
        """Of the embeddings, and of a steering vector."""
        cache = self.small.cache(1)
        if len(self.prefix):
            _, cache = self.small.forward(self.prefix[None], cache)
        embeddings, steer = jnp.asarray(self.embeddings, jnp.float32), jnp.zeros(D)
        both = jax.jit(jax.grad(self.found, argnums=(0, 1)))(embeddings, steer, cache)
        return np.asarray(both[0]), np.asarray(both[1])


def central_differences(f: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    gradient = np.zeros(x.size)
    for i in range(x.size):
        shift = np.zeros(x.size)
        shift[i] = step
        shift = shift.reshape(x.shape)
        gradient[i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient.reshape(x.shape)


@pytest.fixture(scope="module", params=[0, PREFIX], ids=["no_prefix", "cached_prefix"])
def differentiated(small: Small, request: pytest.FixtureRequest) -> Differentiated:
    return Differentiated(small, request.param)


def test_gradients_equal_differences_of_the_float64_reference(differentiated: Differentiated):
    case = differentiated
    by_embeddings, by_steer = case.gradients()
    wanted = central_differences(case.wanted, case.embeddings)
    assert np.abs(wanted).max() > 0.1
    assert np.abs(by_embeddings - wanted).max() / np.abs(wanted).max() <= GRADIENT

    def steered(vector: Array) -> float:
        hook = case.reference.hook
        case.reference.hook = lambda n, x: x + vector if n == "blk.0.attn_out" else x
        result = case.wanted(case.embeddings)
        case.reference.hook = hook
        return result

    wanted = central_differences(steered, np.zeros(D))
    assert np.abs(wanted).max() > 0.1
    assert np.abs(by_steer - wanted).max() / np.abs(wanted).max() <= GRADIENT


def test_a_gradient_keeps_no_scores_of_attention(tiny_llama: Any):
    T, heads = 512, 4

    def temp_bytes(layers: int) -> int:
        model = ql.load(tiny_llama(layers=layers, context_length=T), layout="file")

        def loss(embeddings: jax.Array) -> jax.Array:
            cache = ql.init_cache(model.config, 1, T)
            hidden, _, _ = ql.hidden_states(
                model.params, None, cache, config=model.config, inputs_embeds=embeddings
            )
            return (hidden**2).mean()

        embeddings = jax.ShapeDtypeStruct((1, T, model.config.embed_dim), jnp.float32)
        analysis = jax.jit(jax.grad(loss)).lower(embeddings).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Of some arrays of scores, [heads, T, T], that a layer computes; kept, they were five.
    assert temp_bytes(4) - temp_bytes(2) < 2 * 2.5 * (4 * heads * T * T)
