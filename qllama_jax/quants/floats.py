"""The formats that are plain numbers in the file: F32, F16, BF16, as blocks of one value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Array, Bool, Float32

from qllama_jax.quants.block import Block, Leaf, block_format


@block_format(GGMLQuantizationType.F32, [("w", "<f4")])
class F32(Block):
    """w, as it is."""

    w: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return w."""
        return jnp.asarray(self.w)


@block_format(GGMLQuantizationType.F16, [("w", "<f2")])
class F16(Block):
    """w in IEEE half precision."""

    w: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return w in float32, exactly."""
        return self.w.astype(jnp.float32)


@block_format(GGMLQuantizationType.BF16, [("w", "<u2")])
class BF16(Block):
    """The upper 16 bits of a float32, kept as an integer: numpy has no bfloat16 of its own."""

    w: Leaf

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return the float32 whose upper half is w."""
        return jax.lax.bitcast_convert_type(self.w.astype(jnp.uint32) << np.uint32(16), jnp.float32)

    def not_finite(self) -> dict[str, Bool[np.ndarray, ...]]:
        """Those whose exponent is all ones."""
        return {"w": (self.w & 0x7F80) == 0x7F80}
