"""Tensors of a file -> weights on a mesh; a process reads the bytes of its own devices' parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import UInt8

from qllama_jax.matmul.experts import SeparateExperts
from qllama_jax.matmul.sharded import ShardedWeight
from qllama_jax.quants import Block, Leaf
from qllama_jax.shard_plan import ShardPlan
from qllama_jax.sharding import MeshAxes, spec
from qllama_jax.tensor_file import GGUFFile, GGUFTensor, aligned_bytes
from qllama_jax.tensor_reader import Progress, TensorReader, check_finite, plain_if_f32
from qllama_jax.tensor_types import BLOCK_SIZES

# The part that a device holds of an array: a slice of each axis.
Index = tuple[slice, ...]


class ShardReader(TensorReader):
    """A `TensorReader` whose weights are cut as a plan says, in the blocks of the file.

    Norms, biases and frequencies are read whole by every process; norms and frequencies are whole
    on every device too.
    """

    def __init__(
        self, file: GGUFFile, check_tensors: bool, progress: Progress | None, plan: ShardPlan
    ) -> None:
        """All but the plan as in `load`."""
        super().__init__(file, check_tensors, progress, "file")
        self._plan = plan

    def matrix(self, name: str, shape: tuple[int, ...]) -> Leaf:
        """Weights `[*, out, in]`, packed, as a `ShardedWeight`."""
        block, tensor = self._claim(name, shape)

        def read(index: Index) -> np.ndarray:
            return self._rows(block, tensor, shape, index)

        weight = self._sharded(name, block, shape, read)
        self._done(tensor)
        return weight

    def table(self, name: str, shape: tuple[int, int]) -> Leaf:
        """As `matrix`."""
        return self.matrix(name, shape)

    def matrices(self, name: str, rows: Sequence[int], width: int) -> list[Leaf]:
        """Weights that the file holds one below the other, so many rows each: q, k and v."""
        whole = (sum(rows), width)
        block, tensor = self._claim(name, whole)
        found = []
        for part, count, before in zip("qkv", rows, np.cumsum([0, *rows[:-1]]), strict=True):

            def read(index: Index, before: int = int(before)) -> np.ndarray:
                own, blocks = index
                shifted = slice(before + own.start, before + own.stop)
                return self._rows(block, tensor, whole, (shifted, blocks))

            own_name = name.replace("attn_qkv", f"attn_{part}")
            found.append(self._sharded(own_name, block, (count, width), read))
        self._done(tensor)
        return found

    def stacked(self, names: Sequence[str], shape: tuple[int, int]) -> Leaf:
        """Weights `[E, out, in]` of E tensors `[out, in]`: a leaf each where formats differ."""
        claims = [self._claim(name, shape) for name in names]
        weight = self._stacked(names, claims, shape)
        for _, tensor in claims:
            self._done(tensor)
        return weight

    def _stacked(
        self,
        names: Sequence[str],
        claims: list[tuple[type[Block], GGUFTensor]],
        shape: tuple[int, int],
    ) -> Leaf:
        merged = names[0].replace(".0.weight", "_exps.weight")
        block, _ = claims[0]
        if any(other is not block for other, _ in claims):
            cut = self._plan.cuts[merged][1:]
            return SeparateExperts(
                tuple(
                    self._sharded(
                        merged,
                        own,
                        shape,
                        lambda index, claim=(own, tensor): self._rows(*claim, shape, index),
                        cut,
                    )
                    for own, tensor in claims
                )
            )

        def read(index: Index) -> np.ndarray:
            experts, *own = index
            parts = [self._rows(*claim, shape, tuple(own)) for claim in claims[experts]]
            return np.stack(parts)

        return self._sharded(merged, block, (len(names), *shape), read)

    def place(self, tree: Any) -> Any:
        """Put every array of a tree, which every process has, on every device of the mesh."""
        return self._plan.partitioning.everywhere(tree)

    def place_bias(self, name: str, bias: np.ndarray | None) -> Leaf:
        """Cut the bias of a linear layer, if it has one, as the layer's outputs are."""
        over_out, _ = self._plan.cuts[f"{name}.weight"]
        return self._plan.partitioning.everywhere(bias, over_out)

    def _sharded(
        self,
        name: str,
        block: type[Block],
        shape: tuple[int, ...],
        read: Callable[[Index], np.ndarray],
        cut: tuple[MeshAxes, ...] | None = None,
    ) -> ShardedWeight:
        """Make the weight `shape` of `read(index)`, its raw blocks `[*out, nb]` there."""
        cut = self._plan.cuts[name] if cut is None else cut
        *out, width = shape
        grid = (*out, width // block.block_size)
        sharding = NamedSharding(self._plan.partitioning.mesh, spec(*cut))
        parts: dict[tuple, np.ndarray] = {}

        def field(name: str) -> jax.Array:
            layout = block.layout[name]

            def of_part(index: Any) -> np.ndarray:
                index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, grid, strict=False))
                key = tuple((s.start, s.stop) for s in index)
                if key not in parts:
                    parts[key] = read(index)
                return np.array(parts[key][name], order="C")

            return self._array((*grid, *layout.shape), layout.base, sharding, of_part)

        packed = block(**{name: field(name) for name in block.layout.names or ()})
        return ShardedWeight(plain_if_f32(packed), self._plan.partitioning, cut)

    def _array(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        sharding: NamedSharding,
        of_part: Callable[[Any], np.ndarray],
    ) -> Any:
        """Make an array of its parts, those of this process's devices."""
        return jax.make_array_from_callback(shape, sharding, of_part, dtype=dtype)

    def _rows(
        self, block: type[Block], tensor: GGUFTensor, shape: tuple[int, ...], index: Index
    ) -> np.ndarray:
        """Read the blocks `[*out, nb]` of a part of a tensor of `shape`, checked."""
        raw = read_part(tensor, shape, index)
        if self._check_tensors:
            check_finite(tensor, block.view(raw), tuple(s.start for s in index))
        return raw.view(block.layout)


def read_part(
    tensor: GGUFTensor, shape: tuple[int, ...], index: Index
) -> UInt8[np.ndarray, "*out bytes"]:
    """Read the blocks that `index` picks of the axes `[*out, nb]` of a tensor, and no others.

    `shape` is the tensor's `[*out, in]`; a stack of one may lack its first axis in the file.

    Raises as `GGUFTensor.data`.
    """
    block, block_bytes = BLOCK_SIZES[tensor.qtype]
    grid = (*shape[:-1], shape[-1] // block * block_bytes)
    *out, blocks = index
    picked = (*out, slice(blocks.start * block_bytes, blocks.stop * block_bytes))
    lengths = [s.stop - s.start for s in picked]
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    # What lies behind the last axis of which only some is picked is read in one go with it.
    last = max((i for i, n in enumerate(lengths) if n < grid[i]), default=0)
    run = math.prod(lengths[last:])
    raw = aligned_bytes(math.prod(lengths))
    memory, done = memoryview(raw), 0
    inside = picked[last].start * strides[last]
    with tensor.source.open() as file:
        for at in itertools.product(*(range(s.start, s.stop) for s in picked[:last])):
            offset = inside + sum(i * stride for i, stride in zip(at, strides, strict=False))
            tensor.fill(memory[done : done + run], file, tensor.offset + offset)
            done += run
    return raw.reshape(lengths)
