"""Mutations of the model that a sound file describes: constants, and which tensors there are."""

from __future__ import annotations

from random import Random

import numpy as np

from gguf_bytes import typed_array, typed_string, typed_u32, u32
from mutations.draft import Draft, typed, typed_items
from mutations.operators import DENSE, EXPERTS, TINY, mutation

NAN, INF = float("nan"), float("inf")
HEADS, KV_HEADS = "llama.attention.head_count", "llama.attention.head_count_kv"
KEY_LENGTH, VALUE_LENGTH = "llama.attention.key_length", "llama.attention.value_length"
EPS = "llama.attention.layer_norm_rms_epsilon"
REQUIRED = [
    *("general.architecture", "llama.block_count", "llama.embedding_length"),
    *("llama.context_length", "llama.feed_forward_length", HEADS, EPS),
]
INTEGERS = [*REQUIRED[1:-1], KV_HEADS, "llama.rope.dimension_count"]


def names(draft: Draft) -> list[str]:
    return [t.name.decode() for t in draft.tensors]


# Keys


@mutation("load", "key 'general.architecture'")
def architecture_unknown(draft: Draft, rng: Random) -> None:
    other = rng.choice(["qwen2", "LLAMA", "llama ", "", "mamba", "llama\0", "gpt2", "é"])
    draft.set("general.architecture", typed_string(other))


@mutation("load", "key ")
def required_key_missing(draft: Draft, rng: Random) -> None:
    draft.drop(rng.choice(REQUIRED))


@mutation("load", "key ")
def key_under_another_name(draft: Draft, rng: Random) -> None:
    key = rng.choice(REQUIRED).encode()
    draft.keys = [(k.upper() if k == key else k, value) for k, value in draft.keys]


@mutation("load", "key ")
def integer_of_another_kind(draft: Draft, rng: Random) -> None:
    key = rng.choice(INTEGERS)
    number = draft.uint(key)
    other = [typed("f32", number), typed("bool", 1), typed_string(str(number)), typed("i32", -1)]
    draft.set(key, rng.choice([*other, typed_array(4, 1, u32(number)), typed("u64", 2**64 - 1)]))


@mutation("load", "key ")
def float_of_another_kind(draft: Draft, rng: Random) -> None:
    key = rng.choice([EPS, "llama.rope.freq_base"])
    other = [typed_u32(1), typed_string("1e-5"), typed("bool", 1), typed_items("f32", [1e-5])]
    draft.set(key, rng.choice(other))


@mutation("load", "key ")
def integer_zero(draft: Draft, rng: Random) -> None:
    draft.set(rng.choice(INTEGERS), typed_u32(0))


@mutation("load", "")
def integer_off_by_one(draft: Draft, rng: Random) -> None:
    """But for the context's length, of which no tensor tells."""
    keys = [key for key in INTEGERS if key not in ("llama.context_length", KV_HEADS)]
    key = rng.choice([k for k in keys if k != "llama.rope.dimension_count"])
    draft.set(key, typed_u32(draft.uint(key) + rng.choice([-1, 1])))


@mutation("load", "")
def integer_huge(draft: Draft, rng: Random) -> None:
    key = rng.choice([key for key in INTEGERS if key != "llama.context_length"])
    draft.set(key, typed_u32(rng.choice([2**16 + 2, 2**20, 2**24, 2**31, 2**32 - 1])))


