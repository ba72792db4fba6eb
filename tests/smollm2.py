"""What the tests and scripts/compare_reference.py ask of SmolLM2-135M-Instruct."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import qllama_jax as ql

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

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees because",
    "My favorite theorem is",
)
NEW_TOKENS = 64


def bytes_of_temporaries(model: ql.Model) -> int:
    """Bytes that compiled `generate_tokens` needs besides weights, cache and results.

    16 prompt tokens and 32 new ones, one row, greedy.
    """
    static = ("config", "max_new_tokens", "activations")
    lowered = jax.jit(ql.generate_tokens, static_argnames=static).lower(
        model.params,
        jnp.zeros((1, 16), jnp.int32),
        jnp.asarray([16], jnp.int32),
        jax.random.key(0),
        config=model.config,
        sampling=ql.Sampling(),
        max_new_tokens=32,
        stop_tokens=jnp.zeros((1,), jnp.int32),
        activations="float",
    )
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def bytes_of_dense_layer(config: ql.ModelConfig) -> int:
    """Bytes of one layer's matrices in float32."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 4 * config.embed_dim * (2 * query + 2 * key + 3 * config.ffn_dim)
