"""Prompts and calls that the tests of generations share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql

PROMPTS = [[5, 17, 300, 42, 9], [7], [11, 12, 13, 250, 251, 252, 253, 254, 100, 101, 102, 3, 8]]

SAMPLED: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "repeat_penalty": 1.2,
}

#: Penalties of what was said before, and typical-p.
FAR: dict[str, Any] = {
    "temperature": 1.0,
    "frequency_penalty": 0.4,
    "presence_penalty": -0.3,
    "typical_p": 0.9,
}


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
