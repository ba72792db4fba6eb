"""Mutations of arrays among the metadata."""

from __future__ import annotations

from random import Random

from gguf_bytes import string, typed_array, u32, u64
from mutations.draft import FORMS, Draft, typed_items, typed_texts
from mutations.keys import NOT_UTF8, add
from mutations.operators import TINY, mutation

TOKENS = "tokenizer.ggml.tokens"
HUGE = [2**24 + 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]


def array_value(draft: Draft, key: str) -> bytearray:
    """Type and value of an array: its item type is at byte 4, its length at byte 8."""
    value = draft.value(key)
    assert value is not None
    return bytearray(value)


@mutation("open", "key ")
def item_type_unknown(draft: Draft, rng: Random) -> None:
    kind = rng.choice([13, 14, 255, 2**31, 2**32 - 1])
    add(draft, rng, b"x.y", typed_array(kind, rng.choice([0, 1]), bytes(8)))


@mutation("open", "key ")
def array_of_arrays(draft: Draft, rng: Random) -> None:
    value = typed_array(4, 1, u32(1))
    for _ in range(rng.choice([1, 2, 100, 3000])):
        value = typed_array(9, 1, value[4:])
    add(draft, rng, b"x.y", value)


@mutation("open", "key ")
def array_of_huge_length(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", typed_array(rng.choice([0, 4, 6, 8, 10]), rng.choice(HUGE), bytes(64)))


@mutation("open", "key ")
def tokens_of_huge_number(draft: Draft, rng: Random) -> None:
    value = array_value(draft, TOKENS)
    value[8:16] = u64(rng.choice(HUGE))
    draft.set(TOKENS, bytes(value))


@mutation("open", "key ", on=TINY)
def array_past_the_end(draft: Draft, rng: Random) -> None:
    add(
        draft,
        rng,
        b"x.y",
        typed_array(rng.choice([0, 4, 8]), rng.choice([2**20, 2**24]), bytes(64)),
    )


@mutation("either")
def array_a_little_longer_than_it_is(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", typed_array(rng.choice([0, 4, 8]), rng.randrange(9, 200), bytes(8)))


@mutation("either")
def tokens_one_more_or_less(draft: Draft, rng: Random) -> None:
    value = array_value(draft, TOKENS)
    value[8:16] = u64(len(draft.texts(TOKENS)) + rng.choice([-1, 1]))
    draft.set(TOKENS, bytes(value))


@mutation("open", "key ")
def item_string_of_huge_length(draft: Draft, rng: Random) -> None:
    length = rng.choice([2**26 + 1, 2**32, 2**63, 2**64 - 1, 2**64 - 8])
    items = string("a") + u64(length) + b"text" + bytes(16)
    add(draft, rng, b"x.y", typed_array(8, 3, items))


@mutation("open", "key ")
def item_string_not_utf8(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", typed_texts([b"a", rng.choice(NOT_UTF8), b"b"]))


@mutation("open", f"key '{TOKENS}'")
def token_not_utf8(draft: Draft, rng: Random) -> None:
    texts = draft.texts(TOKENS)
    texts[rng.randrange(len(texts))] = rng.choice(NOT_UTF8)
    draft.set(TOKENS, typed_texts(texts))


@mutation("open", "key ")
def item_bool_that_is_none(draft: Draft, rng: Random) -> None:
    flags = [rng.randrange(2) for _ in range(rng.randrange(1, 100))]
    flags[rng.randrange(len(flags))] = rng.randrange(2, 256)
    add(draft, rng, b"x.y", typed_items("bool", flags))


@mutation("accept")
def arrays_that_are_empty(draft: Draft, rng: Random) -> None:
    for kind in (*(number for number, _ in FORMS.values()), 8):
        add(draft, rng, b"x.%d" % kind, typed_array(kind, 0, b""))


@mutation("accept")
def arrays_of_every_type(draft: Draft, rng: Random) -> None:
    for kind, (number, _) in FORMS.items():
        count = rng.randrange(1, 50)
        width = {"bool": 8}.get(kind) or int(kind[1:])
        items = rng.randbytes(count * width // 8)
        if kind == "bool":
            items = bytes(byte & 1 for byte in items)
        add(draft, rng, b"x." + kind.encode(), typed_array(number, count, items))
    add(draft, rng, b"x.texts", typed_texts([b"", "é▁🦙".encode(), b"\0", b"x" * 3000]))
