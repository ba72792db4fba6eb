"""How llama.cpp's CPU code rounds activations before a product with quantized weights.

Between its logits and exact ones lies nothing else, so a computation that rounds alike has to give
the same logits. Three do: `RoundedReference` in float64, `rounded_like_ggml` for the package, and
llama.cpp. Written from ggml-quants.c and ggml-cpu (quantize_row_q8_0, q8_1, q8_K).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as QType
from jax import lax

from qllama_jax.quants import Block
from reference import Float64, Reference

# By its name: in the package that one is the function.
matmul: Any = importlib.import_module("qllama_jax.matmul")

#: Weights whose block has a minimum meet Q8_1: its sums of d q are numbers of their own.
_Q8_1 = {QType.Q4_1, QType.Q5_1}
_Q8_0 = {
    *(QType.Q4_0, QType.Q5_0, QType.Q8_0, QType.IQ4_NL, QType.Q1_0, QType.MXFP4, QType.NVFP4),
}


def rounded(x: Any, qtype: QType, xp: ModuleType) -> Any:
    """Activations [..., in] as a product with weights of `qtype` sees them; xp is numpy or jnp."""
    if qtype == QType.F32:
        return x
    if qtype in (QType.F16, QType.BF16):
        return _through(x, "float16" if qtype == QType.F16 else "bfloat16", xp)
    d, q = _integers(x, 32 if qtype in _Q8_0 | _Q8_1 else 256, xp)
    # Q8_K, with which the formats of 256 are multiplied, has a float32 scale.
    d = _through(d, "float16", xp) if qtype in _Q8_0 | _Q8_1 else d
    return (d * q).reshape(x.shape)


def excess_of_sums(x: Any, xp: ModuleType) -> Any:
    """By how much the sums [..., in / 32] that Q8_1 keeps are larger than those of rounded x."""
    d, q = _integers(x, 32, xp)
    total = q.sum(axis=-1, keepdims=True)
    return (_through(d * total, "float16", xp) - _through(d, "float16", xp) * total)[..., 0]


def _integers(x: Any, size: int, xp: ModuleType) -> tuple[Any, Any]:
    """Scales d and integers q, x = d q to half a step: 127 steps to the largest of each `size`."""
    groups = x.reshape(*x.shape[:-1], -1, size)
    largest = xp.abs(groups).max(axis=-1, keepdims=True)
    inverse = xp.where(largest > 0, 127 / xp.where(largest > 0, largest, 1), 0)
    return largest / 127, xp.round(groups * inverse)


def _through(x: Any, dtype: str, xp: ModuleType) -> Any:
    """Round float32 numbers below 65,504 to float16 or bfloat16, and back."""
    if xp is np:
        return x.astype(jnp.dtype(dtype)).astype(x.dtype)
    # In integers: XLA leaves out a conversion there and back, on a GPU one through the bits too.
    lost = 13 if dtype == "float16" else 16
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + np.uint32(2 ** (lost - 1) - 1) + ((bits >> np.uint32(lost)) & np.uint32(1))
    normal = lax.bitcast_convert_type(bits & np.uint32(2**32 - 2**lost), jnp.float32)
    if dtype == "bfloat16":
        return normal
    subnormal = jnp.round(x * np.float32(2**24)) * np.float32(2**-24)
    return jnp.where(jnp.abs(x) < np.float32(2**-14), subnormal, normal)


class RoundedReference(Reference):
    """The float64 reference, with llama.cpp's rounding of activations."""

    def _product(self, x: Float64, name: str, e: int | None = None) -> Float64:
        tensor = self.tensors[name]
        y = super()._product(rounded(x, tensor.tensor_type, np), name, e)
        if tensor.tensor_type not in _Q8_1:
            return y
        size = {QType.Q4_1: 20, QType.Q5_1: 24}[tensor.tensor_type]
        blocks = tensor.data.reshape(*tensor.data.shape[:-1], -1, size)
        minima = blocks[..., 2:4].copy().view("<f2")[..., 0].astype(np.float64)
        return y + excess_of_sums(x, np) @ (minima if e is None else minima[e]).T


@contextlib.contextmanager
def rounded_like_ggml() -> Iterator[None]:
    """Within it the package rounds activations as llama.cpp does, whatever `activations` says."""
    multiply, multiply_expert = matmul._multiply, matmul._multiply_expert

    def product(w: Any, x: jax.Array, activations: Any) -> jax.Array:
        if not isinstance(w, Block):
            return multiply(w, x, activations)
        y = multiply(w, rounded(x, QType(w.qtype), jnp), "float")
        if w.qtype not in _Q8_1:
            return y
        minima = getattr(w, "m").astype(jnp.float32)  # noqa: B009 (a field of these two formats)
        return y + jnp.matmul(excess_of_sums(x, jnp), minima.T, precision="highest")

    def product_of_expert(w: Any, x: jax.Array, expert: Any, activations: Any) -> jax.Array:
        assert not isinstance(w, Block) or w.qtype not in _Q8_1
        x = rounded(x, QType(w.qtype), jnp) if isinstance(w, Block) else x
        return multiply_expert(w, x, expert, "float")

    matmul._multiply, matmul._multiply_expert = product, product_of_expert
    jax.clear_caches()  # what is compiled does not look at them
    try:
        yield
    finally:
        matmul._multiply, matmul._multiply_expert = multiply, multiply_expert
        jax.clear_caches()
