"""Mutations of the data: numbers that are none, any bits that are, and padding."""

from __future__ import annotations

import struct
from random import Random

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from blocks import random_blocks
from mutations.draft import Draft, Tensor
from mutations.operators import EXPERTS, TINY, mutation

Q = GGMLQuantizationType
HALVES = {Q.F16, Q.Q4_0, Q.Q4_1, Q.Q8_0}  # types of which a block begins with a float16
NOT_FINITE_16 = [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF]
NOT_FINITE_32 = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF]


def overwrite(tensor: Tensor, at: int, new: bytes) -> None:
    tensor.data = tensor.data[:at] + new + tensor.data[at + len(new) :]


def any_of(draft: Draft, rng: Random, qtypes: set[GGMLQuantizationType]) -> Tensor:
    return rng.choice([t for t in draft.tensors if t.qtype in qtypes])


def any_block(tensor: Tensor, rng: Random) -> int:
    """Where a block of a tensor begins: the first, the last, or any."""
    size = GGML_QUANT_SIZES[Q(tensor.qtype)][1]
    count = len(tensor.data) // size
    return size * rng.choice([0, count - 1, rng.randrange(count)])


@mutation("load", "tensor ", on=TINY)
def scale_not_finite(draft: Draft, rng: Random) -> None:
    tensor = any_of(draft, rng, HALVES)
    bits = struct.pack("<H", rng.choice(NOT_FINITE_16))
    overwrite(tensor, any_block(tensor, rng), bits)


@mutation("load", "tensor ", on=TINY)
def minimum_not_finite(draft: Draft, rng: Random) -> None:
    tensor = any_of(draft, rng, {Q.Q4_1})
    bits = struct.pack("<H", rng.choice(NOT_FINITE_16))
    overwrite(tensor, any_block(tensor, rng) + 2, bits)


@mutation("load", "tensor ", on=TINY)
def float32_not_finite(draft: Draft, rng: Random) -> None:
    tensor = any_of(draft, rng, {Q.F32})
    overwrite(tensor, any_block(tensor, rng), struct.pack("<I", rng.choice(NOT_FINITE_32)))


@mutation("load", "tensor ", on=TINY)
def bfloat16_not_finite(draft: Draft, rng: Random) -> None:
    tensor = any_of(draft, rng, {Q.BF16})
    bits = struct.pack("<H", rng.choice(NOT_FINITE_32) >> 16 | 1)
    overwrite(tensor, any_block(tensor, rng), bits)


@mutation("load", "tensor 'blk.", on=EXPERTS)
def router_not_finite(draft: Draft, rng: Random) -> None:
    tensor = draft.tensor(f"blk.{rng.randrange(2)}.ffn_gate_inp.weight")
    overwrite(tensor, any_block(tensor, rng), struct.pack("<I", rng.choice(NOT_FINITE_32)))


@mutation("accept", on=TINY)
def scale_at_the_edge_of_its_range(draft: Draft, rng: Random) -> None:
    """Subnormal, largest and negative zero."""
    tensor = any_of(draft, rng, HALVES)
    bits = rng.choice([0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x8000, 0x0000])
    overwrite(tensor, any_block(tensor, rng), struct.pack("<H", bits))


@mutation("accept", on=TINY)
def float32_at_the_edge_of_its_range(draft: Draft, rng: Random) -> None:
    tensor = any_of(draft, rng, {Q.F32})
    bits = rng.choice([0x00000001, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x80000000])
    overwrite(tensor, any_block(tensor, rng), struct.pack("<I", bits))


@mutation("accept", on=TINY)
def blocks_of_any_finite_bits(draft: Draft, rng: Random) -> None:
    tensor = rng.choice(draft.tensors)
    numbers = np.random.default_rng(rng.randrange(2**32))
    tensor.data = random_blocks(Q(tensor.qtype), tensor.shape[::-1], numbers).tobytes()


@mutation("accept", on=TINY)
def tensor_of_zeros(draft: Draft, rng: Random) -> None:
    tensor = rng.choice(draft.tensors)
    tensor.data = bytes(len(tensor.data))


@mutation("accept", on=TINY)
def padding_that_is_not_zero(draft: Draft, rng: Random) -> None:
    draft.fill = rng.randbytes(1)


@mutation("either", on=TINY)
def bytes_of_a_tensor_changed(draft: Draft, rng: Random) -> None:
    tensor = rng.choice(draft.tensors)
    count = min(64, len(tensor.data))
    overwrite(tensor, rng.randrange(len(tensor.data) - count + 1), rng.randbytes(count))
