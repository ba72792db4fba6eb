"""x @ dequantize(w).T for every kind of weight; the kind of the leaf picks the implementation.

A packing for another back end, or a wrapped weight (an adapter, say), is one more leaf type that
registers itself here. Only what loads weights and what looks up embeddings asks what one is.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from qllama_jax.carries import varying
from qllama_jax.matmul import xla
from qllama_jax.matmul.blocks import matmul_blocks
from qllama_jax.quants import Block

Activations = Literal["auto", "float", "int8", "int8x2"]


def matmul(
    x: Float[Array, "*batch in"], w: Any, *, activations: Activations = "float"
) -> Float[Array, "*batch out"]:
    """Compute x @ dequantize(w).T, accumulated in float32.

    Args:
        x: activations, `[*batch, in]`.
        w: a packed weight (`Block`) or a plain array, `[out, in]`.
        activations: how x enters the product with a packed weight. "float" as it is; "int8" rounded
            to 127 steps of the largest magnitude in each 32 values, as llama.cpp and candle do on a
            CPU; "int8x2" with the rounding error added as a second int8, 1/254 of a step; "auto"
            what is fastest for the leaf type: "float" for a `Block`; for integers of up to 6 bits
            packed for a CPU "int8", or, for more than 24 rows (16 in five bits) on a CPU that
            multiplies bfloat16, x and w rounded to that. So packed, the steps of "int8" are powers
            of two, up to 256 to the largest magnitude of each 32 or 16 values, and those of the
            second int8 of five and six bits 1/126 of them (see `matmul.cpu.rounding`). Of a
            product with normal activations "int8" loses 0.36 to 0.52 %, bfloat16 0.24.

    Returns:
        `[*batch, out]` in the dtype of x.

    Raises:
        ValueError: the inner sizes differ, or `activations` is none of the four.
        TypeError: x holds no floating-point numbers, or no implementation is registered for the
            type of w.

    Differentiable in reverse mode with respect to x and to plain arrays; a packed weight has no
    gradient, and no forward mode (`jax.jvp`).
    """
    _check_operands(x, w, activations)
    # Of an x that is the same on all devices, and w not, JAX then adds up the gradients to x.
    return _multiply(w, varying(x, w), activations)


def matmul_expert(
    x: Float[Array, "*batch in"],
    w: Any,
    expert: Int32[Array, ""],
    *,
    activations: Activations = "float",
) -> Float[Array, "*batch out"]:
    """Compute x @ dequantize(w)[expert].T for stacked weights `[E, out, in]`.

    Only that expert's bytes are read. `expert`, an int32 scalar, may be traced; it must lie in
    0..E-1. All else, errors included, is as in `matmul`.
    """
    _check_operands(x, w, activations)
    return _multiply_expert(w, varying(x, w, expert), expert, activations)


def check_activations(activations: str) -> None:
    """Raise ValueError unless `activations` names a way to multiply."""
    if activations not in get_args(Activations):
        raise ValueError(f"activations={activations!r}: expected one of {get_args(Activations)}")


def _check_operands(x: Array, w: Any, activations: str) -> None:
    check_activations(activations)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"matmul: x is {x.dtype}, expected floating-point activations")
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"matmul: x {x.shape} and w {w.shape} differ in their last axis")


@functools.singledispatch
def _multiply(w: Any, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    if not isinstance(w, jax.Array):
        raise TypeError(f"no matmul is registered for a weight of type {type(w).__name__}")
    return jnp.einsum("...i,oi->...o", x, w.astype(x.dtype), precision=xla.precision(x.dtype))


@functools.singledispatch
def _multiply_expert(
    w: Any, x: Float[Array, "*batch in"], expert: Int32[Array, ""], activations: Activations
) -> Array:
    if not isinstance(w, jax.Array):
        raise TypeError(f"no matmul_expert is registered for weights of type {type(w).__name__}")
    return _multiply(w[expert], x, activations)


register = _multiply.register
register_expert = _multiply_expert.register


@register
def _(w: Block, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    out, _ = w.shape
    return matmul_blocks(_rounded(x, w, activations), w, None, out)


@register_expert
def _(
    w: Block, x: Float[Array, "*batch in"], expert: Int32[Array, ""], activations: Activations
) -> Array:
    _, out, _ = w.shape
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), w)
    return matmul_blocks(_rounded(x, w, activations), rows, expert * np.int32(out), out)


def _rounded(x: Float[Array, "*batch in"], w: Block, activations: Activations) -> Array:
    # Numbers that are floats in the file meet float activations.
    return x if w.block_size == 1 else xla.round_activations(x, activations)
