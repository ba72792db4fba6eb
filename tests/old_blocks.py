"""Block layouts from before GGUF, one value at a time: what the bytes mean, and a quantizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qllama_jax.tensor_types import OldType

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class OldBlock:
    """A block: `scales` numbers (d, or d and m) of type `scale`, fifth bits, then the integers.

    `place(i)` says where the four bits of value i are: byte and nibble; None where a value is a
    signed byte. `zero` is the integer that means 0 where there is no m.
    """

    values: int
    scale: str
    scales: int
    zero: int
    fifth: bool
    place: Callable[[int], tuple[int, int]] | None

    @property
    def at(self) -> int:
        """Byte at which the integers begin."""
        return self.scales * np.dtype(self.scale).itemsize + 4 * self.fifth

    @property
    def nbytes(self) -> int:
        return self.at + (self.values if self.place is None else self.values // 2)


def neighbours(i: int) -> tuple[int, int]:
    return i // 2, i % 2


def halves(i: int) -> tuple[int, int]:
    return i % 16, i // 16


OLD_BLOCKS = {
    OldType.Q4_0_V1: OldBlock(32, "<f4", 1, 8, False, neighbours),
    OldType.Q4_1_V1: OldBlock(32, "<f4", 2, 0, False, neighbours),
    OldType.Q4_2_V1: OldBlock(16, "<f2", 1, 8, False, neighbours),
    OldType.Q5_0_V1: OldBlock(32, "<f2", 1, 16, True, neighbours),
    OldType.Q5_1_V1: OldBlock(32, "<f2", 2, 0, True, neighbours),
    OldType.Q4_0_V2: OldBlock(32, "<f4", 1, 8, False, halves),
    OldType.Q4_1_V2: OldBlock(32, "<f4", 2, 0, False, halves),
    OldType.Q8_0_V2: OldBlock(32, "<f4", 1, 0, False, None),
}
OLD_SIZES = {qtype: (block.values, block.nbytes) for qtype, block in OLD_BLOCKS.items()}


def dequantize_old(data: Bytes, qtype: OldType) -> Float32:
    """Float32 weights [..., n] of bytes [..., bytes]: d q, then + m, each rounded to float32."""
    block = OLD_BLOCKS[qtype]
    raw = np.ascontiguousarray(data).reshape(-1, block.nbytes)
    scales = raw[:, : block.at - 4 * block.fifth].copy().view(block.scale).astype(np.float32)
    weights = np.empty((len(raw), block.values), np.float32)
    with np.errstate(all="ignore"):  # random bytes are full of infinities
        for i in range(block.values):
            q = _integer(raw, block, i).astype(np.float32) - np.float32(block.zero)
            weights[:, i] = scales[:, 0] * q
            if block.scales == 2:
                weights[:, i] = weights[:, i] + scales[:, 1]
    return weights.reshape(*data.shape[:-1], -1)


def _integer(raw: Bytes, block: OldBlock, i: int) -> NDArray[np.integer]:
    """Integer of value i of every block."""
    if block.place is None:
        return raw[:, block.at + i].view(np.int8)
    byte, nibble = block.place(i)
    q = raw[:, block.at + byte] >> 4 * nibble & 15
    if block.fifth:
        q |= (raw[:, block.at - 4 + i // 8] >> i % 8 & 1) << 4
    return q


def quantize_old(weights: Float32, qtype: OldType) -> Bytes:
    """Bytes [..., bytes] of weights [..., n]: the nearest of equal steps over a block's range."""
    block = OLD_BLOCKS[qtype]
    x = weights.reshape(-1, block.values)
    top = 2 * block.zero - 1 if block.zero else 31 if block.fifth else 15
    if block.scales == 2:
        offset = x.min(axis=1)
        scales = np.stack([(x.max(axis=1) - offset) / np.float32(top), offset], axis=1)
    else:
        steps = 127 if block.place is None else block.zero - 1
        scales = np.abs(x).max(axis=1, keepdims=True) / np.float32(steps)
    scales = scales.astype(block.scale)
    wide = scales.astype(np.float32)
    d = np.where(wide[:, :1] == 0, 1, wide[:, :1])
    q = np.rint((x - wide[:, 1:2]) / d if block.scales == 2 else x / d)
    raw = np.zeros((len(x), block.nbytes), np.uint8)
    raw[:, : block.at - 4 * block.fifth] = scales.view(np.uint8)
    if block.place is None:
        raw[:, block.at :] = q.astype(np.int8).view(np.uint8)
    else:
        stored = np.clip(q + block.zero, 0, top).astype(np.uint8)
        for i in range(block.values):
            byte, nibble = block.place(i)
            raw[:, block.at + byte] |= (stored[:, i] & 15) << 4 * nibble
            if block.fifth:
                raw[:, block.at - 4 + i // 8] |= (stored[:, i] >> 4) << i % 8
    return raw.reshape(*weights.shape[:-1], -1)


def make_old_finite(blocks: Bytes, qtype: OldType) -> None:
    """Change the scales of random blocks so that every weight is a finite float32, in place."""
    block = OLD_BLOCKS[qtype]
    size = np.dtype(block.scale).itemsize
    # A float32 below 2**97 times 128 is finite; a half float that is no NaN or infinity as well.
    large = 0x70 if size == 4 else 0x7C
    for end in range(size, (block.scales + 1) * size, size):
        high = blocks[..., end - 1]
        blocks[..., end - 1] = np.where(high & large == large, high & ~np.uint8(0x40), high)
