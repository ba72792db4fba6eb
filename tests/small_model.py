"""A small model whose laws tests/model holds, and its reference with hooks.

Two layers, a vocabulary (389) and a feed-forward (96) of odd sizes, two query heads that share a
key-value head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql
from matrix import SMALL, V
from reference import Past, Reference

# float32 against float64, max|a - b| / max|b| over the vocabulary of one position.
FLOAT32 = 1e-5
# The same computation in another order of sums.
ROUNDING = 2e-6

D, B, T, S = SMALL["embed"], 3, 8, 32

Array = np.ndarray
Hook = Callable[[str, Array], Array]


class Hooked(Reference):
    """The reference with a function at every named activation, like `tap`; and given embeddings."""

    hook: Hook = staticmethod(lambda _, x: x)
    embeddings: Array | None = None

    def _forward(self, tokens: Any, past: Past) -> Array:
        return self._norm("output_norm", self.stream(tokens, past))

    def stream(self, tokens: Any, past: Past | None = None) -> Array:
        """Residual stream [T, D] after the last block."""
        past = self._nothing() if past is None else past
        x = self._embed(np.asarray(tokens)) if self.embeddings is None else self.embeddings
        for i in range(self.num_layers):
            at = functools.partial(self._at, i)
            x = at("in", x)
            y = at("attn_norm", self._norm(f"blk.{i}.attn_norm", x))
            x = at("mid", x + at("attn_out", self._attention(i, y, past)))
            y = at("ffn_norm", self._norm(f"blk.{i}.ffn_norm", x))
            x = at("out", x + at("ffn_out", self._feed_forward(i, y)))
        return x

    def _at(self, i: int, site: str, x: Array) -> Array:
        return self.hook(f"blk.{i}.{site}", x)


class Small:
    """The small model, its reference, and jitted functions that all laws share."""

    def __init__(self, path: Path) -> None:
        model = ql.load(path)
        self.path, self.params, self.config = path, model.params, model.config
        self.tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
        wanted = Reference(path)
        self.wanted = np.stack([wanted.logits(row) for row in self.tokens])

    def cache(self, rows: int = B, room: int = S, dtype: Any = jnp.float32) -> ql.KVCache:
        return ql.init_cache(self.config, rows, room, dtype)

    def forward(
        self, tokens: Any, cache: ql.KVCache | None = None, lengths: Any = None
    ) -> tuple[Array, ql.KVCache]:
        tokens = jnp.asarray(tokens, jnp.int32)
        cache = self.cache(len(tokens)) if cache is None else cache
        lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        logits, after = ql.forward(
            self.params, tokens, cache, config=self.config, lengths=jnp.asarray(lengths, jnp.int32)
        )
        return np.asarray(logits), after

    def logits_of(self, hidden: jax.Array) -> Array:
        return np.asarray(ql.unembed(self.params, hidden, config=self.config))


def errors(found: Any, wanted: Any) -> Array:
    """Relative error max|a - b| / max|b| of each position."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)


def hidden_of(small: Small, **options: Any) -> tuple[jax.Array, ql.KVCache, dict[str, jax.Array]]:
    tokens = options.pop("tokens", small.tokens)
    return ql.hidden_states(
        small.params,
        None if tokens is None else jnp.asarray(tokens),
        options.pop("cache", small.cache()),
        config=small.config,
        **options,
    )
