"""Experts that are a leaf each: of different formats, or arranged for a CPU.

XLA's CPU code for a dynamic slice of stacked weights is scalar: 17.7 ms for two of eight experts
[7168, 4096] in Q4_0, 1.9 ms by a switch over them (jax 0.12, two cores of an EPYC Milan). Kernels
that read rows of a stack by stored numbers need no switch, but take few rows of x (`stacks`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.matmul import Activations, matmul, register_expert
from qllama_jax.quants import Leaf


@struct.dataclass
class SeparateExperts:
    """Weights `[E, out, in]` of which every expert is a leaf `[out, in]` of its own."""

    experts: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `(E, out, in)`."""
        return (len(self.experts), *self.experts[0].shape)

    def dequantize(self) -> Float32[Array, "E out in"]:
        """Return the values of all experts."""
        experts = self.experts
        return jnp.stack([e if isinstance(e, jax.Array) else e.dequantize() for e in experts])


@register_expert
def _(
    w: SeparateExperts,
    x: Float[Array, "*batch in"],
    expert: Int32[Array, ""],
    activations: Activations,
) -> Array:
    branches = [functools.partial(matmul, w=leaf, activations=activations) for leaf in w.experts]
    return lax.switch(expert, branches, x)
