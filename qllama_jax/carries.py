"""What loops start with and branches return, fit for a `jax.shard_map` around them."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int32, Key

Tree = TypeVar("Tree")


def varying(start: Tree, *like: Any) -> Tree:
    """Return `start`, its arrays varying over a mesh as what is computed of it and `like` does.

    Within a `shard_map` what a loop carries varies over the same axes of the mesh before a step and
    after it, and what a branch returns over those of the other's. A constant varies over none: here
    it varies over all that any array of `start` or `like`, trees of arrays, varies over; but keys
    of random numbers in `start` stay as they are. Elsewhere, and where nothing is checked, `start`
    is returned.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return start
    zeros = map(_zero, jax.tree.leaves((start, *like)))
    # Zeros, one for each way to vary, and not `lax.pcast`: which axes an array varies over JAX's
    # versions tell under different names.
    zero = functools.reduce(lax.add, {jax.typeof(z): z for z in zeros}.values(), jnp.int32(0))

    def vary(x: Array) -> Array:
        if _is_key(x):
            return x
        y = x | (zero > 0) if x.dtype == bool else x + zero.astype(x.dtype)
        return x if jax.typeof(x) == jax.typeof(y) else y

    return jax.tree.map(vary, start)


def _zero(leaf: ArrayLike | Key[Array, ...]) -> Int32[Array, ""]:
    """Return a zero that varies as `leaf` does."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return jnp.zeros_like(leaf, shape=(), dtype=jnp.int32)


def _is_key(leaf: ArrayLike | Key[Array, ...]) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
