"""How the integers of each format lie in 16-bit words, and what the words are multiplied by.

A CPU adds and multiplies 16-bit lanes twice as fast as 32-bit ones, so the kernel multiplies whole
words and lets the products wrap: with s_i = word >> bit_i, the fields f_i of a word are
f_i = s_i - 2^(bit_{i+1} - bit_i) s_{i+1}, and so

    sum_i c_i f_i  =  sum_i s_i (c_i - 2^(bit_i - bit_{i-1}) c_{i-1})    (mod 2^16)

No field is masked out: one shift, one multiplication and one addition a field. The sum over a group
of weights lies within int16, so what is left of it after wrapping is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

INT16_MAX = 2**15 - 1
GROUP = 32  # weights of the largest group, of which a row has whole ones
# Groups that stage two of the integer kernel sums: more are slower by 1.4 (16) to 2.7 times (32)
# and compile slowly.
MOST_GROUPS = 8
MOST_STEPS = 256  # in the largest activation of a group; bfloat16 holds all integers up to that


class Field(NamedTuple):
    """Some bits of a word: they end where the word's next field begins, or with the word."""

    bit: int  # the lowest of them
    weight: int  # the weight of the group that they belong to
    unit: int = 1  # what their lowest bit adds to that weight's integer


@dataclass(frozen=True)
class Layout:
    """Words of a group of weights, whose integers q stand for scale (q - zero) + minimum.

    The group is what one int16 accumulator sums, of (q - middle) x. Without words the weights are
    numbers of their own, q itself.
    """

    words: tuple[tuple[Field, ...], ...]
    group: int
    zero: int
    middle: int
    subtracts_minimum: bool = False  # scale (q - zero) - minimum, as the k-quants have it

    @property
    def excess(self) -> int:
        """What the accumulated integers are too small by."""
        return self.middle - self.zero

    @property
    def largest_sum(self) -> int | None:
        """Bound on a group's sum of |x| that keeps an accumulator within int16; None: it always is.

        x is in steps, at most MOST_STEPS of them. Meaningless without words.
        """
        masks, units = self.terms.mask[:, 0], self.terms.unit[:, 0]
        largest = int((masks * units).sum())  # as of the first weight, so of all
        bound = INT16_MAX // max(self.middle, largest - self.middle)
        return None if bound >= self.group * MOST_STEPS else bound

    @cached_property
    def terms(self) -> Terms:
        """Where to find each weight's integer: the sum over t of ((word >> bit) & mask) unit."""
        parts: list[list[tuple[int, int, int, int]]] = [[] for _ in range(self.group)]
        for index, fields in enumerate(self.words):
            ends = [field.bit for field in fields[1:]] + [16]
            for field, end in zip(fields, ends, strict=True):
                mask = (1 << (end - field.bit)) - 1
                parts[field.weight].append((index, field.bit, mask, field.unit))
        most = max(map(len, parts))
        filled = [part + [(0, 0, 0, 0)] * (most - len(part)) for part in parts]
        word, bit, mask, unit = np.array(filled).transpose(2, 1, 0)
        u2 = np.uint16
        return Terms(word.astype(np.int32), bit.astype(u2), mask.astype(u2), unit.astype(u2))

    @cached_property
    def factors(self) -> Factors:
        """What each field's word is multiplied by."""
        columns: dict[tuple[int, int], np.ndarray] = {}
        words_at: dict[int, list[int]] = {}
        for index, fields in enumerate(self.words):
            before = Field(0, 0, 0)
            for field in fields:
                column = columns[index, field.bit] = np.zeros(self.group, np.float32)
                column[field.weight] += field.unit
                column[before.weight] -= before.unit << (field.bit - before.bit)
                words_at.setdefault(field.bit, []).append(index)
                before = field
        bits_of: dict[range, list[int]] = {}
        for bit, words in sorted(words_at.items()):
            first, *more = words
            evenly = range(first, words[-1] + 1, more[0] - first if more else 1)
            assert list(evenly) == words  # a slice has to reach them
            bits_of.setdefault(evenly, []).append(bit)
        alike = tuple(Alike(words, tuple(bits)) for words, bits in bits_of.items())
        ordered = [columns[word, bit] for like in alike for bit in like.bits for word in like.words]
        total = np.ones(self.group, np.float32)
        return Factors(alike, np.stack([*ordered, total], axis=1))


