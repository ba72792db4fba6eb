"""A config of a file's keys, for tests of what the keys mean."""

from __future__ import annotations

from typing import Any

from qllama_jax.config import ModelConfig
from qllama_jax.metadata import Metadata

NAN, INF = float("nan"), float("inf")

# The required keys alone.
BASE: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.context_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 3,
}

TOKENS, TYPES, SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
SCALING, FACTOR, ATTN = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"
ORIGINAL = "rope.scaling.original_context_length"


def full(key: str) -> str:
    """Names here leave "llama." out."""
    return key if key.startswith(("general.", "tokenizer.")) else f"llama.{key}"


def config(changes: dict[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """Config of the required keys with some replaced or added, or, by None, left out."""
    values = BASE | {full(key): value for key, value in changes.items()}
    kept = {key: value for key, value in values.items() if value is not None}
    offsets = {key: 24 + i for i, key in enumerate(kept)}
    return ModelConfig.from_metadata(Metadata(kept, "m.gguf", offsets), vocab_size=vocab_size)
