"""Metadata -> what the file says about the model: `ModelConfig`. Refuses what it does not know.

Keys, their defaults and which are required follow llama.cpp's architecture "llama", which Mixtral
files have too. The ranges are stricter: llama.cpp takes a NaN for `rope.freq_base`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qllama_jax.errors import quoted
from qllama_jax.metadata import REQUIRED, Metadata, describe

ScalingKind = Literal["linear", "yarn", "longrope"]

# Value of llama.rope.scaling.type -> kind. "none" is, as in llama.cpp, linear by a factor of 1.
_SCALING_KINDS: dict[str, ScalingKind] = {
    "none": "linear",
    "linear": "linear",
    "yarn": "yarn",
    "longrope": "longrope",
}

# Tokens that generation uses. Others, such as padding, are out of range in files in circulation
# ("no such token"), and nothing here reads them.
_SPECIAL_TOKENS = ("bos", "eos", "eot", "eom", "unknown")


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained context are squeezed into it.

    `factor` divides the positions (linear) or those of the slow dimensions (yarn); `attn_factor`
    multiplies cos and sin, besides what the kind itself does.
    """

    kind: ScalingKind
    factor: float
    original_context_length: int
    attn_factor: float


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of a Llama or Mixtral model, as its file gives them; hashable.

    `num_experts` is 0 where the file has no experts; where it is 1, a block may be a mixture of one
    or dense, as its tensors say. `rope_scaling` is None where positions are
    used as they are. `rope_dim` counts the dimensions of a head that are rotated.
    """

    num_layers: int
    embed_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rope_dim: int
    norm_eps: float
    num_experts: int
    num_experts_per_token: int
    rope_scaling: RopeScaling | None

    @classmethod
    def from_metadata(cls, metadata: Metadata, *, vocab_size: int | None = None) -> ModelConfig:
        """Config of a GGUF file with architecture "llama".

        `vocab_size` is the number of rows of the token embedding, where the caller knows it.
        Raises `GGUFError` naming the key, what was found and what was wanted.
        """
        architecture = metadata.get_str("general.architecture")
        if architecture != "llama":
            raise metadata.error("general.architecture", quoted(architecture), "'llama'")
        if not metadata.get_bool("llama.attention.causal", True):
            raise metadata.error("llama.attention.causal", "False", "True: a decoder")
        num_layers = metadata.get_uint("llama.block_count", lo=1, hi=1024)
        embed_dim = metadata.get_uint("llama.embedding_length", lo=1, hi=2**20)
        num_heads, num_kv_heads, head_dim = _heads(metadata, embed_dim)
        context_length = metadata.get_uint("llama.context_length", lo=1, hi=2**32 - 1)
        num_experts = metadata.get_uint("llama.expert_count", 0, hi=1024)
        used = "llama.expert_used_count"
        return cls(
            num_layers=num_layers,
            embed_dim=embed_dim,
            ffn_dim=_one_for_all_layers(metadata, "llama.feed_forward_length", hi=2**24),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=_vocab_size(metadata, vocab_size),
            context_length=context_length,
            rope_theta=_positive(metadata, "llama.rope.freq_base", 10_000.0),
            rope_dim=_rope_dim(metadata, head_dim),
            norm_eps=_norm_eps(metadata),
            num_experts=num_experts,
            num_experts_per_token=metadata.get_uint(used, lo=1, hi=num_experts)
            if num_experts > 1
            else metadata.get_uint(used, 0, hi=num_experts),
            rope_scaling=_rope_scaling(metadata, context_length),
        )


def _heads(metadata: Metadata, embed_dim: int) -> tuple[int, int, int]:
    """Query heads, key-value heads and their dimension."""
    heads_key, kv_key = "llama.attention.head_count", "llama.attention.head_count_kv"
    num_heads = _one_for_all_layers(metadata, heads_key, hi=2**16)
    num_kv_heads = _one_for_all_layers(metadata, kv_key, num_heads, hi=num_heads)
    if num_heads % num_kv_heads:
        raise metadata.error(kv_key, str(num_kv_heads), f"a divisor of the {num_heads} heads")
    key_length, value_length = "llama.attention.key_length", "llama.attention.value_length"
    if key_length not in metadata and embed_dim % num_heads:
        wanted = f"a divisor of the embedding's {embed_dim} without {key_length}"
        raise metadata.error(heads_key, str(num_heads), wanted)
    head_dim = metadata.get_uint(key_length, embed_dim // num_heads, lo=1, hi=2**16)
    value_dim = metadata.get_uint(value_length, embed_dim // num_heads, lo=1, hi=2**16)
    if value_dim != head_dim:
        found = f"{value_dim}" if value_length in metadata else f"none, which means {value_dim}"
        raise metadata.error(value_length, found, f"{head_dim}, the length of the keys")
    return num_heads, num_kv_heads, head_dim


def _one_for_all_layers(metadata: Metadata, key: str, default: int = REQUIRED, *, hi: int) -> int:
    if isinstance(values := metadata.get(key), np.ndarray):
        raise metadata.error(key, f"{describe(values)}, one a layer", "one integer for all layers")
    return metadata.get_uint(key, default, lo=1, hi=hi)


def _rope_dim(metadata: Metadata, head_dim: int) -> int:
    key = "llama.rope.dimension_count"
    rope_dim = metadata.get_uint(key, head_dim)
    if rope_dim % 2 or not 2 <= rope_dim <= head_dim:
        found = f"{rope_dim}" if key in metadata else f"none, which means {rope_dim}"
        raise metadata.error(key, found, f"an even number in 2..{head_dim}, the head's dimension")
    return rope_dim


def _positive(metadata: Metadata, key: str, default: float) -> float:
    value = metadata.get_float(key, default)
    if not (math.isfinite(value) and value > 0):
        raise metadata.error(key, f"{value}", "a finite number above 0")
    return value


def _norm_eps(metadata: Metadata) -> float:
    key = "llama.attention.layer_norm_rms_epsilon"
    value = metadata.get_float(key)
    if not 0 <= value < 1:  # NaN is not
        raise metadata.error(key, f"{value}", "a number from 0 to below 1")
    return value


def _rope_scaling(metadata: Metadata, context_length: int) -> RopeScaling | None:
    """Scaling that changes something, else None."""
    prefix = "llama.rope.scaling."
    name = metadata.get_str(prefix + "type", "linear")
    if name not in _SCALING_KINDS:
        raise metadata.error(prefix + "type", quoted(name), f"one of {', '.join(_SCALING_KINDS)}")
    key = prefix + "factor"
    if key not in metadata:
        key = "llama.rope.scale_linear"  # its name until 2023
    # A factor of 0 is how llama.cpp spells "not given".
    factor = 1.0 if metadata.get_float(key, 0.0) == 0 else _positive(metadata, key, 1.0)
    if name == "none":
        factor = 1.0
    attn_factor = _positive(metadata, prefix + "attn_factor", 1.0)
    key = prefix + "original_context_length"
    original = metadata.get_uint(key, context_length, hi=2**32 - 1)
    # As in llama.cpp, 0 is "not given" too, but for longrope, whose long factors it chooses.
    original = original if name == "longrope" else original or context_length
    if name != "longrope" and factor == 1 and attn_factor == 1:
        return None
    return RopeScaling(_SCALING_KINDS[name], factor, original, attn_factor)


def _vocab_size(metadata: Metadata, rows: int | None) -> int:
    """Number of tokens, on which `llama.vocab_size`, the list of tokens and the rows agree."""
    key, listed = "llama.vocab_size", "tokenizer.ggml.tokens"
    if listed in metadata:
        size = len(metadata.get_strings(listed))
        stated = metadata.get_uint(key, size)
        if stated != size:
            raise metadata.error(key, str(stated), f"{size}, the length of {listed}")
        key = listed
    elif key in metadata:
        size = metadata.get_uint(key)
    elif rows is not None:
        size = rows
    else:
        raise metadata.error(key, f"neither it nor {listed}", "one of them")
    if not 1 <= size < 2**31:
        raise metadata.error(key, f"{size} tokens", "1..2147483647")
    if rows is not None and rows != size:
        raise metadata.error(key, f"{size} tokens", f"{rows}, the rows of the token embedding")
    _check_tokens(metadata, size)
    return size


def _check_tokens(metadata: Metadata, size: int) -> None:
    """Refuse scores, types and special tokens that do not belong to a vocabulary of `size`."""
    key = "tokenizer.ggml.scores"
    if (scores := metadata.get_floats(key, None)) is not None:
        _check_items(metadata, key, scores, ~np.isfinite(scores), f"{size} finite numbers", size)
    key = "tokenizer.ggml.token_type"
    if (types := metadata.get_ints(key, None)) is not None:
        _check_items(metadata, key, types, (types < 1) | (types > 6), f"{size} in 1..6", size)
    for name in _SPECIAL_TOKENS:
        metadata.get_uint(f"tokenizer.ggml.{name}_token_id", 0, hi=size - 1)


def _check_items(
    metadata: Metadata, key: str, items: np.ndarray, bad: np.ndarray, wanted: str, size: int
) -> None:
    if items.size != size:
        raise metadata.error(key, f"{items.size} items", wanted)
    if bad.any():
        first = int(np.argmax(bad))
        raise metadata.error(key, f"{items[first]} at index {first}", wanted)
