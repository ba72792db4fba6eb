"""The model of most of these tests, and the pure function, compiled once a file."""

from __future__ import annotations

import jax
import pytest

import qllama_jax as ql


@pytest.fixture(scope="module")
def path(tiny_llama):
    return tiny_llama("Q4_0", context_length=4096)


@pytest.fixture(scope="module")
def model(path):
    # Blocks as in the file meet exact activations, and compile fastest.
    return ql.load(path, layout="file")


@pytest.fixture(scope="module")
def generate_tokens():
    static = ("config", "max_new_tokens", "activations", "penalty_window", "top_logprobs")
    return jax.jit(ql.generate_tokens, static_argnames=static)
