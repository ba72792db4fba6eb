"""Mutations of the key-value section: keys, kinds of values, strings, and the alignment."""

from __future__ import annotations

import struct
from random import Random

from gguf_bytes import string, typed_array, typed_string, typed_u32, u32, u64
from mutations.draft import FORMS, Draft, typed
from mutations.operators import TINY, mutation

LARGEST = {"u8": 2**8 - 1, "u16": 2**16 - 1, "u32": 2**32 - 1, "u64": 2**64 - 1}
FLOATS = [0.0, -0.0, 1e-45, 5e-324, -1.5, float("inf"), float("nan")]
WIDER = {"u64": "<Q", "i64": "<q", "i32": "<i", "u32": "<I"}
COUNTS = ["llama.block_count", "llama.embedding_length", "llama.attention.head_count"]
NOT_UTF8 = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"ok\xe2\x82", b"\xf5\x80\x80\x80", b"\x80"]


def add(draft: Draft, rng: Random, key: bytes, value: bytes) -> None:
    """Put a key anywhere among the others."""
    draft.keys.insert(rng.randint(0, len(draft.keys)), (key, value))


# Keys


@mutation("open", "key ")
def key_empty(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"", typed_u32(1))


@mutation("open", "key ")
def key_too_long(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"k" * rng.choice([65_536, 65_537, 100_000]), typed_u32(1))


@mutation("open", "key ")
def key_not_printable(draft: Draft, rng: Random) -> None:
    odd = rng.choice([b"\0", b"\n", b"\x1b[2J", b"\x7f", "ä".encode(), "\u202e".encode()])
    add(draft, rng, b"x." + odd + b"y", typed_u32(1))


@mutation("open", "key ")
def key_not_utf8(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x." + rng.choice(NOT_UTF8), typed_u32(1))


@mutation("open", "key ")
def key_twice(draft: Draft, rng: Random) -> None:
    draft.keys.append(rng.choice(draft.keys))


@mutation("open", "key ")
def key_twice_with_another_value(draft: Draft, rng: Random) -> None:
    draft.keys.append((rng.choice(draft.keys)[0], typed_u32(rng.randrange(2**32))))


@mutation("open", "key ", level="bytes")
def key_of_huge_length(raw: bytearray, rng: Random) -> None:
    lengths = [65_536, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8]
    raw[24:32] = u64(rng.choice(lengths))  # of the first key


@mutation("accept")
def key_as_long_as_may_be(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"k" * 65_535, typed_u32(1))


@mutation("accept")
def keys_shuffled(draft: Draft, rng: Random) -> None:
    rng.shuffle(draft.keys)


@mutation("accept")
def keys_that_nobody_knows(draft: Draft, rng: Random) -> None:
    for i in range(rng.randrange(1, 200)):
        add(draft, rng, b"x.%d" % i, typed_u32(rng.randrange(2**32)))


# Kinds of values


@mutation("open", "key ")
def value_type_unknown(draft: Draft, rng: Random) -> None:
    kind = rng.choice([13, 14, 255, 256, 2**16, 2**31, 2**32 - 1])
    add(draft, rng, b"x.y", u32(kind) + bytes(8))


@mutation("open", "key ")
def value_type_of_a_key_unknown(draft: Draft, rng: Random) -> None:
    at = rng.randrange(len(draft.keys))
    key, value = draft.keys[at]
    draft.keys[at] = key, u32(rng.choice([13, 14, 99, 2**32 - 1])) + value[4:]


@mutation("accept")
def number_of_every_type(draft: Draft, rng: Random) -> None:
    for kind, most in LARGEST.items():
        add(draft, rng, b"x." + kind.encode(), typed(kind, rng.randint(0, most)))
        signed = "i" + kind[1:]
        half = (most + 1) // 2
        add(draft, rng, b"x." + signed.encode(), typed(signed, rng.randint(-half, half - 1)))
    for kind in ("f32", "f64"):
        add(draft, rng, b"x." + kind.encode(), typed(kind, rng.choice(FLOATS)))
    add(draft, rng, b"x.bool", typed("bool", rng.randrange(2)))


@mutation("accept")
def number_of_another_width(draft: Draft, rng: Random) -> None:
    for key in COUNTS:
        kind = rng.choice(sorted(WIDER))
        draft.set(key, u32(FORMS[kind][0]) + struct.pack(WIDER[kind], draft.uint(key)))


@mutation("accept")
def float_of_another_width(draft: Draft, rng: Random) -> None:
    draft.set("llama.attention.layer_norm_rms_epsilon", typed("f64", rng.choice([0.0, 1e-5, 0.5])))
    draft.set("llama.rope.freq_base", typed("f64", rng.choice([1.0, 1e4, 5e5])))


@mutation("open", "key ")
def bool_that_is_none(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", typed("bool", rng.randrange(2, 256)))


# Strings


@mutation("open", "key ")
def string_not_utf8(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", typed_string(b"text " + rng.choice(NOT_UTF8)))


@mutation("open", "key ")
def string_of_huge_length(draft: Draft, rng: Random) -> None:
    length = rng.choice(
        [2**26 + 1, 2**31, 2**32, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]
    )
    add(draft, rng, b"x.y", u32(8) + u64(length) + b"text")


@mutation("open", "key ", on=TINY)
def string_past_the_end(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", u32(8) + u64(rng.choice([2**20, 2**25, 2**26])) + b"text")


@mutation("either")
def string_a_little_longer_than_it_is(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", u32(8) + u64(rng.randrange(5, 200)) + b"text")


@mutation("accept")
def strings_of_all_kinds(draft: Draft, rng: Random) -> None:
    texts = ["", "\0", "\x1b[2J", "é▁🦙", "x" * 5000, "{{ 1 }}", "\ufeff", "\U0010ffff"]
    for i, text in enumerate(texts):
        add(draft, rng, b"x.%d" % i, typed_string(text))


# The alignment, which moves all data


@mutation("open", "key 'general.alignment'")
def alignment_that_may_not_be(draft: Draft, rng: Random) -> None:
    value = rng.choice([0, 1, 2, 4, 7, 24, 33, 48, 2**20 + 1, 2**21, 2**31, 2**32 - 1])
    draft.set("general.alignment", typed_u32(value))


@mutation("open", "key 'general.alignment'")
def alignment_of_another_type(draft: Draft, rng: Random) -> None:
    other = [typed("u64", 32), typed("i32", 32), typed("f32", 32.0), typed_string("32")]
    other += [typed_array(4, 1, u32(32)), typed("bool", 1), typed("u8", 32)]
    draft.set("general.alignment", rng.choice(other))


@mutation("open", "tensor ", on=TINY)
def alignment_that_the_data_do_not_follow(draft: Draft, rng: Random) -> None:
    draft.set("general.alignment", typed_u32(rng.choice([4096, 8192, 2**20])))


@mutation("accept", on=TINY)
def alignment_that_the_data_follow(draft: Draft, rng: Random) -> None:
    draft.alignment = rng.choice([8, 16, 32, 64, 128, 4096])
    draft.set("general.alignment", typed_u32(draft.alignment))


@mutation("either")
def value_without_its_string(draft: Draft, rng: Random) -> None:
    add(draft, rng, b"x.y", u32(rng.randrange(13)) + string("")[: rng.randrange(9)])