def groups_of_a_sum(groups: int, *, even: bool) -> int:
    """Return how many of the groups stage two of the integer kernel sums: up to MOST_GROUPS.

    `even`: so that the sums are even in number, where that is possible. XLA gives each core some of
    them: of a row times Q4_1 [1536, 576] with its 18 groups stage two takes 9.0 us in 3 sums of 6,
    5.7 in 6 sums of 3. Of many rows larger sums are faster.
    """
    sizes = [n for n in range(1, MOST_GROUPS + 1) if groups % n == 0]
    alike = [n for n in sizes if even and groups // n % 2 == 0]
    return max(alike or sizes)


def groups_of_a_float_sum(groups: int) -> int:
    """Return how many of the groups the kernel for floats sums before it stores: 2 or 1."""
    return 2 if groups % 2 == 0 else 1


class Terms(NamedTuple):
    """Each `[terms, group]`; a term with a mask of 0 adds nothing."""

    word: np.ndarray
    bit: np.ndarray
    mask: np.ndarray
    unit: np.ndarray


class Alike(NamedTuple):
    """Words of a group that have fields at the same bits."""

    words: range
    bits: tuple[int, ...]


class Factors(NamedTuple):
    """words[word] >> bit is multiplied by a column of x @ mix, the last column of which sums x.

    The columns: of each of `alike`, for each of its bits, one a word.
    """

    alike: tuple[Alike, ...]
    mix: np.ndarray  # float32[group, fields + 1]: integers

    @property
    def fields(self) -> int:
        """How many fields a group's words have."""
        return self.mix.shape[1] - 1


# Two bytes of nibbles as they lie in the file: low nibbles are the block's first half.
_NIBBLES = tuple(
    (Field(0, 2 * j), Field(4, 2 * j + 16), Field(8, 2 * j + 1), Field(12, 2 * j + 17))
    for j in range(8)
)
# The fifth bits of 32 weights: in order, and even ones before odd ones as `pack` gathers them.
_BITS = tuple(tuple(Field(i, 16 * h + i, 16) for i in range(16)) for h in range(2))
_PAIRED_BITS = tuple(
    tuple(Field(i, 16 * h + 2 * (i % 8) + i // 8, 16) for i in range(16)) for h in range(2)
)
_CRUMBS = tuple(
    tuple(Field(2 * i, 8 * h + 2 * (i % 4) + i // 4) for i in range(8)) for h in range(2)
)
# 16 weights of 3 bits: four in 12 bits of each word, and four in what is left of all three.
_THREE_BITS = (
    (*(Field(3 * i, i) for i in range(4)), Field(12, 12), Field(15, 13)),
    (*(Field(3 * i, 4 + i) for i in range(4)), Field(12, 13, 2), Field(14, 14)),
    (*(Field(3 * i, 8 + i) for i in range(4)), Field(12, 14, 4), Field(13, 15)),
)
# 16 weights of 6 bits: two in 12 bits of each word, and two in what is left of each three.
_SIX_BITS = tuple(
    word
    for first, extra in ((0, 12), (6, 14))
    for word in (
        (Field(0, first), Field(6, first + 1), Field(12, extra)),
        (Field(0, first + 2), Field(6, first + 3), Field(12, extra, 16), Field(14, extra + 1)),
        (Field(0, first + 4), Field(6, first + 5), Field(12, extra + 1, 4)),
    )
)

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(_NIBBLES, group=32, zero=8, middle=8),
    "Q4_1": Layout(_NIBBLES, group=32, zero=0, middle=8),
    "Q5_0": Layout(_BITS + _NIBBLES, group=32, zero=16, middle=16),
    "Q5_1": Layout(_BITS + _NIBBLES, group=32, zero=0, middle=16),
    "Q2_K": Layout(_CRUMBS, group=16, zero=0, middle=0, subtracts_minimum=True),
    "Q3_K": Layout(_THREE_BITS, group=16, zero=4, middle=4),
    "Q4_K": Layout(_NIBBLES, group=32, zero=0, middle=8, subtracts_minimum=True),
    "Q5_K": Layout(_PAIRED_BITS + _NIBBLES, group=32, zero=0, middle=16, subtracts_minimum=True),
    "Q6_K": Layout(_SIX_BITS, group=16, zero=32, middle=32),
    **dict.fromkeys(("Q8_0", "F16", "BF16"), Layout((), group=32, zero=0, middle=0)),
}
