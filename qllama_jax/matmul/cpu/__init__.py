"""Weights packed for a CPU, and which kernel multiplies with them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qllama_jax.matmul import Activations, register, xla
from qllama_jax.matmul.cpu import bfloat16_kernel, float_kernel, int8_kernel
from qllama_jax.matmul.cpu.layouts import LAYOUTS
from qllama_jax.matmul.cpu.pack import can_pack, pack
from qllama_jax.matmul.cpu.weight import CPUWeight

__all__ = ["LAYOUTS", "CPUWeight", "can_pack", "pack"]


@register
def _(w: CPUWeight, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    *batch, width = x.shape
    rows = x.reshape(-1, width)
    B = rows.shape[0]
    if B == 0:
        return jnp.zeros((*batch, w.out), x.dtype)
    if not w.layout.words:
        # These have no integer kernel to gain from. Numbers that are floats in the file meet float
        # activations.
        if w.format == "Q8_0":
            rows = xla.round_activations(rows, activations)
        y = _few_rows(rows, w) if B <= float_kernel.MOST_ROWS else _tiles(rows, w)
    elif activations == "float":
        y = _tiles(rows, w)
    else:
        y = _rounded(rows, w, activations == "int8x2")
    return y.reshape(*batch, w.out)


@jax.custom_vjp
def _tiles(x: Float[Array, "B in"], w: CPUWeight) -> Float[Array, "B out"]:
    y = xla.by_tiles(x, w, jnp.int32(0), w.padded)
    return y[:, : w.out].astype(x.dtype)


@jax.custom_vjp
def _few_rows(x: Float[Array, "B in"], w: CPUWeight) -> Float[Array, "B out"]:
    return float_kernel.multiply(x, w).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x: Float[Array, "B in"], w: CPUWeight, with_residual: bool) -> Float[Array, "B out"]:
    rows = x.shape[0]
    if int8_kernel.is_fastest(rows, w, with_residual):
        return int8_kernel.multiply(x, w, with_residual).astype(x.dtype)
    if bfloat16_kernel.is_fastest():
        return bfloat16_kernel.multiply(x, w, with_residual).astype(x.dtype)
    # In float32: a product with half floats would round the weights.
    rounded = int8_kernel.round_activations(x.astype(jnp.float32), w.layout, with_residual)
    return _tiles(rounded, w).astype(x.dtype)


def _pull_back(w: CPUWeight, dy: Float[Array, "B out"]) -> tuple[Float[Array, "B in"], None]:
    # The gradient of the exact product: that of rounding is zero everywhere.
    filled = jnp.pad(dy, ((0, 0), (0, w.padded - w.out)))
    return xla.pull_back(filled, w, jnp.int32(0), w.padded), None


_tiles.defvjp(lambda x, w: (_tiles(x, w), w), _pull_back)
_few_rows.defvjp(lambda x, w: (_few_rows(x, w), w), _pull_back)
_rounded.defvjp(
    lambda x, w, with_residual: (_rounded(x, w, with_residual), w),
    lambda _, w, dy: _pull_back(w, dy),
)
