"""d q and d q + m for scales that are float32: each operation rounds once, also where it is tiny.

With half-float scales every product is exact. A float32 scale has 24 bits, so its products round,
and two things would change the result: a compiler that contracts d q + m into a fused multiply-add
(XLA on CPU does, through every barrier), and flushing subnormal numbers to zero (so does XLA on
CPU). Both functions avoid them, so they give the same bits on every back end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int8, UInt8, UInt32

from qllama_jax.quants.bits import as_float

_SIGN, _EXPONENT, _MANTISSA = np.uint32(1 << 31), np.uint32(0xFF << 23), np.uint32((1 << 23) - 1)
_UPPER = np.uint32(0xFFFFF000)  # sign, exponent and the upper 12 bits of the mantissa, one implied
_SMALL = np.uint32(64 << 23)  # the bits of 2^-63
_LIFT = np.uint32(64 << 23)  # added to the bits of a normal number multiplies it by 2^64


def float_times_int(d: Float32[Array, "*a"], q: Int8[Array, "*b"]) -> Float32[Array, "*c"]:
    """Return d q also for subnormal d, which XLA on CPU takes for zero.

    A subnormal is m 2^-149 with an integer m < 2^23, so d q is the integer m q (31 bits at most):
    below 2^23 that integer is the result's own bit pattern, above it the result is normal.
    """
    bits = _bits(d)
    mantissa = bits & _MANTISSA
    product = mantissa.astype(jnp.int32) * jnp.abs(q.astype(jnp.int32))
    # Scaling by 2^-149 is a subtraction from the exponent: a product of powers would be folded.
    normal = _bits(product.astype(jnp.float32)) - np.uint32(149 << 23)
    magnitude = jnp.where(product < 2**23, product.astype(jnp.uint32), normal)
    sign = (bits >> np.uint32(31)) ^ (q < 0).astype(jnp.uint32)
    small = _floats(magnitude | (sign << np.uint32(31)))
    return jnp.where(bits & _EXPONENT == 0, small, d * as_float(q))


def float_times_nibble_plus(
    d: Float32[Array, "*a"], q: UInt8[Array, "*b"], m: Float32[Array, "*a"]
) -> Float32[Array, "*c"]:
    """Return (d q rounded) + m for q in 0..15, as a multiplication and then an addition do.

    d is split into two halves of 12 bits whose products with q are exact, so their sum rounds once,
    fused or not. Where d and m are both below 2^-63 the sum is made 2^64 times as large, where no
    subnormal occurs, and then taken down by its bits, which is exact: a subnormal sum is a whole
    number of 2^-149.
    """
    d_bits, m_bits = _bits(d), _bits(m)
    finite = d_bits & _EXPONENT != _EXPONENT
    lifted = jnp.maximum(d_bits & ~_SIGN, m_bits & ~_SIGN) < _SMALL
    scale, offset = jnp.where(lifted, _lift(d_bits), d), jnp.where(lifted, _lift(m_bits), m)
    upper = jnp.where(finite, _floats(_bits(scale) & _UPPER), scale)
    # The sign of d on a zero, too: with it the product's zero has the sign of d q.
    lower = _floats(_bits(jnp.where(finite, scale - upper, 0)) | (_bits(scale) & _SIGN))
    numbers = as_float(q)
    total = (upper * numbers + lower * numbers) + offset
    # What is left: m is subnormal beside a large d, which shows where nothing is added to it.
    alone = (q == 0) & finite & ~lifted & (m_bits & _EXPONENT == 0) & (m_bits & _MANTISSA != 0)
    return jnp.where(alone, m, jnp.where(lifted, _lower(total), total))


def _lift(bits: UInt32[Array, "*a"]) -> Float32[Array, "*a"]:
    """Multiply numbers below 2^-63, given as bits, by 2^64."""
    # A subnormal is its mantissa, an integer, times 2^-149; that times 2^64 is 2^-85.
    integer = _bits((bits & _MANTISSA).astype(jnp.int32).astype(jnp.float32))
    subnormal = jnp.where(integer == 0, integer, integer - np.uint32(85 << 23))
    magnitude = jnp.where(bits & _EXPONENT == 0, subnormal, (bits & ~_SIGN) + _LIFT)
    return _floats(magnitude | (bits & _SIGN))


def _lower(x: Float32[Array, "*a"]) -> Float32[Array, "*a"]:
    """Divide multiples of 2^-85 by 2^64."""
    bits = _bits(x)
    magnitude = bits & ~_SIGN
    whole = (jnp.abs(x) * np.float32(2**85)).astype(jnp.int32).astype(jnp.uint32)
    subnormal = magnitude < np.uint32(65 << 23)  # the bits of 2^-62
    return _floats(jnp.where(subnormal, whole, magnitude - _LIFT) | (bits & _SIGN))


def _bits(x: Float32[Array, "*a"]) -> UInt32[Array, "*a"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _floats(bits: UInt32[Array, "*a"]) -> Float32[Array, "*a"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
