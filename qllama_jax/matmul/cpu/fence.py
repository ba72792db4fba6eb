"""A border that XLA's CPU compiler does not fuse across."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qllama_jax.carries import varying

Tree = TypeVar("Tree")
Fence = Callable[[Tree], Tree]

# Before 0.11 XLA fused across an optimization barrier: 333 instead of 105 us for a row of Q4_0
# [2048, 2048] (0.10.2). It does not fuse across a loop; but loops take twice as long to compile.
BARRIER_HOLDS = jax.__version_info__ >= (0, 11)


def fence_for(numbers: Array) -> Fence:
    """Return a function that gives back its argument, computed apart from what follows.

    `numbers`, one at least, only serve to make one that XLA cannot know: of the trips of a loop.
    """
    if BARRIER_HOLDS:
        return lax.optimization_barrier
    first = numbers.reshape(-1)[0].astype(jnp.float32)
    once = jnp.where(first > np.float32(3e38), np.int32(2), np.int32(1))
    return lambda tree: lax.fori_loop(
        0, once, lambda _, t: lax.optimization_barrier(t), varying(tree, once)
    )
