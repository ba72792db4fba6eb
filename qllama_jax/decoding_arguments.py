"""What decoding takes besides a model: the tokens that stop a row, and a key a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32, Key, Shaped


def stop_ids(stop_tokens: Any, vocab_size: int) -> Int32[Array, " K"]:
    """Return stop tokens, a list or an array of ids, as an array.

    Raises TypeError for anything else; ValueError for a concrete id outside the vocabulary, which
    would end no row, or beyond int32 wrap to one that does.
    """
    wanted = "stop_tokens: expected a list of ids or int32[K]"
    if not isinstance(stop_tokens, Sequence) and not hasattr(stop_tokens, "shape"):
        raise TypeError(f"{wanted}, found {type(stop_tokens).__name__}")
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stop_tokens))
    try:
        ids: Any = jnp.asarray(stop_tokens) if traced else np.asarray(stop_tokens)
    except ValueError:
        raise TypeError(f"{wanted}, found lists of several lengths or depths") from None
    if ids.shape == (0,):
        return jnp.zeros((0,), jnp.int32)  # an empty list is one of floats
    bools = isinstance(stop_tokens, Sequence) and any(
        isinstance(token, bool | np.bool_) for token in stop_tokens
    )
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, np.integer) or bools:
        found = "a bool among them" if bools else f"{ids.dtype} of shape {ids.shape}"
        raise TypeError(f"{wanted}, found {found}")
    if not traced and (bad := np.flatnonzero((ids < 0) | (ids >= vocab_size))).size:
        raise ValueError(
            f"stop_tokens: token id {ids[bad[0]]} at index {bad[0]} is outside the vocabulary"
            f" 0..{vocab_size - 1}"
        )
    return jnp.asarray(ids, jnp.int32)


def row_keys(key: Shaped[Array, ...], batch_size: int) -> Key[Array, " B"]:
    """Return a key a row: `key` itself where it is `[B]`, else fold_in(key, row)."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # jax.random.PRNGKey's
    if key.ndim == 1:
        if key.shape != (batch_size,):
            raise ValueError(f"{key.shape[0]} keys for {batch_size} rows")
        return key
    rows = jnp.arange(batch_size)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
