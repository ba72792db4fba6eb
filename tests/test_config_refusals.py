"""Values of a file's keys that cannot be are refused with key, what was found and wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from config_metadata import (
    ATTN,
    BASE,
    FACTOR,
    INF,
    NAN,
    ORIGINAL,
    SCALING,
    SCORES,
    TOKENS,
    TYPES,
    config,
    full,
)
from qllama_jax.errors import GGUFError

HEADS, KV = "attention.head_count", "attention.head_count_kv"
KEY, VALUE = "attention.key_length", "attention.value_length"
EPS, BASE_KEY = "attention.layer_norm_rms_epsilon", "rope.freq_base"
PER_LAYER = np.array([4, 4], np.int32)

# What is wrong -> (keys, the key that the error names, found, wanted)
REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "architecture": (
        {"general.architecture": "qwen2"},
        "general.architecture",
        "'qwen2'",
        "'llama'",
    ),
    "architecture in capitals": (
        {"general.architecture": "LLAMA"},
        "general.architecture",
        "'LLAMA'",
        "'llama'",
    ),
    "architecture not text": (
        {"general.architecture": 1},
        "general.architecture",
        "the int 1",
        "a string",
    ),
    "encoder": ({"attention.causal": False}, "attention.causal", "False", "True"),
    "no layers": ({"block_count": 0}, "block_count", "the int 0", "an integer in 1..1024"),
    "layers": ({"block_count": 1025}, "block_count", "the int 1025", "an integer in 1..1024"),
    "layers as float": ({"block_count": 2.0}, "block_count", "the float 2.0", "an integer"),
    "no embedding": ({"embedding_length": 0}, "embedding_length", "the int 0", "an integer in 1.."),
    "embedding": (
        {"embedding_length": 2**20 + 4},
        "embedding_length",
        "the int 1048580",
        "an integer in 1..",
    ),
    "no ffn": ({"feed_forward_length": 0}, "feed_forward_length", "the int 0", "an integer in 1.."),
    "ffn": (
        {"feed_forward_length": 2**25},
        "feed_forward_length",
        "the int 33554432",
        "an integer in 1..",
    ),
    "no context": ({"context_length": 0}, "context_length", "the int 0", "in 1..4294967295"),
    "context": ({"context_length": 2**32}, "context_length", "the int 4294967296", "in 1.."),
    "no heads": ({HEADS: 0}, HEADS, "the int 0", "an integer in 1..65536"),
    "heads": ({HEADS: 2**16 + 1}, HEADS, "the int 65537", "an integer in 1..65536"),
    "heads that do not divide": ({HEADS: 3}, HEADS, "3", "a divisor of the embedding's 64"),
    "more heads than dimensions": (
        {"embedding_length": 2, HEADS: 4},
        HEADS,
        "4",
        "a divisor of the embedding's 2",
    ),
    "no kv heads": ({KV: 0}, KV, "the int 0", "an integer in 1..4"),
    "kv heads": ({KV: 8}, KV, "the int 8", "an integer in 1..4"),
    "kv heads that do not divide": ({KV: 3}, KV, "3", "a divisor of the 4 heads"),
    "heads a layer": ({HEADS: PER_LAYER}, HEADS, "an array of 2 int32, one a layer", "one integer"),
    "kv heads a layer": ({KV: PER_LAYER}, KV, "an array of 2 int32, one a layer", "one integer"),
    "ffn a layer": (
        {"feed_forward_length": PER_LAYER},
        "feed_forward_length",
        "an array of 2 int32, one a layer",
        "one integer for all layers",
    ),
    "no key length": ({KEY: 0, VALUE: 0}, KEY, "the int 0", "an integer in 1..65536"),
    "key length": ({KEY: 2**17, VALUE: 2**17}, KEY, "the int 131072", "an integer in 1..65536"),
    "no value length": ({VALUE: 0}, VALUE, "the int 0", "an integer in 1..65536"),
    "values of another length": ({KEY: 32, VALUE: 16}, VALUE, "16", "32, the length of the keys"),
    "values of the usual length": ({KEY: 32}, VALUE, "none, which means 16", "32, the length of"),
    "values alone": ({VALUE: 32}, VALUE, "32", "16, the length of the keys"),
    "no rope": (
        {"rope.dimension_count": 0},
        "rope.dimension_count",
        "0",
        "an even number in 2..16",
    ),
    "odd rope": ({"rope.dimension_count": 7}, "rope.dimension_count", "7", "an even number in 2.."),
    "rope past the head": ({"rope.dimension_count": 18}, "rope.dimension_count", "18", "in 2..16"),
    "odd head": (
        {KEY: 15, VALUE: 15},
        "rope.dimension_count",
        "none, which means 15",
        "an even number in 2..15",
    ),
    "base 0": ({BASE_KEY: 0.0}, BASE_KEY, "0.0", "a finite number above 0"),
    "base -1": ({BASE_KEY: -1.0}, BASE_KEY, "-1.0", "a finite number above 0"),
    "base NaN": ({BASE_KEY: NAN}, BASE_KEY, "nan", "a finite number above 0"),
    "base infinite": ({BASE_KEY: INF}, BASE_KEY, "inf", "a finite number above 0"),
    "base as integer": ({BASE_KEY: 10_000}, BASE_KEY, "the int 10000", "a float"),
    "eps negative": ({EPS: -1e-5}, EPS, "-1e-05", "a number from 0 to below 1"),
    "eps 1": ({EPS: 1.0}, EPS, "1.0", "a number from 0 to below 1"),
    "eps NaN": ({EPS: NAN}, EPS, "nan", "a number from 0 to below 1"),
    "eps infinite": ({EPS: INF}, EPS, "inf", "a number from 0 to below 1"),
    "experts": ({"expert_count": 2000}, "expert_count", "the int 2000", "in 0..1024"),
    "no experts used": (
        {"expert_count": 8, "expert_used_count": 0},
        "expert_used_count",
        "the int 0",
        "an integer in 1..8",
    ),
    "more experts used": (
        {"expert_count": 8, "expert_used_count": 9},
        "expert_used_count",
        "the int 9",
        "an integer in 1..8",
    ),
    "experts used of none": (
        {"expert_used_count": 2},
        "expert_used_count",
        "the int 2",
        "an integer in 0..0",
    ),
    "unknown scaling": (
        {SCALING: "dynamic"},
        SCALING,
        "'dynamic'",
        "one of none, linear, yarn, longrope",
    ),
    "factor negative": ({FACTOR: -2.0}, FACTOR, "-2.0", "a finite number above 0"),
    "factor NaN": ({FACTOR: NAN}, FACTOR, "nan", "a finite number above 0"),
    "factor infinite": ({FACTOR: INF}, FACTOR, "inf", "a finite number above 0"),
    "old factor negative": (
        {"rope.scale_linear": -2.0},
        "rope.scale_linear",
        "-2.0",
        "a finite number above 0",
    ),
    "attention factor 0": ({ATTN: 0.0}, ATTN, "0.0", "a finite number above 0"),
    "attention factor NaN": ({ATTN: NAN}, ATTN, "nan", "a finite number above 0"),
    "original context": ({ORIGINAL: 2**32}, ORIGINAL, "the int 4294967296", "in 0..4294967295"),
    "no tokens": ({"vocab_size": None, TOKENS: []}, TOKENS, "0 tokens", "1.."),
    "vocabulary of 0": ({"vocab_size": 0}, "vocab_size", "0 tokens", "1..2147483647"),
    "vocabulary of 2^31": ({"vocab_size": 2**31}, "vocab_size", "2147483648 tokens", "1.."),
    "tokens and another size": (
        {TOKENS: ["a", "b"]},
        "vocab_size",
        "3",
        "2, the length of tokenizer.ggml.tokens",
    ),
    "tokens not text": ({TOKENS: PER_LAYER}, TOKENS, "an array of 2 int32", "an array of strings"),
    "scores as bytes": (
        {SCORES: np.zeros(3, np.uint8)},
        SCORES,
        "an array of 3 uint8",
        "an array of floats",
    ),
    "a score too few": ({SCORES: np.zeros(2, np.float32)}, SCORES, "2 items", "3 finite numbers"),
    "a score NaN": (
        {SCORES: np.array([0, 0, NAN], np.float32)},
        SCORES,
        "nan at index 2",
        "3 finite numbers",
    ),
    "a type too many": ({TYPES: np.ones(4, np.int32)}, TYPES, "4 items", "3 in 1..6"),
    "type 0": ({TYPES: np.array([1, 0, 1], np.int32)}, TYPES, "0 at index 1", "3 in 1..6"),
    "type 7": ({TYPES: np.array([1, 1, 7], np.int32)}, TYPES, "7 at index 2", "3 in 1..6"),
    "types as floats": (
        {TYPES: np.ones(3, np.float32)},
        TYPES,
        "an array of 3 float32",
        "an array",
    ),
} | {
    f"{name} token outside": (
        {f"tokenizer.ggml.{name}_token_id": 3},
        f"tokenizer.ggml.{name}_token_id",
        "the int 3",
        "an integer in 0..2",
    )
    for name in ("bos", "eos", "eot", "eom", "unknown")
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_be_is_refused_with_key_found_and_wanted(name):
    changes, key, found, wanted = REFUSED[name]
    with pytest.raises(GGUFError) as caught:
        config(changes)
    where, _, what = str(caught.value).partition(": found ")
    assert where.startswith(f"m.gguf: key '{full(key)}'")
    assert (" (header offset " in where) == (key in changes or full(key) in BASE)
    assert what.startswith(f"{found}, wanted ")
    assert wanted in what.removeprefix(found)


@pytest.mark.parametrize("key", sorted(set(BASE) - {"llama.vocab_size"}))
def test_a_required_key_that_is_missing_is_named(key):
    with pytest.raises(GGUFError, match=rf"^m\.gguf: key '{key}' is missing, wanted a"):
        config({key.removeprefix("llama."): None})


def test_experts_need_a_number_used():
    with pytest.raises(GGUFError, match=r"key 'llama\.expert_used_count' is missing, wanted an"):
        config({"expert_count": 8})
