"""Where a model lives on a mesh: logical names of axes, and the mesh axes that they are cut over.

A rule says for a logical axis over which axes of the mesh it is cut: the heads and the feed-forward
width over "model", say, which is tensor parallelism, the rows of a batch over "data". What is cut
is computed on in `Partitioning.call`, where each device sees its own part; XLA cannot cut the
rolled loops of a product by itself, nor a hand-written kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import register_static

MeshAxes = tuple[str, ...]
Rules = Mapping[str, str | Sequence[str] | None]

# Logical axis -> axes of the mesh. A rule whose axis the mesh does not have cuts nothing.
DEFAULT_RULES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "ffn": "model",
    "experts": "expert",
    "embed": None,
}

# Logical axes of the weights, [*lead, out, in], by the last part of their names. A router is whole
# on every device, for each token's choice is among all experts; an expert sees whole activations.
WEIGHT_AXES: dict[str, tuple[str | None, ...]] = {
    "token_embd": ("vocab", "embed"),
    "output": ("vocab", "embed"),
    "attn_q": ("heads", "embed"),
    "attn_k": ("kv_heads", "embed"),
    "attn_v": ("kv_heads", "embed"),
    "attn_output": ("embed", "heads"),
    "ffn_gate": ("ffn", "embed"),
    "ffn_up": ("ffn", "embed"),
    "ffn_down": ("embed", "ffn"),
    "ffn_gate_inp": (None, None),
    "ffn_gate_exps": ("experts", "ffn", None),
    "ffn_up_exps": ("experts", "ffn", None),
    "ffn_down_exps": ("experts", None, "ffn"),
}


@register_static
@dataclass(frozen=True)
class Partitioning:
    """A mesh and the rules by which a model is cut over it; static where it is part of a pytree."""

    mesh: Mesh
    rules: tuple[tuple[str, MeshAxes], ...]

    @classmethod
    def of(cls, mesh: Mesh, rules: Rules | None = None) -> Partitioning:
        """Return the default rules with `rules` in place of those of the same names.

        Raises:
            TypeError: `rules` is no mapping.
            ValueError: a rule of an unknown logical axis, for what is no axis of the mesh, or for
                one twice; an axis of the mesh of more than one device that no rule names.
        """
        if not isinstance(rules, Mapping | None):
            raise TypeError(f"rules={rules!r}: expected {{logical axis: mesh axis, several, None}}")
        given = dict(rules or {})
        if unknown := sorted(set(given) - set(DEFAULT_RULES)):
            raise ValueError(
                f"rules: no logical axis {unknown[0]!r}; there are {', '.join(DEFAULT_RULES)}"
            )
        chosen: dict[str, MeshAxes] = {}
        for name, default in DEFAULT_RULES.items():
            found = given.get(name, default)
            axes = () if found is None else (found,) if isinstance(found, str) else found
            if not isinstance(axes, Sequence) or len(set(axes)) != len(axes):
                raise ValueError(
                    f"rules: {name!r} goes over {found!r}; expected names of mesh axes, each once"
                )
            axes = tuple(axes)
            absent = [axis for axis in axes if axis not in mesh.axis_names]
            if absent and name in given:
                raise ValueError(
                    f"rules: {name!r} goes over {absent[0]!r}; the mesh has {mesh.axis_names}"
                )
            chosen[name] = () if absent else axes
        named = {axis for axes in chosen.values() for axis in axes}
        for axis, size in mesh.shape.items():
            if size > 1 and axis not in named:
                raise ValueError(
                    f"mesh axis {axis!r} of {size} devices: no rule names it, so each would hold"
                    f" the same; the rules are {chosen}, the keyword `rules` changes them"
                )
        return cls(mesh, tuple(chosen.items()))

    def axes(self, name: str | None) -> MeshAxes:
        """Return the axes of the mesh over which a logical axis is cut; none for None."""
        return () if name is None else dict(self.rules)[name]

    def size(self, axes: MeshAxes) -> int:
        """Return the number of parts that these axes of the mesh make."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def dividing(self, name: str, count: int) -> MeshAxes:
        """Return the mesh axes of a logical axis of `count`, none where they do not divide it."""
        axes = self.axes(name)
        return axes if count % self.size(axes) == 0 else ()

    def cache_axes(self, rows: int, heads: int, kv_heads: int) -> tuple[MeshAxes, MeshAxes]:
        """Return over what a cache's rows and its kv heads are cut.

        Where the heads do not divide, the rows go over their mesh axes too, if they can.
        """
        batch, across = self.dividing("batch", rows), self.axes("kv_heads")
        alike = across == self.axes("heads") and not set(across) & set(batch)
        if alike and kv_heads % self.size(across) == 0 == heads % self.size(across):
            return batch, across
        both = (*batch, *(axis for axis in across if axis not in batch))
        return (both if rows % self.size(both) == 0 else batch), ()

    def sharding(self, *axes: MeshAxes) -> NamedSharding:
        """Return the sharding of an array whose axes are cut over these axes of the mesh."""
        return NamedSharding(self.mesh, spec(*axes))

    def call(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any
    ) -> Any:
        """Call a function on each device's part of the arguments, laid out by `in_specs`.

        Within it all axes of the mesh are manual, so it is the same under Auto and Explicit axes.
        """
        arguments = tuple(
            jax.tree.map(self._laid_out, argument, _whole_specs(specs, argument))
            for argument, specs in zip(arguments, in_specs, strict=True)
        )
        # What varies over the mesh is unchecked: the function itself sums over devices.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return mapped(*arguments)

    @property
    def spans_processes(self) -> bool:
        """Whether some of the devices are another process's, which has to run the same."""
        return len(self.mesh.local_devices) < self.mesh.size

    def everywhere(self, tree: Any, *axes: MeshAxes) -> Any:
        """Put what every process has, numpy arrays, on all devices: whole, or cut over `axes`."""

        def put(x: Any) -> jax.Array:
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, self.sharding(*axes), lambda i: host[i])

        return jax.tree.map(put, tree)

    def whole(self, tree: Any) -> Any:
        """Return the same values with every device holding all of each array."""

        def everywhere(x: jax.Array) -> jax.Array:
            if self._explicit:
                x = self._laid_out(x, PartitionSpec())
            return jax.lax.with_sharding_constraint(x, self.sharding())

        return jax.tree.map(everywhere, tree)

    @property
    def _explicit(self) -> set[str]:
        """The axes over which an array's type says how it is cut: it has to be asked to move."""
        mesh = self.mesh
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        return {name for name, kind in types if kind == AxisType.Explicit}

    def _laid_out(self, x: jax.Array, wanted: PartitionSpec) -> jax.Array:
        explicit = self._explicit
        if not explicit:
            return x
        typed = [
            tuple(axis for axis in _tuple(axes) if axis in explicit) or None for axes in wanted
        ]
        return jax.sharding.reshard(x, NamedSharding(self.mesh, PartitionSpec(*typed)))


def spec(*axes: MeshAxes) -> PartitionSpec:
    """Return the PartitionSpec of an array whose axes are cut over these axes of the mesh."""
    return PartitionSpec(*(over[0] if len(over) == 1 else over or None for over in axes))


def _tuple(axes: Any) -> MeshAxes:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _whole_specs(specs: Any, tree: Any) -> Any:
    """Return a spec for each array of a tree, of a tree of specs or of one spec for all."""
    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda _: specs, tree)
    return specs
