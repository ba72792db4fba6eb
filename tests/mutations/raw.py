"""Mutations of the finished file: preamble, cuts, appended bytes, and bytes changed blindly."""

from __future__ import annotations

import struct
from random import Random

from mutations.draft import Draft, padded
from mutations.operators import TINY, mutation

WORDS = [0, 1, 2, 31, 2**31, 2**32 - 1, 2**32, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
OTHER_STARTS = [b"<!DOCTYPE html>\n", b"version https://git-lfs.github.com/spec/v1\n", bytes(64)]


def header_size(raw: bytearray) -> int:
    """About where the header ends: the place of the last name in the table of tensors."""
    return max(raw.rfind(b".weight"), raw.rfind(b".bias")) + 40


@mutation("open", "header", level="bytes")
def magic_changed(raw: bytearray, rng: Random) -> None:
    raw[rng.randrange(4)] ^= rng.randrange(1, 256)


@mutation("open", "header", level="bytes")
def start_of_another_kind_of_file(raw: bytearray, rng: Random) -> None:
    start = rng.choice(OTHER_STARTS)
    raw[: len(start)] = start


@mutation("open", "header")
def version_unknown(draft: Draft, rng: Random) -> None:
    draft.version = rng.choice([0, 1, 4, 5, 255, 2**31 + 1, 2**32 - 1])


@mutation("open", "header")
def version_big_endian(draft: Draft, rng: Random) -> None:
    draft.version = rng.choice([2, 3]) << 24


@mutation("accept")
def version_2(draft: Draft, rng: Random) -> None:
    draft.version = 2


@mutation("open", "")
def one_tensor_more(draft: Draft, rng: Random) -> None:
    draft.n_tensors = len(draft.tensors) + 1


@mutation("open", "")
def tensors_fewer(draft: Draft, rng: Random) -> None:
    draft.n_tensors = len(draft.tensors) - rng.randrange(1, 5)


@mutation("open", "")
def one_key_more(draft: Draft, rng: Random) -> None:
    draft.n_keys = len(draft.keys) + 1


@mutation("open", "")
def keys_fewer(draft: Draft, rng: Random) -> None:
    draft.n_keys = len(draft.keys) - rng.randrange(1, 5)


@mutation("open", "header")
def tensors_without_number(draft: Draft, rng: Random) -> None:
    draft.n_tensors = rng.choice([2**20, 2**20 + 1, 2**31, 2**32, 2**58, 2**61, 2**63, 2**64 - 1])


@mutation("open", "header")
def keys_without_number(draft: Draft, rng: Random) -> None:
    draft.n_keys = rng.choice([65_537, 2**31, 2**32, 2**60, 2**61, 2**63, 2**64 - 1])


# Length


@mutation("open", "header", level="bytes")
def cut_in_the_preamble(raw: bytearray, rng: Random) -> None:
    del raw[rng.randrange(24) :]


@mutation("open", "", level="bytes")
def cut_in_the_header(raw: bytearray, rng: Random) -> None:
    del raw[rng.randrange(24, header_size(raw)) :]


@mutation("open", "tensor ", level="bytes")
def cut_in_the_data(raw: bytearray, rng: Random) -> None:
    del raw[rng.randrange(header_size(raw) + 32, len(raw) - 32) :]


@mutation("accept", on=TINY)
def padding_missing_at_the_end(draft: Draft, rng: Random) -> None:
    missing = padded(draft.tensors[-1].nbytes, draft.alignment) - draft.tensors[-1].nbytes
    draft.cut = rng.randint(1, missing)


@mutation("open", "", level="bytes")
def bytes_appended(raw: bytearray, rng: Random) -> None:
    raw += rng.randbytes(rng.choice([1, 31, 32, 33, 4096]))


@mutation("open", "", level="bytes")
def appended_to_itself(raw: bytearray, rng: Random) -> None:
    raw += bytes(raw)


# Bytes changed blindly


@mutation("open", "header", level="bytes")
def zeros_at_the_start(raw: bytearray, rng: Random) -> None:
    count = rng.choice([4, 8, 512, 4096])
    raw[:count] = bytes(count)


@mutation("open", "header", level="bytes")
def random_bytes_alone(raw: bytearray, rng: Random) -> None:
    raw[:] = rng.randbytes(rng.randrange(1, 4096))


@mutation("either", level="bytes")
def random_bytes_after_the_preamble(raw: bytearray, rng: Random) -> None:
    raw[24:] = rng.randbytes(rng.randrange(4096))


@mutation("either", level="bytes")
def bit_of_the_header_flipped(raw: bytearray, rng: Random) -> None:
    raw[rng.randrange(header_size(raw))] ^= 1 << rng.randrange(8)


@mutation("either", level="bytes")
def bit_of_the_data_flipped(raw: bytearray, rng: Random) -> None:
    raw[rng.randrange(header_size(raw), len(raw))] ^= 1 << rng.randrange(8)


@mutation("either", level="bytes")
def bytes_of_the_header_changed(raw: bytearray, rng: Random) -> None:
    for _ in range(rng.randrange(2, 9)):
        raw[rng.randrange(header_size(raw))] = rng.randrange(256)


@mutation("either", level="bytes")
def byte_of_the_table_changed(raw: bytearray, rng: Random) -> None:
    start = raw.rfind(b"token_embd.weight")
    raw[rng.randrange(start - 8, header_size(raw))] = rng.choice([0, 1, 2, 127, 128, 255])


@mutation("either", level="bytes")
def word_of_the_header_replaced(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(8, header_size(raw))
    raw[at : at + 8] = struct.pack("<Q", rng.choice(WORDS))


@mutation("either", level="bytes")
def word_of_the_table_replaced(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(raw.rfind(b"token_embd.weight") - 8, header_size(raw))
    raw[at : at + 8] = struct.pack("<Q", rng.choice(WORDS))


@mutation("either", level="bytes")
def bytes_of_the_header_deleted(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(8, header_size(raw))
    del raw[at : at + rng.randrange(1, 64)]


@mutation("either", level="bytes")
def bytes_of_the_header_repeated(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(8, header_size(raw))
    raw[at:at] = raw[at : at + rng.randrange(1, 64)]


@mutation("either", level="bytes")
def hole_of_zeros_in_the_header(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(8, header_size(raw))
    count = rng.randrange(1, 64)
    raw[at : at + count] = bytes(count)


@mutation("either", level="bytes")
def stretches_of_the_header_exchanged(raw: bytearray, rng: Random) -> None:
    size, end = rng.randrange(1, 64), header_size(raw)
    a, b = rng.randrange(24, end - size), rng.randrange(24, end - size)
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]


@mutation("either", level="bytes")
def block_of_the_file_moved(raw: bytearray, rng: Random) -> None:
    size = rng.choice([32, 512, 4096])
    a, b = rng.randrange(24, len(raw) - size), rng.randrange(24, len(raw) - size)
    raw[a : a + size] = raw[b : b + size]
