"""Log-probabilities of given texts, and perplexity; logits exist for a few positions at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from qllama_jax.cache import init_cache
from qllama_jax.config import ModelConfig
from qllama_jax.errors import ContextOverflowError, NumericalError
from qllama_jax.load import Model
from qllama_jax.matmul import Activations, check_activations
from qllama_jax.memory import Needs, cache_bytes, check_fits, workspace_bytes
from qllama_jax.model import hidden_states, unembed
from qllama_jax.params import Params
from qllama_jax.prompts import read_ids, read_prompts
from qllama_jax.session_arguments import power_of_two, whole

# Logits that exist at a time: 64 MiB of float32.
LOGITS = 2**24
SMALLEST = 8  # the smallest padded text


@dataclass(frozen=True)
class Score:
    """A text's tokens, and the log-probability of each but the first, float32 `[len(tokens) - 1]`.

    The log-probability of a token is its natural logarithm given all tokens before it.
    """

    tokens: list[int]
    logprobs: np.ndarray = field(repr=False)


@functools.partial(jax.jit, static_argnames=("config", "first", "activations"))
def token_logprobs(
    params: Params,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"] | None = None,
    *,
    config: ModelConfig,
    first: int = 0,
    activations: Activations = "float",
) -> Float32[Array, "B N"]:
    """Return log p(tokens[:, t + 1] | tokens[:, : t + 1]) for t = first .. T - 2.

    Args:
        params: the weights.
        tokens: ids, rows right-padded with anything.
        lengths: tokens of each row that count, None: all T. What is past them scores 0.
        config: what the file says (static).
        first: the first position whose next token is scored (static).
        activations: as in `matmul`.

    Logits are computed for so many positions at a time that they take 64 MiB, not `[B, T, V]`. A
    row with an id outside the vocabulary scores NaN.

    Raises:
        ValueError: there is no position `first` with a next token.
    """
    B, T = tokens.shape
    if T < 2:
        raise ValueError(f"rows of {T} tokens: expected at least 2, a token and its next one")
    if not 0 <= first <= T - 2:
        raise ValueError(f"first={first}: expected 0..{T - 2} for rows of {T} tokens")
    lengths = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
    cache = init_cache(config, B, T, mesh=params.partitioning)
    hidden, _, _ = hidden_states(
        params, tokens, cache, config=config, lengths=lengths, activations=activations
    )
    N = T - 1 - first
    size = max(1, min(N, LOGITS // (B * config.vocab_size)))
    chunks = -(-N // size)
    spare = chunks * size - N
    hidden = jnp.pad(hidden[:, first : T - 1], ((0, 0), (0, spare), (0, 0)))
    wanted = jnp.clip(tokens[:, first + 1 :], 0, config.vocab_size - 1)
    wanted = jnp.pad(wanted, ((0, 0), (0, spare)))

    def score(chunk: tuple[Array, Array]) -> Array:
        logits = unembed(params, chunk[0], config=config, activations=activations)
        chosen = jnp.take_along_axis(logits, chunk[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    *_, D = hidden.shape
    parts = lax.map(
        score,
        (
            hidden.reshape(B, chunks, size, D).swapaxes(0, 1),
            wanted.reshape(B, chunks, size).swapaxes(0, 1),
        ),
    )
    logprobs = parts.swapaxes(0, 1).reshape(B, chunks * size)[:, :N]
    counted = np.arange(first + 1, T, dtype=np.int32)[None] < lengths[:, None]
    return jnp.where(counted, logprobs, 0)


def score(model: Model, texts: Any, *, activations: Activations = "float") -> Any:
    """Return the log-probability of every token of a text, or of each of a list of texts.

    Args:
        model: from `load`.
        texts: a text, or token ids; or a list of such. A text is encoded as `generate` does.
        activations: as in `matmul`.

    Returns:
        A `Score`, or a list of them.

    Raises:
        ContextOverflowError: a text is longer than the model's context.
        OutOfMemoryError: a text is longer than there is memory for; nothing was allocated.
        NumericalError: a log-probability that is not finite.
        TypeError, ValueError: what is neither text nor token ids of the vocabulary, or is empty.
    """
    check_activations(activations)
    rows, is_batch = read_prompts(model, texts)
    for i, row in enumerate(rows):
        if row.size > model.config.context_length:
            raise ContextOverflowError(
                f"text {i}: {row.size} tokens, the model's context is {model.config.context_length}"
            )
    longest = max(row.size for row in rows)
    _check_fits(f"text of {longest} tokens", model, longest, _padded)
    scores = [_score(model, i, row, activations) for i, row in enumerate(rows)]
    return scores if is_batch else scores[0]


def _padded(tokens: int) -> int:
    """Return the power of two that a text is padded to: few programs for many lengths."""
    return power_of_two(tokens, SMALLEST)


def _check_fits(what: str, model: Model, tokens: int, room: Callable[[int], int]) -> None:
    """Refuse to score so many tokens, for which room(tokens) positions are allocated."""
    config = model.config

    def needs(tokens: int) -> Needs:
        positions = room(tokens)
        logits = 3 * 4 * min(positions * config.vocab_size, LOGITS)
        workspace = workspace_bytes(config, 1, positions) + logits
        cache = cache_bytes(config, 1, positions, partitioning=model.params.partitioning)
        return Needs(cache=cache, workspace=workspace, loaded=model.device_nbytes)

    check_fits(what, needs, tokens, mesh=model.mesh)


def _score(model: Model, index: int, row: np.ndarray, activations: Activations) -> Score:
    padded = np.zeros((1, _padded(row.size)), np.int32)
    padded[0, : row.size] = row
    logprobs = token_logprobs(
        model.params,
        padded,
        np.asarray([row.size], np.int32),
        config=model.config,
        activations=activations,
    )
    found = np.asarray(logprobs)[0, : row.size - 1]
    if not np.isfinite(found).all():
        at = int(np.argmax(~np.isfinite(found))) + 1
        raise NumericalError(f"text {index}: the log-probability of token {at} is {found[at - 1]}")
    return Score(tokens=row.tolist(), logprobs=found)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability of `tokens` tokens, with its standard error."""

    value: float
    error: float
    tokens: int
    chunks: int


