"""Logits and a key -> a token. Every parameter is traced: changing one compiles nothing again.

The chain and its order are llama.cpp's: logit bias, penalties, top-k, typical-p, top-p, min-p,
temperature. The draw adds Gumbel noise to the logits that are left and takes the largest
(Gumbel-max), with one noise value a token id, so filters never change which noise a token gets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int32, Key

from qllama_jax.carries import varying
from qllama_jax.penalties import PENALTY_WINDOW, holds_window, penalize
from qllama_jax.quants import Leaf


@struct.dataclass
class Sampling:
    """How the next token is chosen; each field but the last a number or one a row (`[B]`).

    temperature: divides the logits; 0 takes the most likely token that the filters leave.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens until their probabilities reach p (the one that crosses
        included); 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
    repeat_penalty: divides the positive and multiplies the negative logits of the tokens that the
        penalties look back on; 1 changes nothing.
    presence_penalty: is taken from the logit of each such token; 0 changes nothing.
    frequency_penalty: is taken from it for every time that the token came; 0 changes nothing.
    penalty_last_n: how many tokens the three penalties look back on, prompt included; 0: none,
        -1: all. `recent_tokens` has to hold them.
    typical_p: keep the tokens whose -log p is nearest to the entropy until their probabilities
        exceed typical_p (the one that crosses included); 1 keeps all. Meister et al. 2022.
    logit_bias: is added to the logits first: 0, or float `[V]` or `[B, V]`; -inf bans a token.
    """

    temperature: Leaf = 0.0
    top_k: Leaf = 0
    top_p: Leaf = 1.0
    min_p: Leaf = 0.0
    repeat_penalty: Leaf = 1.0
    presence_penalty: Leaf = 0.0
    frequency_penalty: Leaf = 0.0
    penalty_last_n: Leaf = PENALTY_WINDOW
    typical_p: Leaf = 1.0
    logit_bias: Leaf = 0.0

    def per_row(self, batch_size: int) -> Sampling:
        """Return the same with every field an array `[B]`: float32, top_k and penalty_last_n int32.

        logit_bias becomes float32 `[B, V]`, or `[B, 1]` of a number.
        """

        # Numpy compiles nothing: these would be programs before the first token.
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self))
        xp = jnp if traced else np

        def row(value: Leaf, dtype: DTypeLike = np.float32) -> Array | np.ndarray:
            return xp.broadcast_to(xp.asarray(value, dtype), (batch_size,))

        bias = xp.asarray(self.logit_bias, np.float32)
        columns = bias.shape[-1] if bias.ndim else 1
        return Sampling(
            temperature=row(self.temperature),
            top_k=row(self.top_k, np.int32),
            top_p=row(self.top_p),
            min_p=row(self.min_p),
            repeat_penalty=row(self.repeat_penalty),
            presence_penalty=row(self.presence_penalty),
            frequency_penalty=row(self.frequency_penalty),
            penalty_last_n=row(self.penalty_last_n, np.int32),
            typical_p=row(self.typical_p),
            logit_bias=xp.broadcast_to(bias, (batch_size, columns)),
        )


def check_window(sampling: Sampling, penalty_window: int) -> None:
    """Raise ValueError for a concrete penalty_last_n above the window that is to hold it."""
    last_n = sampling.penalty_last_n
    if not isinstance(last_n, Tracer) and np.any(np.asarray(last_n) > penalty_window):
        raise ValueError(
            f"penalty_last_n={last_n}: the window of recent tokens (penalty_window) has"
            f" {penalty_window}"
        )


def sample(
    logits: Float32[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    recent: Int32[Array, "B W"],
) -> Int32[Array, " B"]:
    """Choose a token a row; -1 where none can be chosen.

    That is where a logit is not finite, where bias and penalties leave no finite largest one, and
    where `recent` does not hold all that penalty_last_n looks back on (see `holds_window`).

    Args:
        logits: unmodified logits.
        keys: a key a row, `key[B]`; a row of temperature 0 does not use its own.
        sampling: `per_row` parameters.
        recent: the tokens before this one, for the penalties; ids outside 0..V-1 count not.
    """
    sampling = jax.tree.map(jnp.asarray, sampling)
    # So that all branches below vary over a mesh alike.
    logits, sampling = varying((logits, sampling), keys, recent)
    finite = jnp.isfinite(logits)
    logits = penalize(
        logits + sampling.logit_bias,
        recent,
        repeat=sampling.repeat_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        last_n=sampling.penalty_last_n,
    )

    def choose() -> Int32[Array, " B"]:
        V = logits.shape[-1]
        left = jnp.where(kept(logits, sampling), logits, -jnp.inf)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys)
        warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
        # From the largest down, so that a tiny temperature makes no two of them infinite. A huge
        # one has no reciprocal, of which XLA would make NaN of what is cut.
        scaled = (left - jnp.max(left, axis=-1, keepdims=True)) / warm
        scaled = jnp.where(left > -jnp.inf, scaled, -jnp.inf)
        drawn = _likeliest(scaled + noise)
        return jnp.where(sampling.temperature > 0, drawn, _likeliest(left))

    # Of the filters, typical-p alone can cut the most likely token.
    filtered = jnp.any((sampling.temperature > 0) | (sampling.typical_p < 1))
    token = lax.cond(filtered, choose, lambda: _likeliest(logits))
    # The largest alone does not tell: XLA's maximum on a CPU passes over a NaN among thousands of
    # logits, or of some 64 rows of them (0.10 and 0.12).
    chooses = jnp.all(finite & ~jnp.isnan(logits), axis=-1) & jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(chooses & holds_window(recent, sampling.penalty_last_n), token, -1)


def _likeliest(logits: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """Return the first index of the largest; of a row with NaN any.

    As `argmax`, of which XLA computes one number after the other on a CPU: 136 us of 32,000, this
    15 (jax 0.12, an EPYC Turin).
    """
    V = logits.shape[-1]
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, jnp.arange(V, dtype=jnp.int32), np.int32(V - 1)).min(axis=-1)


def kept(logits: Float32[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Return which tokens top-k, then typical-p, then top-p, then min-p leave; at least one.

    Each judges the probabilities of those that the ones before it left. Of equally likely tokens
    the one with the smaller id counts as the more likely, of equally typical ones the more likely.
    """
    V = logits.shape[-1]
    by_rank = (sampling.top_k > 0) & (sampling.top_k < V)
    by_rank |= (sampling.typical_p < 1) | (sampling.top_p < 1)
    keep = lax.cond(
        jnp.any(by_rank),
        lambda: _kept_by_rank(logits, sampling),
        lambda: jnp.ones_like(logits, bool),
    )
    # p / p_max = exp(logit - logit_max), whatever the tokens that were cut before.
    top = jnp.max(jnp.where(keep, logits, -jnp.inf), axis=-1, keepdims=True)
    return keep & (jnp.exp(logits - top) >= jnp.minimum(sampling.min_p, 1)[:, None])


