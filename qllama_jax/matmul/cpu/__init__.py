"""The CPU's packing of a weight, and the kernels that multiply with it."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from qllama_jax.matmul import Activations, register, xla
from qllama_jax.matmul.cpu import float_kernel, int8_kernel
from qllama_jax.matmul.cpu.layouts import LAYOUTS
from qllama_jax.matmul.cpu.pack import pack
from qllama_jax.matmul.cpu.weight import CPUWeight

__all__ = ["LAYOUTS", "CPUWeight", "pack"]


@register
def _(w: CPUWeight, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    *batch, width = x.shape
    rows = x.reshape(-1, width)
    if not w.layout.words:
        # These kernels are at the speed of memory with float activations: rounding gains nothing.
        if w.format == "Q8_0":
            rows = xla.round_activations(rows, activations)
        y = _float(rows, w)
    elif activations == "float":
        y = _tiles(rows, w)
    else:
        y = _int8(rows, w, activations == "int8x2")
    return y.reshape(*batch, w.out)


def _float(x, w):
    B, _ = x.shape
    return float_kernel.multiply(x, w) if B <= float_kernel.MOST_ROWS else _tiles(x, w)


def _tiles(x, w):
    return xla.matmul_rows(x, w, jnp.int32(0), w.padded)[:, : w.out]


def _with_gradient(kernel):
    """Give a kernel `(x, w, *static) -> x @ w.T` the gradient of the exact product."""

    @functools.wraps(kernel)
    def run(x, w, *static):
        return differentiable(x, w, static)

    @functools.partial(__import__("jax").custom_vjp, nondiff_argnums=(2,))
    def differentiable(x, w, static):
        return kernel(x, w, *static)

    def forward(x, w, static):
        return differentiable(x, w, static), w

    def backward(static, w, dy):
        padded = jnp.pad(dy, ((0, 0), (0, w.padded - w.out)))
        return xla.pull_back(padded, w, jnp.int32(0), w.padded), None

    differentiable.defvjp(forward, backward)
    return run


_int8 = _with_gradient(int8_kernel.multiply)
_float = _with_gradient(_float)
