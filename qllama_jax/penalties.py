"""Tokens that came before make themselves less likely: what is looked back on, and what it costs.

How far back is traced (`Sampling.penalty_last_n`), up to the width of the buffer of recent tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

# Width of the buffer of recent tokens where nobody asks for more: llama.cpp's penalty_last_n.
PENALTY_WINDOW = 64


def recent_tokens(
    prompt: Int32[Array, "B T"],
    prompt_lengths: Int32[Array, " B"],
    history: Int32[Array, "B H"] | None = None,
    *,
    penalty_window: int = PENALTY_WINDOW,
) -> Int32[Array, "B W"]:
    """Return the last W = penalty_window tokens of each row, -1 in front of a shorter one.

    `history` is what came before the prompt, -1 where there was nothing. W is static, at least 1.
    Raises ValueError for another W, and for a history of another number of rows.
    """
    if penalty_window < 1:
        raise ValueError(f"penalty_window={penalty_window}: expected at least 1")
    if history is not None:
        if history.ndim != 2 or history.shape[0] != prompt.shape[0]:
            raise ValueError(
                f"history of shape {history.shape}: expected ({prompt.shape[0]}, H), as there are"
                f" {prompt.shape[0]} rows"
            )
        prompt = jnp.concatenate([history, prompt], axis=1)
        prompt_lengths = prompt_lengths + history.shape[1]
    index = prompt_lengths[:, None] + np.arange(-penalty_window, 0, dtype=np.int32)[None]
    tokens = jnp.take_along_axis(prompt, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, tokens, -1)


def holds_window(recent: Int32[Array, "B W"], last_n: Int32[Array, " B"]) -> Bool[Array, " B"]:
    """Return whether the last_n tokens looked back on are all among `recent`.

    last_n <= W, or last_n = -1, all tokens so far, where there is room for one more than they are.
    """
    return (last_n <= recent.shape[1]) & ((last_n >= 0) | (recent[:, 0] < 0))


def penalize(
    logits: Float32[Array, "B V"],
    recent: Int32[Array, "B W"],
    *,
    repeat: Float32[Array, " B"],
    frequency: Float32[Array, " B"],
    presence: Float32[Array, " B"],
    last_n: Int32[Array, " B"],
) -> Float32[Array, "B V"]:
    """(l / repeat if l > 0 else l repeat) - c frequency - presence, where a token came c > 0 times.

    Counted are the last `last_n` of `recent` (-1: all); ids outside 0..V-1 count not. The first
    penalty is that of Keskar et al. 2019 (CTRL), made to work for negative logits; the formula and
    its order are those of llama.cpp's penalties sampler.
    """
    B, V = logits.shape
    _, W = recent.shape
    back = np.arange(W, 0, -1, dtype=np.int32)[None]
    looked_at = (back <= last_n[:, None]) | (last_n < 0)[:, None]
    ids = jnp.where(looked_at & (recent >= 0) & (recent < V), recent, V)
    counts = jnp.zeros((B, V), jnp.int32).at[np.arange(B)[:, None], ids].add(1, mode="drop")
    factor = repeat[:, None]
    changed = jnp.where(logits > 0, logits / factor, logits * factor)
    changed -= counts.astype(jnp.float32) * frequency[:, None] + presence[:, None]
    return jnp.where(counts > 0, changed, logits)
