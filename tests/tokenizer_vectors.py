"""What llama.cpp makes of texts, and two small vocabularies to change.

The expected ids come from scripts/make_tokenizer_vectors.py.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

VECTORS = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "tokenizer_vectors.json.gz").read_bytes())
)
TEXTS = VECTORS["texts"]
VOCABULARIES = VECTORS["vocabularies"]
GGML = "tokenizer.ggml."


def spm_metadata(**changes) -> dict:
    """A small SentencePiece vocabulary; a change to None takes a key out."""
    pieces = ["▁", "a", "b", "ab", "▁a", "▁ab"]
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32),
        "scores": np.array([0.0] * 259 + [-1, -2, -3, -4, -5, -6], np.float32),
    }
    kept = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    return {GGML + key: value for key, value in kept.items()}


def bpe_metadata(**changes) -> dict:
    """A small byte-level vocabulary; a change to None takes a key out."""
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "Ġ", "<|im_end|>"],
        "token_type": np.array([1, 1, 1, 1, 3], np.int32),
        "merges": ["a b"],
        "bos_token_id": 4,
    }
    kept = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    return {GGML + key: value for key, value in kept.items()}
