"""A softmax's weighted sum over positions, some of them at a time (Milakov & Gimelshein 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from qllama_jax.carries import varying

# The score of a key that is not seen: its exponential is 0 beside any other's. Where none is
# larger, the scores of the keys that are seen have overflowed, and the result is NaN.
MASKED = np.float32(-1e30)


class Sums(NamedTuple):
    """Over the positions so far, with weights exp(score - largest)."""

    largest: Float32[Array, "*rows"]
    total: Float32[Array, "*rows"]
    out: Float32[Array, "*rows H"]

    @property
    def mean(self) -> Float32[Array, "*rows H"]:
        """The weighted mean; NaN for a row of which no score is above MASKED."""
        total = jnp.where(self.largest > MASKED, self.total, np.float32(np.nan))
        return self.out / total[..., None]


def over_blocks(
    add: Callable[[Sums, Int32[Array, ""]], Sums],
    blocks: int,
    shape: tuple[int, ...],
    seen: Callable[[Int32[Array, ""]], Array] | None,
    *like: Any,
) -> Sums:
    """Return add(... add(add(nothing, 0), 1) ..., blocks - 1), without those that are not `seen`.

    `shape` is that of `out`, and `like` are the arrays that `add` and `seen` compute with.
    """
    rows = shape[:-1]
    sums = Sums(
        largest=jnp.full(rows, MASKED),
        total=jnp.zeros(rows, jnp.float32),
        out=jnp.zeros(shape, jnp.float32),
    )
    sums = varying(sums, *like)
    if blocks == 1:
        return add(sums, jnp.int32(0))

    def step(sums: Sums, block: Int32[Array, ""]) -> tuple[Sums, None]:
        if seen is None:
            return add(sums, block), None
        return lax.cond(seen(block), add, lambda sums, _: sums, sums, block), None

    return lax.scan(step, sums, jnp.arange(blocks, dtype=jnp.int32))[0]
