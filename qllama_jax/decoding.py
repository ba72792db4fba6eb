"""Prompt tokens in, generated tokens out, as pure functions: prefill, decode_many, generate_tokens.

They nest in jit, vmap and scan. The parameters of sampling, the stop tokens and the number of steps
are traced, so changing them compiles nothing again.

The token drawn for position p of a row uses the key fold_in(row_key, p) and nothing else, so a
text comes out the same in one call, in many, resumed, alone or in a batch.
"""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float32, Int32, Key, Shaped

from qllama_jax.cache import KVCache, init_cache
from qllama_jax.config import ModelConfig
from qllama_jax.errors import ContextOverflowError
from qllama_jax.matmul import Activations
from qllama_jax.model import hidden_states, unembed
from qllama_jax.params import Params
from qllama_jax.quants import Leaf
from qllama_jax.sampling import PENALTY_WINDOW, Sampling, sample


class Finish(enum.IntEnum):
    """Why a row stopped. ERROR: its logits were not finite, or it was poisoned (see `forward`)."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3


@struct.dataclass
class DecodeState:
    """What a decoding step needs of those before it.

    `token[b]` was chosen for position `cache.lengths[b]` and is not in the cache yet; `recent`
    holds the last tokens before and with it, -1 where there are fewer; `finish` a `Finish` a row;
    `generated` counts the tokens chosen so far.
    """

    cache: KVCache
    token: Leaf  # int32[B]
    recent: Leaf  # int32[B, PENALTY_WINDOW]
    keys: Leaf  # key[B]
    finish: Leaf  # int32[B]
    generated: Leaf  # int32[B]


@struct.dataclass
class Decoded:
    """Tokens of N steps: row b's are the first `lengths[b]`, its stop token included."""

    tokens: Leaf  # int32[B, N]
    logprobs: Leaf  # float32[B, N], of the unmodified logits
    lengths: Leaf  # int32[B]
    finish: Leaf  # int32[B], of Finish
    cache: KVCache
    history: Leaf  # int32[B, PENALTY_WINDOW - 1]: what came before the last token


