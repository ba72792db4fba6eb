"""A weight of every layer in one leaf, for a loop over layers.

Layers of equal formats are one stack of arrays. A file may have several formats for one name: in
Q4_K_M `attn_v` and `ffn_down` are Q6_K in half of the layers. Then there is a stack of each, and a
switch over them.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int32

from qllama_jax.matmul import Activations, matmul_expert, register, register_expert
from qllama_jax.quants import Leaf


@struct.dataclass
class WeightStack:
    """The weights of L layers, `[out, in]` each: `stacks[kind[i]][index[i]]` is that of layer i.

    Of a mixture of E experts the weights are `[E, out, in]`, and a stack holds E of each layer.
    """

    stacks: tuple[Leaf, ...]  # `[n, out, in]` or `[n E, out, in]`, n of a kind
    experts: int | None = struct.field(pytree_node=False)  # E
    kind: tuple[int, ...] = struct.field(pytree_node=False)
    index: tuple[int, ...] = struct.field(pytree_node=False)

    def at(self, layer: Int32[Array, ""]) -> LayerWeight:
        """Return the weight of a layer, 0..L-1, which may be traced; nothing is copied."""
        kind, index = (jnp.asarray(np.asarray(n, np.int32))[layer] for n in (self.kind, self.index))
        return LayerWeight(self.stacks, kind, index, self.experts)


@struct.dataclass
class LayerWeight:
    """The weight `[out, in]`, or that of E experts, at `index` of one of several stacks."""

    stacks: tuple[Leaf, ...]
    kind: Leaf  # int32
    index: Leaf  # int32
    experts: int | None = struct.field(pytree_node=False)  # E

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `(out, in)` or `(E, out, in)`."""
        shape = self.stacks[0].shape[1:]
        return shape if self.experts is None else (self.experts, *shape)


@register
def _(w: LayerWeight, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    return _product(w, x, w.index, activations)


@register_expert
def _(
    w: LayerWeight,
    x: Float[Array, "*batch in"],
    expert: Int32[Array, ""],
    activations: Activations,
) -> Array:
    assert w.experts is not None
    return _product(w, x, w.index * np.int32(w.experts) + expert, activations)


def _product(w: LayerWeight, x: Array, index: Array, activations: Activations) -> Array:
    def with_stack(stack: Leaf, x: Array, index: Array) -> Array:
        return matmul_expert(x, stack, index, activations=activations)

    products = [functools.partial(with_stack, stack) for stack in w.stacks]
    return products[0](x, index) if len(products) == 1 else lax.switch(w.kind, products, x, index)
