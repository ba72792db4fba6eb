"""The formats of one bit and of three values: Q1_0, TQ1_0, TQ2_0 (ggml: ggml-common.h)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Float32, UInt8

from qllama_jax.quants.bits import as_float, bit_fields, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format


def _trits(packed: UInt8[Array, "*lead n"], count: int) -> UInt8[Array, "*lead values"]:
    """Return `count` digits 0..2 a byte as planes of n, the most significant first.

    A byte is the upper end of the fraction 0.ttttt in base 3 times 256, so that multiplying by 3
    moves the next digit into the bits above it.
    """
    *lead, n = packed.shape
    powers = np.array([3**i for i in range(count)], np.uint8)
    powers = powers.reshape((1,) * len(lead) + (count, 1))
    fraction = packed[..., None, :] * powers  # modulo 256: the digits before have fallen away
    digits = (fraction.astype(jnp.uint16) * np.uint16(3)) >> np.uint16(8)
    return digits.astype(jnp.uint8).reshape(*lead, count * n)


@block_format(GGMLQuantizationType.TQ1_0, [("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
class TQ1_0(Block):
    """w = d (t - 1), t in 0..2: five a byte of qs (first 32 bytes, then 16), four of qh.

    block_tq1_0.
    """

    qs: Leaf
    qh: Leaf
    d: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (t - 1)."""
        digits = [_trits(self.qs[..., :32], 5), _trits(self.qs[..., 32:], 5), _trits(self.qh, 4)]
        q = signed(jnp.concatenate(digits, axis=-1), 1)
        return rows(as_float(self.d)[..., None, None] * as_float(q)[..., None, :])


@block_format(GGMLQuantizationType.TQ2_0, [("qs", "u1", 64), ("d", "<f2")])
class TQ2_0(Block):
    """w = d (t - 1), t in 0..3: four in each byte of a half of qs. block_tq2_0."""

    qs: Leaf
    d: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (t - 1)."""
        *lead, _ = self.qs.shape
        q = signed(bit_fields(self.qs.reshape(*lead, 2, 32), 2, 4).reshape(*lead, 8, 32), 1)
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(GGMLQuantizationType.Q1_0, [("d", "<f2"), ("qs", "u1", 16)])
class Q1_0(Block):
    """w = d where the bit is set, else -d; 128 values, lowest bits first. block_q1_0."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return ±d."""
        bits = bit_fields(self.qs[..., None], 1, 8)[..., 0].astype(jnp.int8)
        q = bits * np.int8(2) - np.int8(1)
        return rows(as_float(self.d)[..., None, None] * as_float(q))
