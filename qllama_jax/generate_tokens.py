"""The whole of a generation as one pure function: a prefill, then a while loop on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Shaped

from qllama_jax.cache import KVCache, init_cache
from qllama_jax.cache_tiles import TILE
from qllama_jax.config import ModelConfig
from qllama_jax.decoding import Finish, decode_many, prefill, start_decoding
from qllama_jax.decoding_arguments import row_keys, stop_ids
from qllama_jax.errors import ContextOverflowError
from qllama_jax.matmul import Activations
from qllama_jax.params import Params, StackedBlocks
from qllama_jax.penalties import PENALTY_WINDOW, recent_tokens
from qllama_jax.quants import Leaf
from qllama_jax.sampling import Sampling


@struct.dataclass
class Decoded:
    """Tokens of N steps: row b's are the first `lengths[b]`, its stop token included.

    `cache` is full where it was not given: to go on with it, `resize_cache` makes room.
    """

    tokens: Leaf  # int32[B, N]
    logprobs: Leaf  # float32[B, N], of the unmodified logits
    top_tokens: Leaf  # int32[B, N, n], the likeliest first
    top_logprobs: Leaf  # float32[B, N, n], of the unmodified logits
    lengths: Leaf  # int32[B]
    finish: Leaf  # int32[B], of Finish
    cache: KVCache
    history: Leaf  # int32[B, W - 1], W the penalty window: what came before the last token


def generate_tokens(
    params: Params,
    prompt: Int32[Array, "B T"],
    prompt_lengths: Int32[Array, " B"],
    key: Shaped[Array, ...],
    *,
    config: ModelConfig,
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Int32[Array, " K"] | Sequence[Any],
    cache: KVCache | None = None,
    history: Int32[Array, "B H"] | None = None,
    activations: Activations = "auto",
    penalty_window: int = PENALTY_WINDOW,
    top_logprobs: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Decoded:
    """Generate up to N = max_new_tokens tokens a row: one prefill, then a while loop.

    Args:
        params: the weights.
        prompt: ids `int32[B, T]`, rows right-padded with anything.
        prompt_lengths: `int32[B]`, at least 1.
        key: one key, or one a row (`key[B]`; of the raw kind `uint32[B, 2]`).
        config: what the file says (static under jit, as are max_new_tokens, activations,
            penalty_window, top_logprobs and dtype).
        sampling: how tokens are chosen.
        max_new_tokens: N, at least 1.
        stop_tokens: ids that end a row, `int32[K]` or a list; K may be 0.
        cache: what came before the prompt; None: nothing.
        history: the tokens before the prompt, `int32[B, H]`, -1 where there are fewer; the
            penalties alone look at them. Fewer than penalty_window - 1 count as all there were.
        activations: as in `matmul`.
        penalty_window: how many recent tokens are kept for the penalties; penalty_last_n is at most
            that, and -1 (all of them) wants one more than there are.
        top_logprobs: n, of how many of the likeliest tokens to return the log-probabilities.
        dtype: of the activations, as in `forward`, and of a cache that is made here.

    Returns:
        `Decoded`. Its cache holds the prompt and all new tokens but the last. To go on as if
        nothing had been cut, give that token as the next prompt, with `cache` and `history`; the
        cache that was made here has no room for more, or little, so first make some with
        `resize_cache`. Rows that end in `Finish.ERROR` failed after `lengths[b]` tokens.

    Raises:
        ValueError: N, T or penalty_window is below 1, n is not in 0..V, `history` has another
            number of rows, or a stop token or a parameter of sampling is concrete and out of range,
            such as a penalty_last_n above penalty_window (what is traced and above it ends its row
            in `Finish.ERROR`).
        TypeError: stop_tokens or a parameter of sampling that are no numbers.
        ContextOverflowError: T + N positions do not fit the cache, or the model's context.
    """
    B, T = prompt.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if not 0 <= top_logprobs <= config.vocab_size:
        raise ValueError(f"top_logprobs={top_logprobs}: expected 0..{config.vocab_size}")
    if T + max_new_tokens > config.context_length:
        raise ContextOverflowError(
            f"prompt of {T} + {max_new_tokens} new tokens: the model's context is"
            f" {config.context_length}"
        )
    stop_tokens = stop_ids(stop_tokens, config.vocab_size)
    if cache is None:
        stacked, mesh = isinstance(params.blk, StackedBlocks), params.partitioning
        room = T + max_new_tokens
        if stacked:  # whole tiles decode fastest
            room = -(-room // TILE) * TILE
        cache = init_cache(config, B, room, dtype, mesh=mesh, stacked=stacked)
    if T + max_new_tokens > cache.max_length:
        raise ContextOverflowError(
            f"prompt of {T} + {max_new_tokens} new tokens: the cache has {cache.max_length}"
        )
    logits, cache = prefill(
        params, prompt, prompt_lengths, cache, config=config, activations=activations, dtype=dtype
    )
    recent = recent_tokens(prompt, prompt_lengths, history, penalty_window=penalty_window)
    state, first = start_decoding(
        logits,
        cache,
        recent,
        row_keys(key, B),
        sampling,
        stop_tokens,
        top_logprobs=top_logprobs,
    )
    chosen = jax.tree.map(lambda column: column[:, None], first)
    if max_new_tokens > 1:
        state, more, _ = decode_many(
            params,
            state,
            sampling,
            stop_tokens,
            max_new_tokens - 1,
            config=config,
            max_steps=max_new_tokens - 1,
            activations=activations,
            top_logprobs=top_logprobs,
            dtype=dtype,
        )
        chosen = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), chosen, more)
    running = state.finish == int(Finish.RUNNING)
    return Decoded(
        tokens=chosen.tokens,
        logprobs=chosen.logprobs,
        top_tokens=chosen.top_tokens,
        top_logprobs=chosen.top_logprobs,
        lengths=state.generated,
        finish=jnp.where(running, np.int32(Finish.LENGTH), state.finish),
        cache=state.cache,
        history=state.recent[:, :-1],
    )
