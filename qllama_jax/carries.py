"""What a loop starts with, or a branch returns, fit for a `jax.shard_map` around it."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Tree = TypeVar("Tree")


def varying(start: Tree, *like: Any) -> Tree:
    """Return numbers or truths that vary over a mesh as what is computed from them and `like`.

    Within a `shard_map` what a loop carries varies over the same axes of the mesh before a step and
    after it, and what a branch returns over those of the other's, while a constant varies over
    none: here it varies over those, too, that any array of `like`, arrays and trees of them,
    varies over. Elsewhere nothing is done.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return start
    zeros = [jnp.zeros_like(leaf, shape=(), dtype=jnp.int32) for leaf in jax.tree.leaves(like)]
    # One of those that vary alike.
    zero = functools.reduce(lax.add, {jax.typeof(z): z for z in zeros}.values(), jnp.int32(0))

    def vary(x: Array) -> Array:
        return x | (zero > 0) if x.dtype == bool else x + zero.astype(x.dtype)

    return jax.tree.map(vary, start)
