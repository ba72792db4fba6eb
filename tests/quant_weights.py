"""Packed weights of every format and what gguf-py makes of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blocks import dequantize, random_blocks
from qllama_jax.quants import FORMATS
from qllama_jax.tensor_types import TensorType

every_format = pytest.mark.parametrize("qtype", list(FORMATS), ids=lambda qtype: qtype.name)


@jax.jit
def dequantized(w: Any) -> jax.Array:
    return w.dequantize()


def rng_of(qtype: TensorType) -> np.random.Generator:
    return np.random.default_rng([7, qtype.value])


def on_device(raw: np.ndarray, qtype: TensorType) -> Any:
    """Any, because leaves and methods of the formats differ."""
    return jax.tree.map(jnp.asarray, FORMATS[qtype].from_bytes(raw))


def some_weight(qtype: TensorType, *out: int, blocks: int = 2) -> tuple[Any, np.ndarray]:
    """A weight [*out, blocks * block_size] of finite values, and its raw bytes."""
    shape = (*out, blocks * FORMATS[qtype].block_size)
    raw = random_blocks(qtype, shape, rng_of(qtype))
    return on_device(raw, qtype), raw


def assert_same_bits(found: jax.Array, wanted: np.ndarray) -> None:
    """Equal float32 bits, so that -0 is not 0; one NaN is as good as another."""
    assert (found.dtype, wanted.dtype) == (np.float32, np.float32)
    assert found.shape == wanted.shape
    found_array, nan = np.asarray(found), np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found_array), nan)
    np.testing.assert_array_equal(found_array.view("u4")[~nan], wanted.view("u4")[~nan])


def oracle(raw: np.ndarray, qtype: TensorType) -> np.ndarray:
    """gguf-py's dequantize, which warns of the infinities that random bytes are full of."""
    with np.errstate(all="ignore"):
        return dequantize(raw, qtype).astype(np.float32)
