"""Experts of different formats in one layer, as some of the first Mixtral files have them."""

from __future__ import annotations

import functools

from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int32

from qllama_jax.matmul import Activations, matmul, register_expert
from qllama_jax.quants import Leaf


@struct.dataclass
class MixedExperts:
    """Weights `[E, out, in]` of which every expert is a leaf `[out, in]` of its own."""

    experts: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `(E, out, in)`."""
        return (len(self.experts), *self.experts[0].shape)


@register_expert
def _(
    w: MixedExperts,
    x: Float[Array, "*batch in"],
    expert: Int32[Array, ""],
    activations: Activations,
) -> Array:
    branches = [functools.partial(matmul, w=leaf, activations=activations) for leaf in w.experts]
    return lax.switch(expert, branches, x)
