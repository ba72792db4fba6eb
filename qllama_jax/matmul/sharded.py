"""A weight on a mesh: every device multiplies with its own part, by that part's own product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.matmul import Activations, matmul, matmul_expert, register, register_expert
from qllama_jax.matmul.experts import SeparateExperts
from qllama_jax.quants import Leaf
from qllama_jax.sharding import MeshAxes, Partitioning, spec


@struct.dataclass
class ShardedWeight:
    """A weight `[*lead, out, in]` cut over a mesh.

    The inner leaf's arrays begin with the axes `*lead`, `out` and that of the blocks in a row, so
    each is cut as the weight is. It is what a device computes with inside `Partitioning.call`.
    """

    weight: Leaf
    partitioning: Partitioning = struct.field(pytree_node=False)
    axes: tuple[MeshAxes, ...] = struct.field(pytree_node=False)  # of *lead, out, in

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, of all parts together."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, all parts together and each counted once."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def spec(self) -> PartitionSpec:
        """How each of the arrays is cut; their further axes are whole."""
        # Of a leaf that was sliced, leading axes are gone.
        return spec(*self.axes[-self.ndim :])

    def __repr__(self) -> str:
        return f"ShardedWeight({self.weight!r}, axes={self.axes})"

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return the values, cut as the weight is."""
        return self._call(_dequantize, (), self.spec)

    def dequantize_rows(self, rows: Int32[Array, "*rows"]) -> Float32[Array, "*rows in"]:
        """Return `dequantize()[rows]`; a device looks up those that it has."""
        over_out, over_in = self.axes[-2:]
        batch = self._batch(rows.shape)

        def look_up(w: Leaf, rows: Array) -> Array:
            own = rows - lax.axis_index(over_out) * w.shape[0] if over_out else rows
            held = (own >= 0) & (own < w.shape[0])
            found = jnp.clip(own, 0, w.shape[0] - 1)
            found = w[found] if isinstance(w, jax.Array) else w.dequantize_rows(found)
            return lax.psum(jnp.where(held[..., None], found, 0), over_out) if over_out else found

        return self._call(look_up, (spec(*batch),), spec(*batch, over_in), rows)

    def multiply(
        self, x: Float[Array, "*batch in"], activations: Activations, expert: Array | None = None
    ) -> Float[Array, "*batch out"]:
        """Compute `matmul`, or `matmul_expert` where an expert is named, on every device's part.

        Where the inputs are cut the devices' products are added up; x is cut along its first axis
        as a batch is, if it can be.
        """
        *lead, over_out, over_in = self.axes[-self.ndim :]
        over_experts = lead[0] if lead else ()
        batch = self._batch(x.shape[:-1])

        def product(w: Leaf, x: Array, *expert: Array) -> Array:
            if not expert:
                y = matmul(x, w, activations=activations)
                return lax.psum(y, over_in) if over_in else y
            own = expert[0]
            if over_experts:
                own = own - lax.axis_index(over_experts) * np.int32(w.shape[0])
            held = (own >= 0) & (own < w.shape[0])
            own = jnp.clip(own, 0, w.shape[0] - 1)
            y = jnp.where(held, matmul_expert(x, w, own, activations=activations), 0)
            together = (*over_experts, *over_in)
            return lax.psum(y, together) if together else y

        arguments = (x,) if expert is None else (x, expert)
        in_specs = spec(*batch, over_in), spec()
        return self._call(product, in_specs[: len(arguments)], spec(*batch, over_out), *arguments)

    def _batch(self, shape: tuple[int, ...]) -> list[MeshAxes]:
        """Return over what the axes of a batch are cut: the first as rows are, if it can be."""
        over = self.partitioning.dividing("batch", shape[0]) if shape else ()
        own = {axis for axes in self.axes for axis in axes}
        return [over if i == 0 and not own & set(over) else () for i in range(len(shape))]

    def _call(self, function: Any, in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
        own = jax.tree.map(lambda _: self.spec, self.weight)
        return self.partitioning.call(
            function, (own, *in_specs), out_specs, self.weight, *arguments
        )


def parts(tree: Any) -> Any:
    """Return a tree of weights as a device sees it in `Partitioning.call`, and the specs for it."""

    def is_sharded(leaf: Any) -> bool:
        return isinstance(leaf, ShardedWeight)

    def inner(leaf: Any) -> Any:
        return leaf.weight if is_sharded(leaf) else leaf

    def specs(leaf: Any) -> Any:
        own = leaf.spec if is_sharded(leaf) else PartitionSpec()
        return jax.tree.map(lambda _: own, inner(leaf))

    return tuple(jax.tree.map(f, tree, is_leaf=is_sharded) for f in (inner, specs))


def weight_axes(w: Any) -> tuple[MeshAxes, ...]:
    """Return the mesh axes over which the axes of a weight on a mesh are cut."""
    if isinstance(w, SeparateExperts):  # all experts are on every device
        return ((), *weight_axes(w.experts[0]))
    return w.axes


def _dequantize(w: Leaf) -> Array:
    return w if isinstance(w, jax.Array) else w.dequantize()


@register
def _(w: ShardedWeight, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    return w.multiply(x, activations)


@register_expert
def _(
    w: ShardedWeight,
    x: Float[Array, "*batch in"],
    expert: Int32[Array, ""],
    activations: Activations,
) -> Array:
    return w.multiply(x, activations, expert)
