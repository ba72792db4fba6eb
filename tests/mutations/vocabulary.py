"""Mutations of the tokens that a file lists, and of what it says of them."""

from __future__ import annotations

from random import Random

from gguf_bytes import typed_string, typed_u32
from mutations.draft import Draft, typed, typed_items, typed_texts
from mutations.operators import MERGED, SCORED, TINY, mutation

TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
SCORES, TYPES = "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
NUMBERS = ["bos_token_id", "eos_token_id", "unknown_token_id", "eot_token_id", "eom_token_id"]
HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 'x' * 10000000000 }}",
    "{% include '/etc/passwd' %}",
    "{% for",
]


@mutation("load", "key ")
def tokens_fewer_or_more(draft: Draft, rng: Random) -> None:
    texts = draft.texts(TOKENS)
    other = rng.choice([texts[:-1], texts[:1], [], [*texts, b"one more"]])
    draft.set(TOKENS, typed_texts(other))


@mutation("load", f"key '{TOKENS}'")
def tokens_that_are_no_texts(draft: Draft, rng: Random) -> None:
    draft.set(TOKENS, typed_items("u32", list(range(draft.uint("llama.vocab_size")))))


@mutation("tokenizer", f"key '{TOKENS}'")
def token_twice(draft: Draft, rng: Random) -> None:
    texts = draft.texts(TOKENS)
    one, other = rng.sample(range(len(texts)), 2)
    texts[one] = texts[other]
    draft.set(TOKENS, typed_texts(texts))


@mutation("either")
def token_empty(draft: Draft, rng: Random) -> None:
    texts = draft.texts(TOKENS)
    texts[rng.randrange(len(texts))] = b""
    draft.set(TOKENS, typed_texts(texts))


@mutation("either")
def token_of_any_text(draft: Draft, rng: Random) -> None:
    texts = draft.texts(TOKENS)
    odd = [b"\0", b"\x1b[2J", "▁".encode() * 3000, b"<0xZZ>", b"<|im_end|>", "\U0010ffff".encode()]
    texts[rng.randrange(len(texts))] = rng.choice(odd)
    draft.set(TOKENS, typed_texts(texts))


@mutation("load", f"key '{SCORES}'", on=SCORED)
def scores_as_bytes(draft: Draft, rng: Random) -> None:
    kind = rng.choice(["u8", "i8", "u32", "bool"])
    draft.set(SCORES, typed_items(kind, [0] * draft.uint("llama.vocab_size")))


@mutation("load", f"key '{SCORES}'", on=SCORED)
def score_not_finite(draft: Draft, rng: Random) -> None:
    _, scores = draft.numbers(SCORES)
    scores[rng.randrange(len(scores))] = float(rng.choice(["nan", "inf", "-inf"]))
    draft.set(SCORES, typed_items("f32", scores))


@mutation("load", f"key '{SCORES}'", on=SCORED)
def scores_of_another_number(draft: Draft, rng: Random) -> None:
    _, scores = draft.numbers(SCORES)
    draft.set(SCORES, typed_items("f32", rng.choice([scores[:-1], scores[:1], [], [*scores, 0.0]])))


@mutation("tokenizer", f"key '{SCORES}'", on=SCORED)
def scores_missing(draft: Draft, rng: Random) -> None:
    draft.drop(SCORES)


@mutation("load", f"key '{TYPES}'")
def types_of_another_number(draft: Draft, rng: Random) -> None:
    kind, types = draft.numbers(TYPES)
    draft.set(TYPES, typed_items(kind, rng.choice([types[:-1], types[:1], [], [*types, 1]])))


@mutation("load", f"key '{TYPES}'")
def type_of_a_token_unknown(draft: Draft, rng: Random) -> None:
    kind, types = draft.numbers(TYPES)
    types[rng.randrange(len(types))] = rng.choice([-(2**31), -1, 0, 7, 100, 2**31 - 1])
    draft.set(TYPES, typed_items(kind, types))


@mutation("load", f"key '{TYPES}'")
def types_as_floats(draft: Draft, rng: Random) -> None:
    draft.set(TYPES, typed_items("f32", draft.numbers(TYPES)[1]))


@mutation("tokenizer", f"key '{TYPES}'")
def byte_token_that_is_none(draft: Draft, rng: Random) -> None:
    kind, types = draft.numbers(TYPES)
    texts = draft.texts(TOKENS)
    types[rng.choice([i for i, t in enumerate(texts) if not t.startswith(b"<0x")])] = 6
    draft.set(TYPES, typed_items(kind, types))


@mutation("either")
def types_shuffled(draft: Draft, rng: Random) -> None:
    kind, types = draft.numbers(TYPES)
    rng.shuffle(types)
    draft.set(TYPES, typed_items(kind, types))


@mutation("load", "key 'tokenizer.ggml.")
def special_token_that_is_none(draft: Draft, rng: Random) -> None:
    size = draft.uint("llama.vocab_size")
    key = f"tokenizer.ggml.{rng.choice(NUMBERS)}"
    other = [typed_u32(size), typed_u32(2**31), typed_u32(2**32 - 1), typed("i32", -1)]
    draft.set(key, rng.choice([*other, typed("u64", 2**63), typed_string("1"), typed("f32", 1.0)]))


@mutation("tokenizer", "key 'tokenizer.ggml.model'")
def tokenizer_unknown(draft: Draft, rng: Random) -> None:
    name = rng.choice(["bert", "rwkv", "", "t5", "LLAMA"])
    draft.set("tokenizer.ggml.model", typed_string(name))


@mutation("tokenizer", "key 'tokenizer.ggml.add_")
def flag_that_is_an_integer(draft: Draft, rng: Random) -> None:
    key = f"tokenizer.ggml.add_{rng.choice(['bos', 'eos'])}_token"
    draft.set(key, rng.choice([typed_u32(1), typed("u8", 1), typed_string("true")]))


@mutation("either")
def pretokenizer_unknown(draft: Draft, rng: Random) -> None:
    draft.set("tokenizer.ggml.pre", typed_string(rng.choice(["", "unknown", "llama-bpe", "é"])))


@mutation("tokenizer", f"key '{MERGES}'", on=MERGED)
def merge_of_what_is_no_token(draft: Draft, rng: Random) -> None:
    texts = draft.texts(MERGES)
    odd = [b"", b" ", b"x", b"abc def ghi", b"  ", b"q\0 x", b"t h e", "é▁ 🦙".encode()]
    texts[rng.randrange(len(texts))] = rng.choice(odd)
    draft.set(MERGES, typed_texts(texts))


@mutation("tokenizer", f"key '{MERGES}'", on=MERGED)
def merges_missing(draft: Draft, rng: Random) -> None:
    if rng.randrange(2):
        draft.drop(MERGES)
    else:
        draft.set(MERGES, typed_items("u32", [1, 2]))


@mutation("either", on=MERGED)
def merges_shuffled(draft: Draft, rng: Random) -> None:
    texts = draft.texts(MERGES)
    rng.shuffle(texts)
    draft.set(MERGES, typed_texts([*texts, *texts[:3]]))


@mutation("accept")
def template_that_is_hostile(draft: Draft, rng: Random) -> None:
    """Loading renders nothing."""
    draft.set("tokenizer.chat_template", typed_string(rng.choice(HOSTILE)))


@mutation("accept", on=TINY)
def vocabulary_of_another_model(draft: Draft, rng: Random) -> None:
    """No text can be encoded, but token ids can be given."""
    draft.set("tokenizer.ggml.model", typed_string(rng.choice(["none", "no_vocab"])))
