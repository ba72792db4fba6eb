"""What the parameters of sampling may be, and the forms that logit biases are given in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qllama_jax.sampling import Sampling

_Range = tuple[str, Callable[[np.ndarray], Any]]

_INTEGERS = ("top_k", "penalty_last_n")
_FINITE: _Range = ("a finite number", np.isfinite)


def _integer(low: int) -> _Range:
    def inside(v: np.ndarray) -> Any:
        return (v >= low) & (v < 2**31) & (v == np.trunc(v))

    return f"an integer {low} .. 2^31 - 1", inside


_RANGES: dict[str, _Range] = {
    "temperature": ("a finite number >= 0", lambda v: np.isfinite(v) & (v >= 0)),
    "top_k": _integer(0),
    "top_p": ("0 < top_p <= 1", lambda v: (v > 0) & (v <= 1)),
    "min_p": ("0 <= min_p <= 1", lambda v: (v >= 0) & (v <= 1)),
    "repeat_penalty": ("a finite number > 0", lambda v: np.isfinite(v) & (v > 0)),
    "presence_penalty": _FINITE,
    "frequency_penalty": _FINITE,
    "penalty_last_n": _integer(-1),
    "typical_p": ("0 < typical_p <= 1", lambda v: (v > 0) & (v <= 1)),
}


def check_sampling(
    sampling: Sampling, batch_size: int | None = None, vocab_size: int | None = None
) -> None:
    """Raise for a concrete parameter that is out of range; of what is traced the shape counts.

    A parameter is a number or `batch_size` of them, logit_bias 0 or a float `[V]` or `[B, V]`, or
    the `[B, 1]` that `per_row` makes of 0; each is judged as the float32 that it becomes. Raises
    TypeError for what is no number, ValueError for the rest.

    The ranges: temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repeat_penalty > 0,
    presence_penalty and frequency_penalty finite, penalty_last_n >= -1, 0 < typical_p <= 1,
    logit_bias finite or -inf, and not -inf for all tokens of a row.
    """
    for name, (allowed, inside) in _RANGES.items():
        value = getattr(sampling, name)
        traced = isinstance(value, Tracer)
        numbers: Any = value if traced else np.asarray(value)
        if not _are_numbers(numbers.dtype):
            raise TypeError(f"{name}={value!r}: expected {allowed}")
        if batch_size is not None and numbers.shape not in ((), (batch_size,)):
            raise ValueError(f"{name}: {numbers.shape} numbers for {batch_size} rows")
        if traced:
            continue
        if name not in _INTEGERS:
            numbers = _float32(numbers)
        if not np.all(inside(numbers)):
            raise ValueError(f"{name}={value}: expected {allowed}")
    _check_bias(sampling.logit_bias, batch_size, vocab_size)


def _check_bias(given: Any, batch_size: int | None, vocab_size: int | None) -> None:
    traced = isinstance(given, Tracer)
    bias: Any = given if traced else np.asarray(given)
    B, V = ("B" if batch_size is None else batch_size), ("V" if vocab_size is None else vocab_size)
    allowed = f"0, or floats of shape ({V},) or ({B}, {V})"
    if not _are_numbers(bias.dtype):
        raise TypeError(f"logit_bias: expected {allowed}, found {bias.dtype}")
    if bias.shape == (batch_size, 1) and (traced or not np.any(bias)):
        return  # what `per_row` makes of the number 0
    wanted = (B, V)[2 - bias.ndim :] if bias.ndim <= 2 else None
    fits = wanted is not None and all(
        isinstance(want, str) or want == found
        for want, found in zip(wanted, bias.shape, strict=True)
    )
    if not fits or bias.size == 0 or (bias.ndim == 0 and not traced and bias != 0):
        found = f"shape {bias.shape}" if bias.ndim else bias
        raise ValueError(f"logit_bias: expected {allowed}, found {found}")
    if traced:
        return
    bias = _float32(np.asarray(bias))
    for index in np.argwhere(np.isnan(bias) | (bias == np.inf)):
        raise ValueError(
            f"logit_bias: {bias[tuple(index)]} for token {index[-1]}: expected a finite number or"
            " -inf, which bans the token"
        )
    if bias.ndim and np.any(np.all(bias == -np.inf, axis=-1)):
        raise ValueError("logit_bias: -inf for every token leaves none to choose")


def read_logit_bias(
    logit_bias: Any, banned_tokens: Iterable[int] | None, vocab_size: int, batch_size: int
) -> Any:
    """Return `Sampling.logit_bias` of {id: bias} or of its own form, and of ids to ban.

    What nobody biases stays the number 0: the array `[V]` is there only where it says something.

    Raises:
        TypeError, ValueError: an id is no integer of the vocabulary, or a bias no number; what is
            wrong with the values is left to `check_sampling`.
    """
    banned_tokens = () if banned_tokens is None else banned_tokens
    if not isinstance(banned_tokens, Iterable):
        raise TypeError(f"banned_tokens: expected token ids, found {type(banned_tokens).__name__}")
    banned = [_token("banned_tokens", token, vocab_size) for token in banned_tokens]
    if isinstance(logit_bias, Mapping):
        pairs = {_token("logit_bias", token, vocab_size): v for token, v in logit_bias.items()}
        logit_bias = np.zeros(vocab_size, np.float32) if pairs else 0.0
        for token, value in pairs.items():
            if np.ndim(value) or np.asarray(value).dtype.kind not in "iuf":
                raise TypeError(f"logit_bias[{token}]={value!r}: expected a number")
            logit_bias[token] = _float32(np.asarray(value))
    if banned:
        check_sampling(Sampling(logit_bias=logit_bias), batch_size, vocab_size)
        logit_bias = _float32(np.asarray(logit_bias))
        logit_bias = np.array(logit_bias if logit_bias.ndim else np.zeros(vocab_size, np.float32))
        logit_bias[..., banned] = -np.inf
    return logit_bias


def _token(name: str, token: Any, vocab_size: int) -> int:
    try:
        if isinstance(token, bool):
            raise TypeError
        token = operator.index(token)  # refuses a float, and an array that is no number
    except TypeError:
        raise TypeError(f"{name}: expected token ids, found {token!r}") from None
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: token id {token} is outside the vocabulary 0..{vocab_size - 1}")
    return token


def _are_numbers(dtype: Any) -> bool:
    """Whether a dtype is one of integers or of floats, bfloat16 included; bools are no numbers."""
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _float32(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