def _kept_by_rank(logits: Float32[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    B, V = logits.shape
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(V, dtype=jnp.int32)[None]
    keep = rank < jnp.where(sampling.top_k > 0, sampling.top_k, V)[:, None]
    keep = lax.cond(
        jnp.any(sampling.typical_p < 1),
        lambda: _typical(ranked, keep, sampling.typical_p),
        lambda: keep,
    )
    first = rank == lax.argmax(keep, 1, jnp.int32)[:, None]
    before = _before(jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1))
    # Rounding must not cut what top_p = 1 keeps.
    keep &= (before < sampling.top_p[:, None]) | (sampling.top_p >= 1)[:, None]
    return jnp.zeros((B, V), bool).at[np.arange(B)[:, None], order].set(keep | first)


def _typical(
    logits: Float32[Array, "B V"],
    keep: Bool[Array, "B V"],
    typical_p: Float32[Array, " B"],
) -> Bool[Array, "B V"]:
    B, _ = logits.shape
    logp = jax.nn.log_softmax(jnp.where(keep, logits, -jnp.inf), axis=-1)
    p = jnp.exp(logp)
    entropy = -jnp.sum(jnp.where(p > 0, p * logp, 0), axis=-1, keepdims=True)
    order = jnp.argsort(jnp.abs(logp + entropy), axis=-1, stable=True)
    before = _before(jnp.take_along_axis(p, order, axis=-1))
    near = (before <= typical_p[:, None]) | (typical_p >= 1)[:, None]
    return keep & jnp.zeros_like(keep).at[np.arange(B)[:, None], order].set(near)


def _before(probabilities: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
    """Return the sum of the probabilities in front of each."""
    return jnp.cumsum(probabilities, axis=-1) - probabilities
