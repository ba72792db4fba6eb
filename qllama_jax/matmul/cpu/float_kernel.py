"""x @ w.T for weights that are numbers of 8 or 16 bits each, x in float32, for few rows of x."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from qllama_jax.matmul.cpu.layouts import GROUP
from qllama_jax.matmul.cpu.weight import CPUWeight

MOST_ROWS = 4
# Sums that run side by side: one alone waits for each addition before it can begin the next.
CHAINS = 4


def multiply(x: Float[Array, "B in"], w: CPUWeight) -> Float[Array, "B out"]:
    """Compute x @ w.dequantize().T."""
    B, _ = x.shape
    G = w.words.shape[0]
    U = 2 if G % 2 == 0 else 1
    def nth(a, u): return a.reshape(G // U, U, *a.shape[1:])[:, u]
    xs = lax.optimization_barrier(x.astype(jnp.float32).T.reshape(G, GROUP, B))
    total = None
    for u in range(U):
        words, part = nth(w.words, u), nth(xs, u)
        chains = [None] * CHAINS
        for j in range(GROUP):
            term = words[:, :, None, j].astype(jnp.float32) * part[:, j][:, None, :, None]
            c = j % CHAINS
            chains[c] = term if chains[c] is None else chains[c] + term
        y = (chains[0] + chains[1]) + (chains[2] + chains[3])
        if w.scale is not None:
            y = y * nth(w.scale, u)[:, :, None].astype(jnp.float32)
        total = y if total is None else total + y
    y = lax.optimization_barrier(total).sum(0)
    return y.transpose(1, 0, 2).reshape(B, -1)[:, : w.out].astype(x.dtype)