def perplexity(
    model: Model,
    tokens: Any,
    *,
    context: int = 512,
    activations: Activations = "float",
) -> Iterator[Perplexity]:
    """Yield the perplexity after each chunk of a text, by llama.cpp's recipe.

    The tokens are cut into chunks of `context`, each computed on its own; what does not fill a
    chunk is left out. A chunk's first token becomes BOS where the model begins texts with it. The
    tokens of the second half but its first are scored, so that each has at least half a context
    before it.

    Args:
        model: from `load`.
        tokens: token ids, a flat list or array.
        context: tokens of a chunk, at least 4.
        activations: as in `matmul`.

    All errors but the last are raised at the call.

    Raises:
        ValueError: a context below 4, too few tokens for one chunk, or one outside the vocabulary.
        TypeError: a text or what else are no token ids, or a context that is no integer.
        ContextOverflowError: `context` is longer than the model's.
        OutOfMemoryError: it is longer than there is memory for; nothing was allocated.
        NumericalError: a log-probability that is not finite.
    """
    check_activations(activations)
    context = whole("context", context, 4, 2**31 - 1)
    if context > model.config.context_length:
        raise ContextOverflowError(
            f"context={context}: the model's is {model.config.context_length}"
        )
    _check_fits(f"context={context}", model, context, lambda tokens: tokens)
    ids = read_ids(model, tokens, "tokens")
    count = ids.size // context
    if count == 0:
        raise ValueError(f"{ids.size} tokens, wanted at least {context}, one context")
    chunks = ids[: count * context].reshape(count, context)
    tokenizer = model.tokenizer if model.has_tokenizer else None
    if tokenizer is not None and tokenizer.add_bos and tokenizer.bos_id is not None:
        chunks[:, 0] = tokenizer.bos_id  # `read_ids` has made a copy
    return _perplexity(model, chunks, activations)


def _perplexity(model: Model, chunks: np.ndarray, activations: Activations) -> Iterator[Perplexity]:
    _, context = chunks.shape
    losses: list[np.ndarray] = []
    for i, chunk in enumerate(chunks):
        logprobs = token_logprobs(
            model.params,
            chunk[None],
            config=model.config,
            first=context // 2,
            activations=activations,
        )
        losses.append(-np.asarray(logprobs, np.float64)[0])
        if not np.isfinite(losses[-1]).all():
            raise NumericalError(f"chunk {i}: a log-probability is not finite")
        together = np.concatenate(losses)
        value = math.exp(together.mean())
        error = value * float(together.std()) / math.sqrt(max(together.size - 1, 1))
        yield Perplexity(value, error, together.size, i + 1)
