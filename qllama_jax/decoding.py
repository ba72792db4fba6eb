"""Prompt tokens in, generated tokens out, as pure functions: prefill, start_decoding, decode_many.

They nest in jit, vmap and scan. The parameters of sampling, the stop tokens and the number of steps
are traced, so changing them compiles nothing again.

The token drawn for position p of a row uses the key fold_in(row_key, p) and nothing else, so a
text comes out the same in one call, in many, resumed, alone or in a batch: as far as logits do, to
which float rounding adds its part, and more where activations are rounded (see `matmul`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Key

from qllama_jax.cache import KVCache
from qllama_jax.carries import varying
from qllama_jax.config import ModelConfig
from qllama_jax.decoding_arguments import stop_ids
from qllama_jax.matmul import Activations
from qllama_jax.model import hidden_states, unembed
from qllama_jax.params import Params
from qllama_jax.quants import Leaf
from qllama_jax.sampling import Sampling, check_window, sample
from qllama_jax.sampling_ranges import check_sampling


class Finish(enum.IntEnum):
    """Why a row stopped. ERROR: no token could be chosen.

    Its logits were not finite, as in a poisoned row (see `forward`), or became so by biases and
    penalties, or penalty_last_n is above the window of recent tokens.
    """

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
    recent: Leaf  # int32[B, W], W the penalty window
    keys: Leaf  # key[B]
    finish: Leaf  # int32[B]
    generated: Leaf  # int32[B]


@struct.dataclass
class Chosen:
    """Tokens chosen in N steps, or in one (then without N), and log-probabilities.

    Those are of the unmodified logits, the n likeliest tokens' largest first. All are 0 for a row
    that had stopped before the step or failed in it.
    """

    tokens: Leaf  # int32[B, N]
    logprobs: Leaf  # float32[B, N]
    top_tokens: Leaf  # int32[B, N, n]
    top_logprobs: Leaf  # float32[B, N, n]


def prefill(
    params: Params,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    cache: KVCache,
    *,
    config: ModelConfig,
    activations: Activations = "auto",
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Return the logits of each row's last counted token, without [B, T, V], and the cache.

    Arguments as in `forward`. A row of length 0 has no last token: its logits are NaN.
    """
    hidden, cache, _ = hidden_states(
        params, tokens, cache, config=config, lengths=lengths, activations=activations, dtype=dtype
    )
    return last_logits(params, hidden, lengths, config=config, activations=activations), cache


