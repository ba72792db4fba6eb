"""The vocabulary of a file from before GGUF -> the `tokenizer.ggml.*` keys of its conversion."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from qllama_jax.errors import quoted
from qllama_jax.ggml_cursor import GGMLCursor

MAX_TOKEN = 65_535  # bytes

_SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, whatever text the file has there
_FIRST_BYTE, _AFTER_BYTES = 3, 259  # ids in between are LLaMA's byte tokens
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # values of tokenizer.ggml.token_type
_F32 = struct.Struct("<f")


def read_ggml_vocabulary(cursor: GGMLCursor, size: int, *, with_scores: bool) -> dict[str, Any]:
    """Read `size` tokens as llama.cpp's converter takes them, and step past them.

    The first three are <unk>, <s> and </s>; an empty text is a control token; one byte among the
    ids 3 to 258 is a byte token, <0xXX>; all else is a piece of text, a space written as U+2581.

    GGML files have no scores. Theirs are made up as LLaMA's vocabulary has them, by which an
    earlier piece merges first: 259 - id from id 259 on, else 0.
    """
    cursor.where = "vocabulary"
    least = (8 if with_scores else 4) * size
    if least > cursor.size - cursor.pos:
        cursor.fail(
            f"{size} tokens take at least {least} bytes but the file has {cursor.size}, and they"
            f" begin at byte {cursor.pos}; it is truncated or corrupt"
        )
    tokens: list[str] = []
    types = np.empty(size, np.int32)
    scores = np.minimum(0, _AFTER_BYTES - np.arange(size)).astype(np.float32)
    for i in range(size):
        at = cursor.pos
        length = cursor.integer(f"length of token {i}")
        if length > MAX_TOKEN:
            cursor.fail(f"token {i} at byte {at} has {length} bytes, wanted 0..{MAX_TOKEN}")
        raw = cursor.take(length, f"token {i}")
        if with_scores:
            (scores[i],) = _F32.unpack(cursor.take(4, f"score of token {i}"))
        text, types[i] = _token(cursor, i, raw, at)
        tokens.append(text)
    types.setflags(write=False)
    scores.setflags(write=False)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _token(cursor: GGMLCursor, i: int, raw: bytes, at: int) -> tuple[str, int]:
    """Text and type of token i, whose entry begins at byte `at`."""
    if i < len(_SPECIAL):
        return _SPECIAL[i], _UNKNOWN if i == 0 else _CONTROL
    if not raw:
        return "", _CONTROL
    if _FIRST_BYTE <= i < _AFTER_BYTES and len(raw) == 1:
        return f"<0x{raw[0]:02X}>", _BYTE
    try:
        return raw.decode().replace(" ", "\u2581"), _NORMAL
    except UnicodeDecodeError:
        cursor.fail(f"token {i} at byte {at}, {quoted(raw)}, is not UTF-8")
