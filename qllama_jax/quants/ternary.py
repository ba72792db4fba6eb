"""The formats of three and two levels: TQ1_0, TQ2_0, Q1_0 (ggml: ggml-common.h).

Products with -1, 0 and 1 are exact, and so is TQ2_0's with 2, which its two bits can say.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Float32, UInt8

from qllama_jax.quants.bits import as_float, bit_fields, fields_of_each, rows, signed
from qllama_jax.quants.block import Block, Leaf, block_format


def _trits(packed: UInt8[Array, "*lead n"], count: int) -> UInt8[Array, "*lead m"]:
    """Return the first `count` base-3 digits of each byte, as planes of n, joined.

    A byte is a fraction, 256ths of 1: three times it is the first digit and a fraction again.
    """
    *lead, n = packed.shape
    powers = (3 ** np.arange(count)).astype(np.uint8)
    powers = powers.reshape((1,) * len(lead) + (count, 1))
    rest = packed[..., None, :] * powers  # modulo 256: what is left after the digits before
    digits = (rest.astype(jnp.uint16) * np.uint16(3)) >> np.uint16(8)
    return digits.astype(jnp.uint8).reshape(*lead, count * n)


@block_format(GGMLQuantizationType.TQ1_0, [("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
class TQ1_0(Block):
    """w = d (q - 1), q a base-3 digit: five a byte of qs, four a byte of qh. block_tq1_0."""

    qs: Leaf
    qh: Leaf
    d: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 1)."""
        parts = [_trits(self.qs[..., :32], 5), _trits(self.qs[..., 32:], 5), _trits(self.qh, 4)]
        q = signed(jnp.concatenate(parts, axis=-1), 1)
        return rows(as_float(self.d)[..., None, None] * as_float(q)[..., None, :])


@block_format(GGMLQuantizationType.TQ2_0, [("qs", "u1", 64), ("d", "<f2")])
class TQ2_0(Block):
    """w = d (q - 1), q of two bits, in two halves of 128. ggml: block_tq2_0."""

    qs: Leaf
    d: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (q - 1)."""
        *lead, _ = self.qs.shape
        q = signed(bit_fields(self.qs.reshape(*lead, 2, 32), 2, 4), 1).reshape(*lead, 8, 32)
        return rows(as_float(self.d)[..., None, None] * as_float(q))


@block_format(GGMLQuantizationType.Q1_0, [("d", "<f2"), ("qs", "u1", 16)])
class Q1_0(Block):
    """w = d where the value's bit of qs is 1, else -d; 128 values. ggml: block_q1_0."""

    d: Leaf
    qs: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return d (2 q - 1)."""
        q = signed(fields_of_each(self.qs, 1, 8) << np.uint8(1), 1)
        return rows(as_float(self.d)[..., None, None] * as_float(q))
