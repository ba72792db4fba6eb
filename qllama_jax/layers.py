"""The layers of a block as pure functions: linear, rms_norm, swiglu; for attention see there.

Dimensions: B rows, T positions, D model.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from qllama_jax.matmul import Activations, matmul
from qllama_jax.params import DenseBlock, Linear


@functools.partial(jax.jit, static_argnames="activations")
def linear(
    x: Float[Array, "B T in"], layer: Linear, activations: Activations
) -> Float[Array, "B T out"]:
    """Compute x @ weight.T + bias."""
    y = matmul(x, layer.weight, activations=activations)
    return y if layer.bias is None else y + layer.bias[None, None].astype(y.dtype)


def rms_norm(x: Float[Array, "*batch D"], weight: Float32[Array, " D"], eps: float) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019).

    NaN where the mean overflows, that is for x from about 1e19 on.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    # Else such an x would turn into zeros, which look like any other activations.
    inverse = jnp.where(
        mean_square < np.inf, lax.rsqrt(mean_square + np.float32(eps)), np.float32(np.nan)
    )
    scale = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return (x32 * inverse * scale).astype(x.dtype)


def swiglu(
    x: Float[Array, "B T D"], block: DenseBlock, activations: Activations
) -> Float[Array, "B T D"]:
    """Compute down(silu(gate(x)) * up(x)) (Shazeer 2020)."""
    gate = linear(x, block.ffn_gate, activations)
    up = linear(x, block.ffn_up, activations)
    return linear(jax.nn.silu(gate) * up, block.ffn_down, activations)
