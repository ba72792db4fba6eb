"""What the tests of sampling call it with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql
from qllama_jax.penalties import penalize
from qllama_jax.sampling import kept, sample


def looking_back(tokens: Any, width: int = 64) -> jax.Array:
    """Recent tokens [B, W], the last ones those given, [B, n] with n <= W."""
    tokens = jnp.asarray(tokens, jnp.int32)
    B, n = tokens.shape
    return jnp.concatenate([jnp.full((B, width - n), -1, jnp.int32), tokens], axis=1)


NOTHING_RECENT = looking_back(np.zeros((1, 0)))


def logits_of(probabilities: Any) -> jax.Array:
    """Logits [1, V] of probabilities [V]."""
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.asarray(probabilities, np.float32)))[None]


def kept_ids(logits: jax.Array, **parameters: Any) -> list[int]:
    """Ids of the tokens that the filters leave in a single row, jitted."""
    keep = jax.jit(kept)(logits, ql.Sampling(**parameters).per_row(1))
    return np.flatnonzero(np.asarray(keep)[0]).tolist()


def draw(logits: jax.Array, keys: jax.Array, recent: Any = None, **parameters: Any) -> np.ndarray:
    """One token a key, all from the same logits [1, V]."""
    B = keys.shape[0]
    recent = jnp.broadcast_to(NOTHING_RECENT if recent is None else recent, (B, 64))
    rows = jnp.broadcast_to(logits, (B, logits.shape[-1]))
    tokens = jax.jit(sample)(rows, keys, ql.Sampling(**parameters).per_row(B), recent)
    assert tokens.dtype == np.int32
    return np.asarray(tokens)


def penalized(logits: jax.Array, recent: Any, repeat: Any, **penalties: Any) -> jax.Array:
    """`penalize` with numbers or [B] numbers; by default of all of `recent`."""
    B = logits.shape[0]
    fields = {"frequency": 0.0, "presence": 0.0, "last_n": np.int32(-1)} | penalties
    rows = {name: jnp.broadcast_to(jnp.asarray(x), (B,)) for name, x in fields.items()}
    repeat = jnp.broadcast_to(jnp.asarray(repeat), (B,))
    return penalize(logits, jnp.asarray(recent, jnp.int32), repeat=repeat, **rows)


def keys_of(number: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), number)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