@mutation("load", "")
def integer_twice_or_half(draft: Draft, rng: Random) -> None:
    keys = ["llama.block_count", "llama.embedding_length", "llama.feed_forward_length", KV_HEADS]
    key = rng.choice(keys)
    number = draft.uint(key)
    draft.set(key, typed_u32(rng.choice([number * 2, number // 2, number * 3])))


@mutation("load", "key ")
def heads_that_do_not_divide(draft: Draft, rng: Random) -> None:
    heads = draft.uint(HEADS)
    if rng.randrange(2):
        draft.set(HEADS, typed_u32(rng.choice([5, 7, 11, 13])))
        draft.set(KV_HEADS, typed_u32(1))
    else:
        draft.set(KV_HEADS, typed_u32(rng.choice([n for n in range(2, 20) if heads % n])))


@mutation("load", "key ")
def values_of_another_length_than_keys(draft: Draft, rng: Random) -> None:
    width = draft.uint("llama.embedding_length") // draft.uint(HEADS)
    draft.set(rng.choice([KEY_LENGTH, VALUE_LENGTH]), typed_u32(width * 2))


@mutation("load", "")
def heads_of_another_length(draft: Draft, rng: Random) -> None:
    width = draft.uint("llama.embedding_length") // draft.uint(HEADS)
    other = rng.choice([width // 2, width * 2, 2**16])
    draft.set(KEY_LENGTH, typed_u32(other))
    draft.set(VALUE_LENGTH, typed_u32(other))


@mutation("load", "key ")
def rope_dimensions_that_may_not_be(draft: Draft, rng: Random) -> None:
    width = draft.uint("llama.embedding_length") // draft.uint(HEADS)
    other = rng.choice([0, 1, 3, width - 1, width + 1, width + 2, 2**32 - 1])
    draft.set("llama.rope.dimension_count", typed_u32(other))


@mutation("load", "key 'llama.rope.freq_base'")
def rope_base_that_may_not_be(draft: Draft, rng: Random) -> None:
    kind = rng.choice(["f32", "f64"])
    draft.set("llama.rope.freq_base", typed(kind, rng.choice([0.0, -0.0, -1e4, NAN, INF, -INF])))


@mutation("either")
def rope_base_at_the_edge_of_its_range(draft: Draft, rng: Random) -> None:
    value = rng.choice([5e-324, 1e-300, 1e-45, 1e-3, 1.0, 3e38, 1e300, 1.7e308])
    draft.set("llama.rope.freq_base", typed("f64", value))


@mutation("load", f"key '{EPS}'")
def epsilon_that_may_not_be(draft: Draft, rng: Random) -> None:
    kind = rng.choice(["f32", "f64"])
    draft.set(EPS, typed(kind, rng.choice([-1e-5, 1.0, 2.0, NAN, INF, -INF])))


@mutation("accept")
def context_of_any_length(draft: Draft, rng: Random) -> None:
    """Nothing may be as large as a file says the context is."""
    draft.set("llama.context_length", typed_u32(rng.choice([1, 2**20, 2**31, 2**32 - 1])))


@mutation("load", "key 'llama.rope.scaling.type'")
def scaling_unknown(draft: Draft, rng: Random) -> None:
    kind = rng.choice(["dynamic", "YARN", "", "llama3", "yarn "])
    draft.set("llama.rope.scaling.type", typed_string(kind))


@mutation("load", "key 'llama.rope.scaling.")
def scaling_factor_that_may_not_be(draft: Draft, rng: Random) -> None:
    key = rng.choice(["llama.rope.scaling.factor", "llama.rope.scaling.attn_factor"])
    draft.set("llama.rope.scaling.type", typed_string(rng.choice(["linear", "yarn"])))
    draft.set(key, typed("f32", rng.choice([-1.0, NAN, INF, -INF])))


@mutation("accept")
def scaling_of_a_known_kind(draft: Draft, rng: Random) -> None:
    draft.set("llama.rope.scaling.type", typed_string(rng.choice(["none", "linear", "yarn"])))
    draft.set("llama.rope.scaling.factor", typed("f32", rng.choice([0.5, 1.0, 2.0, 32.0])))


@mutation("either")
def scaling_at_the_edge_of_its_range(draft: Draft, rng: Random) -> None:
    draft.set("llama.rope.scaling.type", typed_string(rng.choice(["linear", "yarn", "longrope"])))
    for key in ("llama.rope.scaling.factor", "llama.rope.scaling.attn_factor"):
        draft.set(key, typed("f64", rng.choice([5e-324, 1e-30, 1.0, 1e30, 1e308])))
    original = rng.choice([0, 1, 2**31, 2**32 - 1])
    draft.set("llama.rope.scaling.original_context_length", typed_u32(original))


@mutation("load", "key ")
def a_number_for_each_layer(draft: Draft, rng: Random) -> None:
    key = rng.choice([HEADS, KV_HEADS, "llama.feed_forward_length"])
    layers = draft.uint("llama.block_count")
    draft.set(key, typed_items("u32", [draft.uint(key)] * layers))


@mutation("load", "key 'llama.attention.causal'")
def attention_not_causal(draft: Draft, rng: Random) -> None:
    draft.set("llama.attention.causal", typed("bool", 0))


@mutation("load", "key ")
def vocabulary_of_another_size(draft: Draft, rng: Random) -> None:
    size = draft.uint("llama.vocab_size")
    other = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**32 - 1])
    draft.set("llama.vocab_size", typed_u32(other))


# Tensors


@mutation("load", "tensor ")
def tensor_missing(draft: Draft, rng: Random) -> None:
    """Any but the output, without which the embedding serves."""
    named = [t for t in draft.tensors if t.name not in (b"output.weight", b"token_embd.weight")]
    draft.tensors.remove(rng.choice(named))


@mutation("load", "")
def embedding_missing(draft: Draft, rng: Random) -> None:
    draft.tensors.remove(draft.tensor("token_embd.weight"))


@mutation("accept", on=TINY)
def output_missing(draft: Draft, rng: Random) -> None:
    draft.tensors.remove(draft.tensor("output.weight"))


@mutation("load", "")
def tensor_too_many(draft: Draft, rng: Random) -> None:
    layers = draft.uint("llama.block_count")
    other = ["output.bias", "x", f"blk.{layers}.attn_q.weight", "blk.0.attn_norm.bias", "blk.00.x"]
    draft.add(rng.choice(other), (32,), np.zeros(32))


@mutation("load", "")
def tensor_renamed(draft: Draft, rng: Random) -> None:
    tensor = rng.choice([t for t in draft.tensors if t.name != b"output.weight"])
    tensor.name = rng.choice([tensor.name.upper(), tensor.name + b" ", b"x" + tensor.name])


@mutation("load", "tensor ")
def matrix_turned_round(draft: Draft, rng: Random) -> None:
    tensor = draft.tensor("blk.0.attn_k.weight")
    tensor.shape = tensor.shape[::-1]


@mutation("load", "tensor ")
def matrix_in_three_dimensions(draft: Draft, rng: Random) -> None:
    tensor = draft.tensor("blk.0.attn_output.weight")
    columns, rows = tensor.shape
    tensor.shape = rng.choice([(columns, 1, rows), (columns, rows // 2, 2)])


@mutation("load", "")
def names_of_two_tensors_exchanged(draft: Draft, rng: Random) -> None:
    one, other = draft.tensor("blk.0.attn_k.weight"), draft.tensor("blk.0.attn_q.weight")
    one.name, other.name = other.name, one.name


@mutation("accept", on=TINY)
def names_of_two_alike_exchanged(draft: Draft, rng: Random) -> None:
    """Nobody can see it: each tensor has the bytes that the file declares."""
    one, other = draft.tensor("blk.0.attn_norm.weight"), draft.tensor("blk.0.ffn_norm.weight")
    one.name, other.name = other.name, one.name


@mutation("accept", on=TINY)
def bias_added(draft: Draft, rng: Random) -> None:
    draft.add("blk.0.attn_q.bias", (64,), np.ones(64))


@mutation("load", "tensor 'blk.0.attn_q.bias'")
def bias_of_another_size(draft: Draft, rng: Random) -> None:
    size = rng.choice([1, 32, 63, 65, 128])
    draft.add("blk.0.attn_q.bias", (size,), np.ones(size))


@mutation("accept", on=TINY)
def rope_factors_added(draft: Draft, rng: Random) -> None:
    draft.add("rope_freqs.weight", (8,), np.geomspace(1, 8, 8))


@mutation("load", "tensor 'rope_freqs.weight'", on=TINY)
def rope_factors_that_may_not_be(draft: Draft, rng: Random) -> None:
    factors = np.geomspace(1, 8, 8)
    factors[rng.randrange(8)] = rng.choice([0.0, -0.0, -1.0, NAN, INF, -INF])
    draft.add("rope_freqs.weight", (8,), factors)


@mutation("load", "tensor 'rope_freqs.weight'", on=TINY)
def rope_factors_of_another_number(draft: Draft, rng: Random) -> None:
    size = rng.choice([1, 7, 9, 16])
    draft.add("rope_freqs.weight", (size,), np.ones(size))


# Experts


@mutation("load", "", on=EXPERTS)
def experts_of_another_number(draft: Draft, rng: Random) -> None:
    draft.set("llama.expert_count", typed_u32(rng.choice([2, 3, 5, 8, 1024, 1025, 2**32 - 1])))


@mutation("load", "", on=EXPERTS)
def experts_unmentioned(draft: Draft, rng: Random) -> None:
    draft.drop("llama.expert_count")
    if rng.randrange(2):
        draft.drop("llama.expert_used_count")


@mutation("load", "key 'llama.expert_used_count'", on=EXPERTS)
def experts_used_that_may_not_be(draft: Draft, rng: Random) -> None:
    draft.set("llama.expert_used_count", typed_u32(rng.choice([0, 5, 8, 2**31, 2**32 - 1])))


@mutation("load", "", on=DENSE)
def experts_that_are_not_there(draft: Draft, rng: Random) -> None:
    draft.set("llama.expert_count", typed_u32(rng.choice([2, 8, 1024, 2**31])))
    draft.set("llama.expert_used_count", typed_u32(rng.choice([1, 2, 3])))


@mutation("load", "tensor ", on=EXPERTS)
def router_missing(draft: Draft, rng: Random) -> None:
    draft.tensors.remove(draft.tensor(f"blk.{rng.randrange(2)}.ffn_gate_inp.weight"))


@mutation("load", "tensor 'blk.0.ffn_", on=EXPERTS)
def experts_in_another_order_of_dimensions(draft: Draft, rng: Random) -> None:
    tensor = draft.tensor(rng.choice(["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"]))
    columns, rows, experts = tensor.shape
    tensor.shape = rng.choice([(columns, experts, rows), (columns, rows * experts)])
