"""Prompts as users give them -> arrays of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qllama_jax.load import Model


def read_prompts(model: Model, prompt: Any) -> tuple[list[np.ndarray], bool]:
    """Return the prompts as arrays of token ids, and whether they were given as a batch.

    Raises:
        TypeError, ValueError: what is neither text nor token ids of the vocabulary, or is empty.
    """
    if isinstance(prompt, str):
        return [_read_prompt(model, prompt, "prompt")], False
    if not _is_list(prompt):
        raise TypeError(
            f"prompt: expected a text, token ids or a list of such, found {_kind(prompt)}"
        )
    if len(prompt) == 0:
        raise ValueError("prompt: empty")
    if isinstance(prompt[0], Sequence) or _is_list(prompt[0]):
        return [_read_prompt(model, item, f"prompt {i}") for i, item in enumerate(prompt)], True
    return [_read_prompt(model, prompt, "prompt")], False


def _read_prompt(model: Model, prompt: Any, name: str) -> np.ndarray:
    if not isinstance(prompt, str):
        return read_ids(model, prompt, name)
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"{name}: the text is empty and the model has no BOS token to begin")
    return read_ids(model, ids, name)


def read_ids(model: Model, ids: Any, name: str) -> np.ndarray:
    """Return a flat list or array of token ids as int32, checked; errors call it `name`.

    Raises:
        TypeError: what holds no integers, or is not flat.
        ValueError: there are none, or one is outside the vocabulary.
    """
    wanted = f"{name}: expected a flat list of token ids"
    if not _is_list(ids):
        raise TypeError(f"{wanted}, found {_kind(ids)}")
    if isinstance(ids, Sequence) and any(isinstance(token, bool | np.bool_) for token in ids):
        raise TypeError(f"{wanted}, found a bool among them")  # numpy would make it an integer
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise TypeError(f"{wanted}, found lists of several lengths or depths") from None
    if ids.size == 0:
        raise ValueError(f"{name}: no tokens")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"{wanted}, found {ids.dtype} of shape {ids.shape}")
    V = model.config.vocab_size
    bad = np.flatnonzero((ids < 0) | (ids >= V))
    if bad.size:
        raise ValueError(
            f"{name}: token id {ids[bad[0]]} at index {bad[0]} is outside the vocabulary 0..{V - 1}"
        )
    return ids.astype(np.int32)


def _is_list(value: Any) -> bool:
    """Whether a value is a list of its items, or an array, and no text or bytes."""
    if hasattr(value, "__array__"):
        return np.ndim(value) > 0
    return isinstance(value, Sequence) and not isinstance(
        value, str | bytes | bytearray | memoryview
    )


def _kind(value: Any) -> str:
    return f"a number, {value!r}" if hasattr(value, "__array__") else type(value).__name__
