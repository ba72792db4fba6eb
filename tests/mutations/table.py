"""Mutations of the table of tensors: names, shapes, types, and where data lie."""

from __future__ import annotations

import math
from random import Random

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mutations.draft import Draft, Tensor
from mutations.keys import NOT_UTF8
from mutations.operators import TINY, mutation

Q = GGMLQuantizationType
#: Types whose blocks have the same size, so that nothing but their number tells them apart.
ALIKE = [{Q.F16, Q.BF16}, {Q.Q4_0, Q.IQ4_NL}]
INTEGERS = {Q.F32: Q.I32, Q.F16: Q.I16, Q.BF16: Q.I16}


def any_tensor(draft: Draft, rng: Random) -> Tensor:
    return rng.choice(draft.tensors)


def any_of(draft: Draft, rng: Random, qtypes: set[GGMLQuantizationType]) -> Tensor:
    """A tensor of one of the types, all of which the drafts have between them."""
    found = [t for t in draft.tensors if t.qtype in qtypes]
    return rng.choice(found)


# Names


@mutation("open", "tensor ")
def name_empty(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).name = b""


@mutation("open", "tensor ")
def name_too_long(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).name = b"n" * rng.choice([64, 65, 255, 4096, 70_000])


@mutation("open", "tensor ")
def name_not_utf8(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).name += rng.choice(NOT_UTF8)


@mutation("open", "tensor ")
def name_with_nul(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).name += b"\0" + rng.choice([b"", b"x"])


@mutation("open", "tensor ")
def name_with_control_characters(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).name += rng.choice([b"\n", b"\x1b[2J", b"\x7f", b"\xc2\x9b", b"\r"])


@mutation("open", "tensor ")
def name_twice(draft: Draft, rng: Random) -> None:
    one, other = rng.sample(draft.tensors, 2)
    one.name = other.name


# Shapes


@mutation("open", "")
def number_of_dimensions_that_may_not_be(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).n_dims = rng.choice([0, 5, 6, 8, 255, 2**16, 2**31, 2**32 - 1])


@mutation("open", "")
def number_of_dimensions_off_by_one(draft: Draft, rng: Random) -> None:
    tensor = any_tensor(draft, rng)
    tensor.n_dims = len(tensor.shape) + rng.choice([-1, 1])


@mutation("open", "tensor ")
def dimension_zero(draft: Draft, rng: Random) -> None:
    tensor = any_tensor(draft, rng)
    at = rng.randrange(len(tensor.shape))
    tensor.shape = (*tensor.shape[:at], 0, *tensor.shape[at + 1 :])


@mutation("open", "tensor ")
def dimension_huge(draft: Draft, rng: Random) -> None:
    tensor = any_tensor(draft, rng)
    most = rng.choice([2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 32])
    at = rng.randrange(len(tensor.shape))
    tensor.shape = (*tensor.shape[:at], most, *tensor.shape[at + 1 :])


@mutation("open", "tensor ")
def product_that_wraps_to_the_true_one(draft: Draft, rng: Random) -> None:
    """In 64 bits the number of values is what it was."""
    tensor = rng.choice([t for t in draft.tensors if len(t.shape) > 1])
    others = math.prod(tensor.shape[:-1])
    step = 2**64 // (others & -others)
    tensor.shape = (*tensor.shape[:-1], tensor.shape[-1] + step * rng.randrange(1, 4))


@mutation("open", "")
def last_dimension_larger(draft: Draft, rng: Random) -> None:
    tensor = any_tensor(draft, rng)
    tensor.shape = (*tensor.shape[:-1], tensor.shape[-1] + rng.choice([32, 64, 1000]))


@mutation("load", "")
def last_dimension_smaller(draft: Draft, rng: Random) -> None:
    tensor = any_tensor(draft, rng)
    tensor.shape = (*tensor.shape[:-1], tensor.shape[-1] - rng.choice([1, 2]))


@mutation("open", "tensor ")
def row_not_of_whole_blocks(draft: Draft, rng: Random) -> None:
    block_types = {q for q, (values, _) in GGML_QUANT_SIZES.items() if values > 1}
    tensor = any_of(draft, rng, block_types)
    tensor.shape = (tensor.shape[0] + rng.choice([-1, 1, 16, 31]), *tensor.shape[1:])


