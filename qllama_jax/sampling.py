"""Logits and a key -> a token. Every parameter is traced: changing one compiles nothing again.

The filters follow llama.cpp's chain and its order: repeat penalty, top-k, top-p, min-p, then
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

from qllama_jax.quants import Leaf

# Tokens that the repeat penalty looks back on, the default of llama.cpp's penalty_last_n.
PENALTY_WINDOW = 64


@struct.dataclass
class Sampling:
    """How the next token is chosen; each field a number or one a row (`[B]`).

    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens until their probabilities reach p (the one that crosses
        included); 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
    repeat_penalty: divides the positive and multiplies the negative logits of the tokens among
        the last 64, prompt included; 1 changes nothing.
    """

    temperature: Leaf = 0.0
    top_k: Leaf = 0
    top_p: Leaf = 1.0
    min_p: Leaf = 0.0
    repeat_penalty: Leaf = 1.0

    def per_row(self, batch_size: int) -> Sampling:
        """Return the same with every field an array `[B]`: float32, top_k int32."""

        def row(value: Leaf, dtype: DTypeLike) -> Array:
            return jnp.broadcast_to(jnp.asarray(value, dtype), (batch_size,))

        return Sampling(
            temperature=row(self.temperature, jnp.float32),
            top_k=row(self.top_k, jnp.int32),
            top_p=row(self.top_p, jnp.float32),
            min_p=row(self.min_p, jnp.float32),
            repeat_penalty=row(self.repeat_penalty, jnp.float32),
        )


def check_sampling(sampling: Sampling, batch_size: int | None = None) -> None:
    """Raise for a concrete parameter that is out of range; what is traced is not looked at.

    A parameter is a number or `batch_size` of them, and is judged as the float32 that it becomes.
    Raises TypeError for what is no number, ValueError for the rest.

    The ranges: temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repeat_penalty > 0.
    """
    wanted = {
        "temperature": ("a finite number >= 0", lambda v: np.isfinite(v) & (v >= 0)),
        "top_k": (
            "an integer 0 .. 2^31 - 1",
            lambda v: (v >= 0) & (v < 2**31) & (v == np.trunc(v)),
        ),
        "top_p": ("0 < top_p <= 1", lambda v: (v > 0) & (v <= 1)),
        "min_p": ("0 <= min_p <= 1", lambda v: (v >= 0) & (v <= 1)),
        "repeat_penalty": ("a finite number > 0", lambda v: np.isfinite(v) & (v > 0)),
    }
    for name, (allowed, inside) in wanted.items():
        value = getattr(sampling, name)
        if isinstance(value, Tracer):
            continue
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iuf":
            raise TypeError(f"{name}={value!r}: expected {allowed}")
        if batch_size is not None and numbers.shape not in ((), (batch_size,)):
            raise ValueError(f"{name}: {numbers.shape} numbers for {batch_size} rows")
        if name != "top_k":
            with np.errstate(over="ignore"):
                numbers = numbers.astype(np.float32)
        if not np.all(inside(numbers)):
            raise ValueError(f"{name}={value}: expected {allowed}")


def sample(
    logits: Float32[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    recent: Int32[Array, "B W"],
) -> Int32[Array, " B"]:
    """Choose a token a row.

    Args:
        logits: unmodified logits.
        keys: a key a row, `key[B]`; a row of temperature 0 does not use its own.
        sampling: `per_row` parameters.
        recent: the tokens before this one, for the repeat penalty; ids outside 0..V-1 count not.
    """
    logits = penalize(logits, recent, sampling.repeat_penalty)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int32[Array, " B"]:
        V = logits.shape[-1]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys)
        warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
        # From the largest down, so that a tiny temperature makes no two of them infinite.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / warm
        noisy = jnp.where(kept(logits, sampling), scaled + noise, -jnp.inf)
        drawn = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def penalize(
    logits: Float32[Array, "B V"], recent: Int32[Array, "B W"], penalty: Float32[Array, " B"]
) -> Float32[Array, "B V"]:
    """Apply the repeat penalty of Keskar et al. 2019 (CTRL) once to each distinct recent token."""
    B, V = logits.shape
    rows = np.arange(B)[:, None]
    inside = (recent >= 0) & (recent < V)
    seen = logits[rows, jnp.where(inside, recent, 0)]
    factor = penalty[:, None]
    changed = jnp.where(seen > 0, seen / factor, seen * factor)
    return logits.at[rows, jnp.where(inside, recent, V)].set(changed, mode="drop")


def kept(logits: Float32[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Return which tokens top-k, then top-p, then min-p leave; always the most likely one.

    Of equally likely tokens the one with the smaller id counts as the more likely.
    """
    V = logits.shape[-1]
    by_rank = ((sampling.top_k > 0) & (sampling.top_k < V)) | (sampling.top_p < 1)
    keep = lax.cond(
        jnp.any(by_rank),
        lambda: _kept_by_rank(logits, sampling),
        lambda: jnp.ones(logits.shape, bool),
    )
    # p / p_max = exp(logit - logit_max), whatever the tokens that were cut before.
    top = jnp.max(logits, axis=-1, keepdims=True)
    return keep & (jnp.exp(logits - top) >= jnp.minimum(sampling.min_p, 1)[:, None])


def _kept_by_rank(logits: Float32[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    B, V = logits.shape
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = np.arange(V, dtype=np.int32)[None]
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, V)[:, None]
    keep = rank < top_k
    probabilities = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding must not cut what top_p = 1 keeps.
    keep &= (before < sampling.top_p[:, None]) | (sampling.top_p >= 1)[:, None]
    keep |= rank == 0
    return jnp.zeros((B, V), bool).at[np.arange(B)[:, None], order].set(keep)
