"""Text or token ids in, text and tokens out: `generate` and `stream`.

Both read the events of one `Session`, so they give the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qllama_jax.decoding import Finish
from qllama_jax.load import Model
from qllama_jax.matmul import Activations
from qllama_jax.prompts import read_prompts
from qllama_jax.row_text import RowText, stop_strings
from qllama_jax.sampling import Sampling
from qllama_jax.sampling_ranges import read_logit_bias
from qllama_jax.session import Session, Stats
from qllama_jax.tensor_reader import Progress


@dataclass(frozen=True)
class Result:
    """A finished generation.

    text: what the tokens say; control tokens, and a stop string with all after it, are left out.
    tokens: every token that was generated, the one that ended it included.
    logprobs: each token's log-probability under the unmodified logits, float32 `[len(tokens)]`.
    finish_reason: "stop" (a stop token or string) or "length".
    stats: of the whole call, all rows together.
    top_logprobs: for each token, (id, log-probability) of the `top_logprobs` likeliest tokens in
        its place under the unmodified logits, the likeliest first.
    """

    text: str
    tokens: list[int]
    logprobs: np.ndarray = field(repr=False)
    finish_reason: str
    stats: Stats = field(repr=False)
    top_logprobs: list[list[tuple[int, float]]] = field(repr=False)


@dataclass(frozen=True)
class Piece:
    """One token of a stream. `text` may be empty: a character can take several tokens.

    `finish_reason` and `stats` are None but for the last piece; `top_logprobs` is one item of
    `Result.top_logprobs`.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None = None
    stats: Stats | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list, repr=False)


def generate(
    model: Model,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    seed: int | Sequence[int] | np.ndarray | jax.Array = 0,
    stop: str | Sequence[str] | None = (),
    ignore_eos: bool = False,
    top_logprobs: int = 0,
    logit_bias: Any = 0.0,
    banned_tokens: Sequence[int] | None = (),
    activations: Activations = "auto",
    dtype: DTypeLike = jnp.float32,
    cache_dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> Any:
    """Continue a prompt, or every one of a list of prompts in one batch.

    Args:
        model: from `load`.
        prompt: a text, or token ids; a list of texts or of lists of ids is a batch.
        max_new_tokens: the most tokens to generate a row, at least 1.
        seed: of the draws; row b draws from `fold_in(key(seed), b)`. One seed a row: row b gets
            what its prompt alone gets with that seed, from `fold_in(key(seed[b]), 0)`, where
            their logits are the same: `activations="float"`, and no two tokens as likely.
        stop: a text, or several, that end a row where they appear; None: none.
        ignore_eos: go on past end-of-generation tokens.
        top_logprobs: of how many of the likeliest tokens to give the log-probabilities, 0..1000
            and at most the vocabulary; another number compiles anew.
        logit_bias: {token id: what is added to its logit}, for every row, or an array as in
            `Sampling`. -inf bans a token.
        banned_tokens: ids that are never generated, in any row; None: none.
        activations: see `matmul`.
        dtype: of the activations (see `forward`), float32 or bfloat16.
        cache_dtype: of the KV cache, float32, bfloat16 or float16. None: float16, as llama.cpp's
            is, where a CPU decodes up to 8 rows of float32 in a loop over layers with activations
            "auto" or "int8", elsewhere as `dtype`.
        progress: called with (prompt tokens read, prompt tokens in all), first with 0, where a
            prompt is longer than the 512 tokens that are read at a time.
        **sampling: the other fields of `Sampling`, numbers or one a row. By default greedy.
            penalty_last_n is a number of tokens or -1, all; above 64, each power of two compiles
            anew.

    Returns:
        A `Result`, or a list of them for a list of prompts.

    Raises:
        ContextOverflowError: a prompt and its new tokens do not fit the model's context.
        OutOfMemoryError: they do not fit the memory that is free; nothing was allocated.
        NumericalError: logits that are not finite.
        TypeError, ValueError: arguments of another kind or out of range.
    """
    prompts, is_batch = read_prompts(model, prompt)
    session, rows = _session(
        model,
        prompts,
        stop,
        ignore_eos,
        logit_bias,
        banned_tokens,
        sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        top_logprobs=top_logprobs,
        activations=activations,
        dtype=dtype,
        cache_dtype=cache_dtype,
        progress=progress,
    )
    for event in session.run():
        row = rows[event.row]
        row.add(event)
        if row.finish != Finish.RUNNING:
            session.stop(event.row)
    results = [
        Result(
            text=row.text,
            tokens=row.tokens,
            logprobs=np.asarray(row.logprobs, np.float32),
            finish_reason=row.finish.name.lower(),
            stats=session.stats,
            top_logprobs=row.top_logprobs,
        )
        for row in rows
    ]
    return results if is_batch else results[0]


def stream(
    model: Model,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    seed: int | Sequence[int] | np.ndarray | jax.Array = 0,
    stop: str | Sequence[str] | None = (),
    ignore_eos: bool = False,
    top_logprobs: int = 0,
    logit_bias: Any = 0.0,
    banned_tokens: Sequence[int] | None = (),
    activations: Activations = "auto",
    dtype: DTypeLike = jnp.float32,
    cache_dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> Iterator[Piece]:
    """Yield the tokens of `generate` for one prompt as they come, each with its text.

    Arguments and errors as in `generate`; the errors of arguments are raised at the call. One
    thread at a time may ask for the next piece: another gets Python's ValueError, and no token is
    lost.
    """
    prompts, is_batch = read_prompts(model, prompt)
    if is_batch:
        raise TypeError("stream takes one prompt; generate takes a list of them")
    session, (row,) = _session(
        model,
        prompts,
        stop,
        ignore_eos,
        logit_bias,
        banned_tokens,
        sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        top_logprobs=top_logprobs,
        activations=activations,
        dtype=dtype,
        cache_dtype=cache_dtype,
        progress=progress,
    )
    return _pieces(session, row)


def _pieces(session: Session, row: RowText) -> Iterator[Piece]:
    for event in session.run():
        text = row.add(event)
        top = event.top_logprobs
        if row.finish != Finish.RUNNING:
            reason = row.finish.name.lower()
            yield Piece(text, event.token, event.logprob, reason, session.stats, top)
            return
        yield Piece(text, event.token, event.logprob, top_logprobs=top)


def _session(
    model: Model,
    prompts: list[np.ndarray],
    stop: str | Sequence[str] | None,
    ignore_eos: bool,
    logit_bias: Any,
    banned_tokens: Sequence[int] | None,
    sampling: dict[str, Any],
    **options: Any,
) -> tuple[Session, list[RowText]]:
    """`options` are `Session`'s."""
    strings = stop_strings(stop)
    tokenizer = model.tokenizer if model.has_tokenizer else None
    if tokenizer is None and strings:
        raise ValueError(f"stop: {model.path} has no tokenizer")
    eog = frozenset() if tokenizer is None or ignore_eos else tokenizer.eog_ids
    bias = read_logit_bias(logit_bias, banned_tokens, model.config.vocab_size, len(prompts))
    session = Session(
        model,
        prompts,
        stop_tokens=eog,
        sampling=Sampling(logit_bias=bias, **sampling),
        **options,
    )
    return session, [RowText(tokenizer, strings, continues=True) for _ in prompts]