@mutation("either")
def one_as_a_further_dimension(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).shape += (1,)


# Types


@mutation("open", "tensor ")
def type_unknown(draft: Draft, rng: Random) -> None:
    unknown = [n for n in range(64) if n not in GGML_QUANT_SIZES]
    any_tensor(draft, rng).qtype = rng.choice([*unknown, 255, 2**31, 2**32 - 1])


@mutation("open", "")
def type_of_another_size(draft: Draft, rng: Random) -> None:
    tensor = any_tensor(draft, rng)
    per_value = {q: size / values for q, (values, size) in GGML_QUANT_SIZES.items()}
    true = per_value[Q(tensor.qtype)]
    # The last tensor's padding may hide a little, so: at least twice or half the bytes.
    others = [q for q, size in per_value.items() if size >= 2 * true or size <= true / 2]
    tensor.qtype = rng.choice(others)


@mutation("load", "tensor ")
def type_of_integers(draft: Draft, rng: Random) -> None:
    tensor = any_of(draft, rng, set(INTEGERS))
    tensor.qtype = INTEGERS[Q(tensor.qtype)]


@mutation("either", on=TINY)
def type_of_the_same_size(draft: Draft, rng: Random) -> None:
    alike = rng.choice(ALIKE)
    tensor = any_of(draft, rng, alike)
    (tensor.qtype,) = alike - {Q(tensor.qtype)}


# Places


def set_start(draft: Draft, rng: Random, shift: int) -> None:
    """Say of a tensor that it lies elsewhere."""
    at = rng.randrange(len(draft.tensors))
    draft.tensors[at].start = (draft.starts()[at] + shift) % 2**64


@mutation("open", "tensor ")
def data_past_the_end(draft: Draft, rng: Random) -> None:
    set_start(draft, rng, rng.choice([2**20, 2**32, 2**40, 2**62]))


@mutation("open", "tensor ")
def data_offset_that_wraps(draft: Draft, rng: Random) -> None:
    any_tensor(draft, rng).start = 2**64 - 32 * rng.randrange(1, 100)


@mutation("open", "tensor ")
def data_a_step_later(draft: Draft, rng: Random) -> None:
    set_start(draft, rng, 32 * rng.randrange(1, 5))


@mutation("open", "tensor ")
def data_not_aligned(draft: Draft, rng: Random) -> None:
    set_start(draft, rng, rng.choice([1, 4, 8, 16, 31]))


@mutation("open", "tensor ")
def data_of_another_tensor(draft: Draft, rng: Random) -> None:
    one, other = rng.sample(range(len(draft.tensors)), 2)
    draft.tensors[one].start = draft.starts()[other]


@mutation("open", "tensor ")
def data_of_two_exchanged(draft: Draft, rng: Random) -> None:
    one, other = rng.sample(range(len(draft.tensors)), 2)
    starts = draft.starts()
    draft.tensors[one].start, draft.tensors[other].start = starts[other], starts[one]


@mutation("open", "tensor ")
def all_data_a_step_later(draft: Draft, rng: Random) -> None:
    shift = 32 * rng.randrange(1, 100)
    for tensor, start in zip(draft.tensors, draft.starts(), strict=True):
        tensor.start = start + shift


@mutation("open", "tensor ", on=TINY)
def hole_between_tensors(draft: Draft, rng: Random) -> None:
    """The data follow the table: what lies between is no one's."""
    at = rng.randrange(1, len(draft.tensors))
    gap = 32 * rng.randrange(1, 5)
    for tensor, start in list(zip(draft.tensors, draft.starts(), strict=True))[at:]:
        tensor.start = start + gap
    before = draft.tensors[at - 1]
    before.data += bytes(-len(before.data) % 32 + gap)


@mutation("open", "tensor ")
def table_in_another_order_than_the_data(draft: Draft, rng: Random) -> None:
    order = list(range(len(draft.tensors)))
    while order == sorted(order):
        rng.shuffle(order)
    draft.order = order


@mutation("accept")
def tensors_shuffled_with_their_data(draft: Draft, rng: Random) -> None:
    rng.shuffle(draft.tensors)