def last_logits(
    params: Params,
    hidden: Float[Array, "B T D"],
    lengths: Int32[Array, " B"],
    *,
    config: ModelConfig,
    activations: Activations,
) -> Float32[Array, "B V"]:
    """Return the logits of each row's last counted token; NaN for a row of length 0."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    logits = unembed(params, hidden, config=config, activations=activations)
    return jnp.where((lengths > 0)[:, None], logits, np.float32(np.nan))


def start_decoding(
    logits: Float32[Array, "B V"],
    cache: KVCache,
    recent: Int32[Array, "B W"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    stop_tokens: Int32[Array, " K"] | Sequence[Any],
    *,
    top_logprobs: int = 0,
) -> tuple[DecodeState, Chosen]:
    """Choose the first token from a prefill's logits; return the state and what was chosen.

    `recent` is what `recent_tokens` gives, `keys` what `row_keys` does; `top_logprobs` (static) is
    n of `Chosen`. `stop_tokens` may be a list too.

    Raises ValueError, or TypeError for what is no number, for concrete parameters of sampling that
    are out of range (see `check_sampling`), a penalty_last_n above the width of `recent`, or stop
    tokens outside the vocabulary.
    """
    B, V = logits.shape
    check_sampling(sampling, B, V)
    check_window(sampling, recent.shape[1])
    state = DecodeState(
        cache=cache,
        token=jnp.zeros((B,), jnp.int32),
        recent=recent,
        keys=keys,
        finish=jnp.full((B,), int(Finish.RUNNING), jnp.int32),
        generated=jnp.zeros((B,), jnp.int32),
    )
    return _choose(state, logits, sampling.per_row(B), stop_ids(stop_tokens, V), top_logprobs)


def decode_many(
    params: Params,
    state: DecodeState,
    sampling: Sampling,
    stop_tokens: Int32[Array, " K"] | Sequence[Any],
    steps: Int32[Array, ""] | int,
    *,
    config: ModelConfig,
    max_steps: int,
    activations: Activations = "auto",
    top_logprobs: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[DecodeState, Chosen, Int32[Array, ""]]:
    """Run up to `steps` (traced, at most N = max_steps) steps; stop when every row has stopped.

    Returns the state, what was chosen in each step (`top_logprobs`, static, is its n), and the
    number of steps that ran. Raises as `start_decoding`.
    """
    B, W = state.recent.shape
    check_sampling(sampling, B, config.vocab_size)
    check_window(sampling, W)
    sampling, stop_tokens = sampling.per_row(B), stop_ids(stop_tokens, config.vocab_size)
    chosen = Chosen(
        tokens=jnp.zeros((B, max_steps), jnp.int32),
        logprobs=jnp.zeros((B, max_steps), jnp.float32),
        top_tokens=jnp.zeros((B, max_steps, top_logprobs), jnp.int32),
        top_logprobs=jnp.zeros((B, max_steps, top_logprobs), jnp.float32),
    )

    if params.partitioning is not None:
        # What the loop carries lies from the start where a step leaves it.
        every = chosen, state.token, state.recent, state.finish, state.generated
        chosen, token, recent, finish, generated = params.partitioning.whole(every)
        state = dataclasses.replace(
            state, token=token, recent=recent, finish=finish, generated=generated
        )

    def unfinished(carry: tuple) -> Array:
        i, state, _ = carry
        return (i < steps) & (i < max_steps) & jnp.any(state.finish == int(Finish.RUNNING))

    def step(carry: tuple) -> tuple:
        i, state, chosen = carry
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
            dtype=dtype,
        )
        logits = unembed(pinned, hidden[:, 0], config=config, activations=activations)
        state, new = _choose(
            dataclasses.replace(state, cache=cache), logits, sampling, stop_tokens, top_logprobs
        )

        def put(column: Array, columns: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(columns, column[:, None], i, axis=1)

        return i + 1, state, jax.tree.map(put, new, chosen)

    start = varying((jnp.int32(0), state, chosen), params, sampling, stop_tokens, steps)
    ran, state, chosen = lax.while_loop(unfinished, step, start)
    return state, chosen, ran


def _choose(
    state: DecodeState,
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    stop_tokens: Int32[Array, " K"],
    top_logprobs: int,
) -> tuple[DecodeState, Chosen]:
    """Choose each running row's next token from the logits and see whether it ends the row.

    `sampling` holds `per_row` parameters.
    """
    running = state.finish == int(Finish.RUNNING)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.cache.lengths)
    token = sample(logits, keys, sampling, state.recent)
    failed = running & (token < 0)
    chooses = running & ~failed
    token = jnp.where(chooses, token, 0)
    chosen = _with_logprobs(logits, token, top_logprobs)
    stopped = running & jnp.any(token[:, None] == stop_tokens[None], axis=-1)
    finish = jnp.where(stopped, np.int32(Finish.STOP), state.finish)
    finish = jnp.where(failed, np.int32(Finish.ERROR), finish)
    recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
    state = dataclasses.replace(
        state,
        token=token,
        recent=jnp.where(running[:, None], recent, state.recent),
        finish=finish,
        generated=state.generated + chooses.astype(jnp.int32),
    )

    def only_chosen(x: Array) -> Array:
        return jnp.where(chooses.reshape(chooses.shape + (1,) * (x.ndim - 1)), x, 0)

    return state, jax.tree.map(only_chosen, chosen)


def _with_logprobs(logits: Float32[Array, "B V"], token: Int32[Array, " B"], n: int) -> Chosen:
    total = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    top, ids = lax.top_k(logits, n)
    return Chosen(tokens=token, logprobs=logprob, top_tokens=ids, top_logprobs=top - total[:, None])
