"""x @ w.T for weights that are numbers of 8 or 16 bits each, x in float32, for a few rows of x.

Nearly as fast as memory gives the weights: 30 to 33 of 34 GB/s for Q8_0 [11264, 4096], ggml's
kernel 30 (jax 0.12, two cores of an EPYC Milan). More rows are faster by dequantized tiles.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qllama_jax.matmul.cpu.fence import fence_for
from qllama_jax.matmul.cpu.layouts import GROUP, groups_of_a_float_sum
from qllama_jax.matmul.cpu.weight import CPUWeight, as_float

MOST_ROWS = 12
# Sums that run side by side: in a single one each addition waits for the one before it.
CHAINS = 4


def multiply(x: Float[Array, "B in"], w: CPUWeight) -> Float32[Array, "B out"]:
    """Compute x @ w.dequantize().T."""
    B, _ = x.shape
    fence = fence_for(x)
    *stack, G, tiles, _, lanes = w.words.shape
    count = groups_of_a_float_sum(G)

    def of_rows(part: Array) -> Array:
        return w.take(part, B).reshape(G // count, B, tiles, lanes)

    # Each number is taken out of the whole in one step: XLA copies what many slices are taken of.
    words = w.words.reshape(*stack, G // count, count, tiles, GROUP, lanes)
    columns = fence(x.astype(jnp.float32).reshape(B, G, GROUP).swapaxes(0, 1))
    columns = columns.reshape(G // count, count, B, GROUP)
    y = np.float32(0)
    for i in range(count):
        chains: list[Array | np.float32] = [np.float32(0)] * CHAINS
        for j in range(GROUP):
            numbers = of_rows(words[..., i, :, j, :])
            chains[j % CHAINS] += as_float(numbers) * columns[:, i, :, None, j, None]
        total = sum(chains[1:], chains[0])
        if w.scale is not None:
            scale = w.scale.reshape(*stack, G // count, count, tiles, lanes)
            total = total * of_rows(scale[..., i, :, :]).astype(jnp.float32)
        y = y + total
    return fence(y).sum(0).reshape(B, w.padded)[:, : w.out]
