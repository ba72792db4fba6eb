"""The layers of a block as pure functions: linear, rms_norm, attention, swiglu.

Dimensions: B rows, T query positions, S key positions, D model, N query heads, K kv heads,
G = N // K query heads a kv head, H head size, F feed-forward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.matmul import Activations, matmul, xla
from qllama_jax.params import DenseBlock, Linear

# Queries that attend at a time: bounds the scores of a long prompt to N * QUERY_CHUNK * S floats.
QUERY_CHUNK = 256


def linear(
    x: Float[Array, "B T in"], layer: Linear, activations: Activations
) -> Float[Array, "B T out"]:
    """Compute x @ weight.T + bias."""
    y = matmul(x, layer.weight, activations=activations)
    return y if layer.bias is None else y + layer.bias[None, None].astype(y.dtype)


def rms_norm(x: Float[Array, "*batch D"], weight: Float32[Array, " D"], eps: float) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    scale = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return (x32 * lax.rsqrt(mean_square + np.float32(eps)) * scale).astype(x.dtype)


def swiglu(
    x: Float[Array, "B T D"], block: DenseBlock, activations: Activations
) -> Float[Array, "B T D"]:
    """Compute down(silu(gate(x)) * up(x)) (Shazeer 2020)."""
    gate = linear(x, block.ffn_gate, activations)
    up = linear(x, block.ffn_up, activations)
    return linear(jax.nn.silu(gate) * up, block.ffn_down, activations)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K H S"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of each query to the keys at positions up to its own.

    softmax(q k^T / sqrt(H)) v with the softmax in float32; kv head n // G serves query head n.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    grouped = q.reshape(B, T, K, N // K, H)
    if T <= QUERY_CHUNK or T % QUERY_CHUNK:
        out = _attend(grouped, k, v, positions)
    else:
        chunks = T // QUERY_CHUNK
        parts = lax.map(
            lambda part: _attend(part[0], k, v, part[1]),
            (
                grouped.reshape(B, chunks, QUERY_CHUNK, K, N // K, H).swapaxes(0, 1),
                positions.reshape(B, chunks, QUERY_CHUNK).swapaxes(0, 1),
            ),
        )
        out = parts.swapaxes(0, 1)
    return out.reshape(B, T, N, H)


def _attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K H S"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T K G H"]:
    precision = xla.precision(q.dtype)
    H, S = q.shape[-1], k.shape[2]
    scores = jnp.einsum(
        "BTKGH,BKSH->BKGTS",
        q * np.asarray(H**-0.5, q.dtype),
        k.astype(q.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    seen = lax.broadcasted_iota(jnp.int32, (1, 1, S), 2) <= positions[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, np.float32(-1e30))
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1).transpose(0, 3, 1, 2)[..., None]
    out = jnp.einsum(
        "BKGTS,BKHS->BTKGH",
        weights.astype(q.dtype),
        v.astype(q.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (out / total).astype(q.dtype)
