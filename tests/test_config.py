from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from config_metadata import FACTOR, ORIGINAL, SCALING, SCORES, TOKENS, TYPES, config
from qllama_jax.config import ModelConfig, RopeScaling
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf

DEFAULTS = ModelConfig(
    num_layers=2,
    embed_dim=64,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=3,
    context_length=128,
    rope_theta=10_000.0,
    rope_dim=16,
    norm_eps=1e-5,
    num_experts=0,
    num_experts_per_token=0,
    rope_scaling=None,
)


def test_missing_keys_mean_what_they_mean_to_llama_cpp():
    assert config({}) == DEFAULTS


def scaled(kind: Any, factor: float, original: int = 128, attn: float = 1.0) -> dict[str, Any]:
    return {"rope_scaling": RopeScaling(kind, factor, original, attn)}


READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layers": ({"block_count": 1024}, {"num_layers": 1024}),
    "grouped heads": ({"attention.head_count_kv": 2}, {"num_kv_heads": 2}),
    "one kv head": ({"attention.head_count_kv": 1}, {"num_kv_heads": 1}),
    "head dimension of its own": (
        {"attention.key_length": 32, "attention.value_length": 32},
        {"head_dim": 32, "rope_dim": 32},
    ),
    "heads that do not divide the embedding": (
        {
            "attention.head_count": 3,
            "attention.key_length": 32,
            "attention.value_length": 32,
        },
        {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "rope_dim": 32},
    ),
    "rope of a part of the head": ({"rope.dimension_count": 8}, {"rope_dim": 8}),
    "rope base": ({"rope.freq_base": 500_000.0}, {"rope_theta": 500_000.0}),
    "eps 0": ({"attention.layer_norm_rms_epsilon": 0.0}, {"norm_eps": 0.0}),
    "longest context": ({"context_length": 2**32 - 1}, {"context_length": 2**32 - 1}),
    "no experts": ({"expert_count": 0, "expert_used_count": 0}, {}),
    "one expert": ({"expert_count": 1}, {"num_experts": 1}),
    "one expert, used": (
        {"expert_count": 1, "expert_used_count": 1},
        {"num_experts": 1, "num_experts_per_token": 1},
    ),
    "experts": (
        {"expert_count": 8, "expert_used_count": 2},
        {"num_experts": 8, "num_experts_per_token": 2},
    ),
    "all experts": (
        {"expert_count": 8, "expert_used_count": 8},
        {"num_experts": 8, "num_experts_per_token": 8},
    ),
    "causal": ({"attention.causal": True}, {}),
    # rope scaling
    "factor alone is linear": ({"rope.scaling.factor": 4.0}, scaled("linear", 4.0)),
    "old name of the factor": ({"rope.scale_linear": 4.0}, scaled("linear", 4.0)),
    "new name before the old": (
        {"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0},
        scaled("linear", 2.0),
    ),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.5},
        scaled("linear", 0.5),
    ),
    "factor 0 is none": ({"rope.scaling.factor": 0.0}, {}),
    "factor 1 is none": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0}, {}),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "none with a factor for attention": (
        {
            "rope.scaling.type": "none",
            "rope.scaling.factor": 4.0,
            "rope.scaling.attn_factor": 1.5,
        },
        scaled("linear", 1.0, attn=1.5),
    ),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 0.75,
        },
        scaled("yarn", 16.0, 32, 0.75),
    ),
    "yarn without its original context": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0},
        scaled("yarn", 16.0, 128),
    ),
    "yarn from a context of 0, which is none": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, ORIGINAL: 0},
        scaled("yarn", 16.0, 128),
    ),
    "longrope from a context of 0": (
        {"rope.scaling.type": "longrope", ORIGINAL: 0},
        scaled("longrope", 1.0, 0),
    ),
    "longrope without a factor": (
        {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.25},
        scaled("longrope", 1.0, 128, 1.25),
    ),
    "longrope alone": ({"rope.scaling.type": "longrope"}, scaled("longrope", 1.0)),
    # vocabulary
    "tokens": ({"vocab_size": None, TOKENS: ["a", "b"]}, {"vocab_size": 2}),
    "tokens and size": ({TOKENS: ["a", "b", "c"]}, {"vocab_size": 3}),
    "types and scores": (
        {
            TOKENS: ["a", "b", "c"],
            TYPES: np.array([1, 6, 3], np.int32),
            SCORES: np.array([0, -1e30, 1], np.float32),
        },
        {},
    ),
    "last token": ({"tokenizer.ggml.eos_token_id": 2}, {}),
    "padding outside, which nothing reads": ({"tokenizer.ggml.padding_token_id": 2**32 - 1}, {}),
}


@pytest.mark.parametrize("name", READ)
def test_a_key_sets_its_field_and_no_other(name):
    changes, fields = READ[name]
    assert config(changes) == dataclasses.replace(DEFAULTS, **fields)


def test_the_vocabulary_is_as_large_as_the_embedding_has_rows():
    assert config({"vocab_size": None}, vocab_size=5).vocab_size == 5
    assert config({}, vocab_size=3).vocab_size == 3
    with pytest.raises(GGUFError, match=r"vocab_size'.*found 3 tokens, wanted 4, the rows of"):
        config({}, vocab_size=4)
    with pytest.raises(GGUFError, match=r"ggml\.tokens'.*found 2 tokens, wanted 4, the rows of"):
        config({"vocab_size": None, TOKENS: ["a", "b"]}, vocab_size=4)
    with pytest.raises(GGUFError, match=r"vocab_size'.*neither it nor tokenizer\.ggml\.tokens"):
        config({"vocab_size": None})


def test_a_config_is_hashable_and_frozen():
    changes = {SCALING: "yarn", FACTOR: 4.0}
    assert hash(config(changes)) == hash(config(changes))
    assert len({config(changes), config(changes), config({})}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config({}).num_layers = 3  # pyright: ignore


def test_a_written_model_gives_the_config_it_was_written_with(tiny_llama):
    path = tiny_llama(
        layers=3,
        embed=256,
        ffn=512,
        heads=8,
        kv_heads=2,
        head_dim=64,
        vocab=300,
        experts=4,
        experts_used=2,
        context_length=77,
    )
    assert ModelConfig.from_metadata(read_gguf(path).metadata) == ModelConfig(
        num_layers=3,
        embed_dim=256,
        ffn_dim=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=300,
        context_length=77,
        rope_theta=10_000.0,
        rope_dim=64,
        norm_eps=float(np.float32(1e-5)),
        num_experts=4,
        num_experts_per_token=2,
        rope_scaling=None,
    )


def test_smollm2_has_its_known_config(smollm2_path):
    metadata = read_gguf(smollm2_path).metadata
    assert ModelConfig.from_metadata(metadata, vocab_size=49_152) == ModelConfig(
        num_layers=30,
        embed_dim=576,
        ffn_dim=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49_152,
        context_length=8192,
        rope_theta=100_000.0,
        rope_dim=64,
        norm_eps=float(np.float32(1e-5)),
        num_experts=0,
        num_experts_per_token=0,
        rope_scaling=None,
    )