def prefill(
    params: Params,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    cache: KVCache,
    *,
    config: ModelConfig,
    activations: Activations = "auto",
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Return the logits of each row's last counted token, without [B, T, V], and the cache.

    Arguments as in `forward`. A row of length 0 has no last token: its logits are NaN.
    """
    hidden, cache, _ = hidden_states(
        params, tokens, cache, config=config, lengths=lengths, activations=activations
    )
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    logits = unembed(params, hidden, config=config, activations=activations)
    return jnp.where((lengths > 0)[:, None], logits, np.float32(np.nan)), cache


def start_decoding(
    logits: Float32[Array, "B V"],
    cache: KVCache,
    recent: Int32[Array, "B W"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    stop_tokens: Int32[Array, " K"],
) -> tuple[DecodeState, Float32[Array, " B"]]:
    """Choose the first token from a prefill's logits; return the state and its log-probability.

    `recent` is what `recent_tokens` gives, `keys` what `row_keys` does.
    """
    B, _ = logits.shape
    state = DecodeState(
        cache=cache,
        token=jnp.zeros((B,), jnp.int32),
        recent=recent,
        keys=keys,
        finish=jnp.full((B,), int(Finish.RUNNING), jnp.int32),
        generated=jnp.zeros((B,), jnp.int32),
    )
    return _choose(state, logits, sampling.per_row(B), stop_tokens)


def decode_many(
    params: Params,
    state: DecodeState,
    sampling: Sampling,
    stop_tokens: Int32[Array, " K"],
    steps: Int32[Array, ""] | int,
    *,
    config: ModelConfig,
    max_steps: int,
    activations: Activations = "auto",
) -> tuple[DecodeState, Int32[Array, "B N"], Float32[Array, "B N"], Int32[Array, ""]]:
    """Run up to `steps` (traced, at most N = max_steps) steps; stop when every row has stopped.

    Returns the state, each step's tokens (0 for rows that had stopped before or failed in it),
    their log-probabilities, and the number of steps that ran.
    """
    B = state.token.shape[0]
    tokens = jnp.zeros((B, max_steps), jnp.int32)
    logprobs = jnp.zeros((B, max_steps), jnp.float32)
    sampling = sampling.per_row(B)

    def unfinished(carry: tuple) -> Array:
        i, state, *_ = carry
        return (i < steps) & (i < max_steps) & jnp.any(state.finish == int(Finish.RUNNING))

    def step(carry: tuple) -> tuple:
        i, state, tokens, logprobs = carry
        # Ties the weights to the loop: XLA would hoist their dequantization out of it otherwise,
        # and keep every dense weight alive.
        pinned, token = lax.optimization_barrier((params, state.token))
        running = state.finish == int(Finish.RUNNING)
        hidden, cache, _ = hidden_states(
            pinned,
            token[:, None],
            state.cache,
            config=config,
            lengths=running.astype(jnp.int32),
            activations=activations,
        )
        logits = unembed(pinned, hidden[:, 0], config=config, activations=activations)
        state, logprob = _choose(
            dataclasses.replace(state, cache=cache), logits, sampling, stop_tokens
        )
        column = (np.int32(0), i)
        tokens = lax.dynamic_update_slice(tokens, state.token[:, None], column)
        logprobs = lax.dynamic_update_slice(logprobs, logprob[:, None], column)
        return i + 1, state, tokens, logprobs

    carry = (jnp.int32(0), state, tokens, logprobs)
    ran, state, tokens, logprobs = lax.while_loop(unfinished, step, carry)
    return state, tokens, logprobs, ran


def _choose(
    state: DecodeState,
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    stop_tokens: Int32[Array, " K"],
) -> tuple[DecodeState, Float32[Array, " B"]]:
    """Choose each running row's next token from the logits and see whether it ends the row.

    `sampling` holds `per_row` parameters.
    """
    running = state.finish == int(Finish.RUNNING)
    failed = running & ~jnp.isfinite(jnp.max(logits, axis=-1))
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.cache.lengths)
    token = sample(logits, keys, sampling, state.recent)
    token = jnp.where(running & ~failed, token, 0)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
    stopped = running & jnp.any(token[:, None] == stop_tokens[None], axis=-1)
    finish = jnp.where(stopped, np.int32(Finish.STOP), state.finish)
    finish = jnp.where(failed, np.int32(Finish.ERROR), finish)
    recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
    state = dataclasses.replace(
        state,
        token=token,
        recent=jnp.where(running[:, None], recent, state.recent),
        finish=finish,
        generated=state.generated + (running & ~failed).astype(jnp.int32),
    )
    return state, jnp.where(running & ~failed, logprob, 0)


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


def recent_tokens(
    prompt: Int32[Array, "B T"],
    prompt_lengths: Int32[Array, " B"],
    history: Int32[Array, "B H"] | None = None,
) -> Int32[Array, "B W"]:
    """Return the last PENALTY_WINDOW tokens of each row, -1 in front of a shorter one.

    `history` is what came before the prompt, -1 where there was nothing.
    """
    if history is not None:
        prompt = jnp.concatenate([history, prompt], axis=1)
        prompt_lengths = prompt_lengths + history.shape[1]
    index = prompt_lengths[:, None] + np.arange(-PENALTY_WINDOW, 0, dtype=np.int32)[None]
    tokens = jnp.take_along_axis(prompt, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, tokens, -1)


def generate_tokens(
    params: Params,
    prompt: Int32[Array, "B T"],
    prompt_lengths: Int32[Array, " B"],
    key: Shaped[Array, ...],
    *,
    config: ModelConfig,
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Int32[Array, " K"],
    cache: KVCache | None = None,
    history: Int32[Array, "B H"] | None = None,
    activations: Activations = "auto",
) -> Decoded:
    """Generate up to N = max_new_tokens tokens a row: one prefill, then a while loop.

    Args:
        params: the weights.
        prompt: ids `int32[B, T]`, rows right-padded with anything.
        prompt_lengths: `int32[B]`, at least 1.
        key: one key, or one a row (`key[B]`; of the raw kind `uint32[B, 2]`).
        config: what the file says (static under jit, as are max_new_tokens and activations).
        sampling: how tokens are chosen.
        max_new_tokens: N, at least 1.
        stop_tokens: ids that end a row, `int32[K]`; K may be 0.
        cache: what came before the prompt; None: nothing.
        history: the tokens before the prompt, `int32[B, H]`, -1 where there are fewer; the repeat
            penalty alone looks at them.
        activations: as in `matmul`.

    Returns:
        `Decoded`. Its cache holds the prompt and all new tokens but the last. To go on as if
        nothing had been cut, give that token as the next prompt, with `cache` and `history`. Rows
        that end in `Finish.ERROR` failed after `lengths[b]` tokens.

    Raises:
        ValueError: N is below 1.
        ContextOverflowError: T + N positions do not fit the cache, or the model's context.
    """
    B, T = prompt.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if T + max_new_tokens > config.context_length:
        raise ContextOverflowError(
            f"prompt of {T} + {max_new_tokens} new tokens: the model's context is"
            f" {config.context_length}"
        )
    if cache is None:
        cache = init_cache(config, B, T + max_new_tokens)
    if T + max_new_tokens > cache.max_length:
        raise ContextOverflowError(
            f"prompt of {T} + {max_new_tokens} new tokens: the cache has {cache.max_length}"
        )
    logits, cache = prefill(
        params, prompt, prompt_lengths, cache, config=config, activations=activations
    )
    recent = recent_tokens(prompt, prompt_lengths, history)
    state, logprob = start_decoding(logits, cache, recent, row_keys(key, B), sampling, stop_tokens)
    first_token, first_logprob = state.token[:, None], logprob[:, None]
    tokens, logprobs = first_token, first_logprob
    if max_new_tokens > 1:
        state, more_tokens, more_logprobs, _ = decode_many(
            params,
            state,
            sampling,
            stop_tokens,
            max_new_tokens - 1,
            config=config,
            max_steps=max_new_tokens - 1,
            activations=activations,
        )
        tokens = jnp.concatenate([tokens, more_tokens], axis=1)
        logprobs = jnp.concatenate([logprobs, more_logprobs], axis=1)
    running = state.finish == int(Finish.RUNNING)
    return Decoded(
        tokens=tokens,
        logprobs=logprobs,
        lengths=state.generated,
        finish=jnp.where(running, np.int32(Finish.LENGTH), state.finish),
        cache=state.cache,
        history=state.recent[:, :-1],
    )
