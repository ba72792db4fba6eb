"""Where jax_enable_x64 is set, float32 weights and activations give what they give without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import random_blocks
from qllama_jax.matmul.cpu import pack
from qllama_jax.quants import FORMATS


@contextmanager
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "as in the file"])
def test_a_product_is_the_same(packed: bool, activations: Any, rows: int):
    raw = random_blocks(QType.Q4_0, (100, 64), np.random.default_rng(0))
    w: Any = pack("Q4_0", raw) if packed else FORMATS[QType.Q4_0].from_bytes(raw)
    x = np.random.default_rng(1).standard_normal((rows, 64), np.float32)
    multiply = jax.jit(ql.matmul, static_argnames="activations")

    def product() -> jax.Array:
        return multiply(jnp.asarray(x), jax.tree.map(jnp.asarray, w), activations=activations)

    wanted = product()
    with x64():
        found = product()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("prompt", [3, 600], ids=["at once", "in blocks"])
def test_a_generation_in_a_loop_over_layers_is_the_same(tiny_llama: Any, prompt: int):
    small: dict[str, Any] = {"layers": 2, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2}
    model = ql.load(tiny_llama("Q8_0", tokenizer=None, context_length=1024, **small))
    options: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True}
    ids = [i % 300 for i in range(prompt)]
    wanted = ql.generate(model, ids, **options)
    with x64(), jax.numpy_dtype_promotion("standard"):
        found = ql.generate(model, ids, **options)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=1e-6)


def test_a_generation_of_a_mixture_is_the_same(tiny_llama: Callable[..., Path]):
    small: dict[str, Any] = {"layers": 1, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2}
    path = tiny_llama("Q8_0", experts=2, experts_used=1, tokenizer=None, **small)
    model = ql.load(path, layout="file")
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "seed": 1}
    wanted = ql.generate(model, [1, 2, 3], **options)
    with x64(), jax.numpy_dtype_promotion("standard"):  # as users run it
        found = ql.generate(model, [1, 2, 3], **options)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=1e-6)
