"""A weight packed for a CPU: rows side by side in the lanes of a vector register."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float32, Int32

from qllama_jax.matmul.cpu import processor
from qllama_jax.matmul.cpu.fence import fence_for
from qllama_jax.matmul.cpu.layouts import LAYOUTS, Layout, groups_of_a_float_sum
from qllama_jax.quants import Leaf

# Rows of a tile, of numbers and of words. Words have as many as the widest vectors that the
# processor works on at once have lanes of 16 bits. On an EPYC Turin a step of 1.1B in a session
# takes with 32 instead of 16 rows of words 0.94 of its time in Q4_0, 0.93 in Q4_K_M, 1.02 in Q6_K,
# with 4 rows of x 0.76 in Q4_0; prompts take as long (by turns in one process). Numbers of 16 bits
# are read at 31 GB/s with 32 of them, with 16 at 43 (jax 0.12).
NUMBER_LANES, MOST_LANES = 16, 32
WORD_LANES = MOST_LANES if processor.has_undivided_512_bits() else 16


def lanes_of(format: str) -> int:
    """Return how many rows a tile has of a weight that is packed here."""
    return WORD_LANES if LAYOUTS[format].words else NUMBER_LANES


# Before 0.11 XLA converted a bfloat16 weight to float32 as a whole: there its bits are an integer,
# from which a product takes 1.4 times as long as from bfloat16 after it.
TAKES_BFLOAT16 = jax.__version_info__ >= (0, 11)


@struct.dataclass
class CPUWeight:
    """Weights `[out, in]` whose bits are those of the file, in another order.

    A tile is as many rows as `lanes_of` says, or all that `slice_rows` cuts out; the last one is
    filled up with zeros. G counts the groups of weights in a row (see `Layout`), nb the
    super-blocks. The scales of sub-blocks are small integers, and half floats of the super-block
    multiply them; formats without super-blocks have half floats alone.
    The scales of c groups that the integer kernel sums (`groups_of_a_sum`) lie side by side, as
    they are read together: else a row of tiles for each is read at a time, in Q4_K 16 of them.
    1.1B in Q4_K_M decodes 1.09 times as fast so, in Q4_0 1.05 (jax 0.12, two cores of an EPYC
    Genoa). Without words c is 1.
    A scale of 6 or 4 bits takes a byte here, so a k-quant is larger than in the file: Q5_K by
    2.3 %, Q4_K 2.8, Q3_K 3.6, Q2_K 19 (with two scales a byte its sums take twice as long).
    """

    words: Leaf  # uint16[*, G, tiles, n, lanes]; without words a number a weight, n = 32
    scale: Leaf  # float16, int8 or uint8 [*, G / c, tiles, c, lanes], or None
    minimum: Leaf  # float16 or uint8 alike, or None
    super_scale: Leaf  # float16[*, nb, tiles, lanes], or None
    super_minimum: Leaf  # the same, or None
    format: str = struct.field(pytree_node=False)
    out: int = struct.field(pytree_node=False)
    # Of one weight in a stack, see `one_of_stack`: {n: int32[n]}, which rows are its own where
    # leaves are cut into n rows a weight. The leaves are then those of all weights, `[m, ...]`.
    rows: dict[int, Array] | None = None

    @property
    def layout(self) -> Layout:
        """How the words hold the integers."""
        return LAYOUTS[self.format]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `(*, out, in)`."""
        *lead, groups, _, _, _ = self.words.shape
        width = groups * self.layout.group
        return (self.out, width) if self.rows is not None else (*lead, self.out, width)

    @property
    def padded(self) -> int:
        """Rows with the fillings of the last tile."""
        return self.words.shape[-3] * self.words.shape[-1]

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, or of this weight's part of a stack."""
        count = 1 if self.rows is None else self.words.shape[0]
        leaves = jax.tree.leaves(dataclasses.replace(self, rows=None))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // count

    def __repr__(self) -> str:
        try:
            return f"CPUWeight({self.format}, shape={self.shape}, nbytes={self.nbytes})"
        except (AttributeError, TypeError, ValueError):  # other leaves, as within tree.map
            return f"CPUWeight({self.format}, {self.words!r})"

    def one_of_stack(self, index: Int32[Array, ""]) -> CPUWeight:
        """Return weight `index` of a stack, whose leaves are `[n, ...]`; nothing is copied.

        The first two axes of a leaf are read as one, of rows that `rows` numbers, by how many of
        them a weight has. With a dynamic slice instead, and with numbers that are computed within
        the kernel, LLVM loads a scalar anew for every item, and the code is scalar: a step of 1.1B
        in Q4_0 whose layers are a loop takes 79 ms, with stored numbers 33, and 33 with all layers
        one after the other (jax 0.12, two cores of an EPYC Genoa).

        `index` must lie in 0..n-1.

        Raises:
            TypeError: this is no stack.
        """
        if self.ndim != 3:
            raise TypeError(f"one_of_stack: {self} is no stack of weights")
        pieces = {leaf.shape[1] for leaf in jax.tree.leaves(self)}
        if not self.layout.words:
            pieces.add(self.words.shape[1] // groups_of_a_float_sum(self.words.shape[1]))
        rows = {n: index * np.int32(n) + np.arange(n, dtype=np.int32) for n in sorted(pieces)}
        return dataclasses.replace(self, rows=fence_for(index)(rows))

    def take(self, part: Array, repeats: int = 1) -> Array:
        """Return what is this weight's of a leaf, or of what was cut out of its last axes.

        Of its first axis each row comes `repeats` times: once for each row of x that meets it. To
        repeat what was gathered, XLA stores it first: 4 rows of x times Q6_K [2048, 5632] took 2.3
        ms out of a stack, numbers of 8 and 16 bits ten times as long as now (see `one_of_stack`).
        """
        if self.rows is None:
            return jnp.repeat(part, repeats, axis=0)
        _, n, *rest = part.shape
        rows = jnp.repeat(self.rows[n], repeats)
        part = part.reshape(-1, *rest)
        return part.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)

    def alone(self) -> CPUWeight:
        """Return the weight itself, or a copy of one that is in a stack."""
        if self.rows is None:
            return self
        return jax.tree.map(self.take, dataclasses.replace(self, rows=None))

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return the values, bit-equal to those of the format's own `dequantize`."""
        return jnp.swapaxes(self.dequantize_transposed(), -1, -2)

    def dequantize_transposed(self) -> Float32[Array, "*in out"]:
        """Return the values with rows as columns, which leaves them in the lanes."""
        if self.rows is not None:
            return self.alone().dequantize_transposed()
        values = self._integers().astype(jnp.float32)
        if self.layout.zero:  # a difference would flush subnormal numbers
            values = values - np.float32(self.layout.zero)
        if self.scale is not None:
            scale = lax.optimization_barrier(_full_scale(self.scale, self.super_scale))
            values = scale[..., None, :] * values
        if self.minimum is not None:
            minimum = lax.optimization_barrier(_full_scale(self.minimum, self.super_minimum))
            minimum = minimum[..., None, :]
            values = values - minimum if self.layout.subtracts_minimum else values + minimum
        # [*, G, tiles, group, lanes] -> [*, G, group, tiles, lanes]
        values = jnp.swapaxes(values, -3, -2)
        *lead, groups, group, tiles, lanes = values.shape
        return values.reshape(*lead, groups * group, tiles * lanes)[..., : self.out]

    def offsets(self) -> Float32[Array, "*G tiles lanes"]:
        """Return scale (middle - zero) + minimum, of each group's weights.

        With it the sum of w x over a group is scale * sum((q - middle) x) + offset * sum(x).
        """
        if self.rows is not None:
            return self.alone().offsets()
        assert self.scale is not None
        offset = _full_scale(self.scale, self.super_scale) * np.float32(self.layout.excess)
        if self.minimum is None:
            return offset
        minimum = _full_scale(self.minimum, self.super_minimum)
        return offset - minimum if self.layout.subtracts_minimum else offset + minimum

    def dequantize_rows(self, rows: Int32[Array, "*rows"]) -> Float32[Array, "*rows in"]:
        """Return `dequantize()[rows]`; only those rows are read."""
        if self.rows is not None:
            return self.alone().dequantize_rows(rows)

        def row(index: Array) -> Array:
            lanes = self.words.shape[-1]
            tile, lane = index // lanes, index % lanes

            def cell(leaf: Array) -> Array:
                column = lax.dynamic_slice_in_dim(leaf, tile, 1, axis=1)
                return lax.dynamic_slice_in_dim(column, lane, 1, axis=leaf.ndim - 1)

            return dataclasses.replace(jax.tree.map(cell, self), out=1).dequantize()[0]

        found = jax.vmap(row)(rows.reshape(-1))
        return found.reshape(*rows.shape, found.shape[-1])

    def slice_rows(self, start: Int32[Array, ""], count: int) -> CPUWeight:
        """Return `count` rows from row `start`, both multiples of a tile's, as one wide tile.

        So what is dequantized lies in memory as it does after it. Rows in many tiles XLA's code
        gathers number by number: [5632, 2048] takes 6.7 ms in Q4_0 and 7.7 in Q4_K, as a wide tile
        1.3 and 1.2, and 0.3 to make it one (jax 0.12, two cores of an EPYC Genoa).

        Raises:
            ValueError: this is such a wide tile, of which no rows can be cut.
        """
        lanes = self.words.shape[-1]
        if lanes > MOST_LANES:
            raise ValueError(f"slice_rows: {self} is one tile already, which is cut no further")
        fence = fence_for(start)
        # Computed apart: fused into what follows, a slice makes it scalar.
        part = fence(self.slice_tiles(lax.div(start, np.int32(lanes)), count // lanes))
        return fence(jax.tree.map(lambda leaf: _in_one_tile(leaf, axis=1), part))

    def slice_tiles(self, start: Int32[Array, ""], count: int) -> CPUWeight:
        """Return `count` tiles from tile `start`."""
        part = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, start, count, 1), self.alone()
        )
        return dataclasses.replace(part, out=part.padded)

    def _integers(self) -> Array:
        layout = self.layout
        if not layout.words:
            return as_float(self.words)
        found = None
        for word, bit, mask, unit in zip(*layout.terms, strict=True):
            words = jnp.take(self.words, word, axis=-2, mode="clip")
            column = (1,) * (words.ndim - 2) + (layout.group, 1)
            term = (words >> bit.reshape(column)) & mask.reshape(column)
            term = term * unit.reshape(column)
            found = term if found is None else found + term
        assert found is not None
        return found.astype(jnp.int16)


def _in_one_tile(leaf: Array, axis: int) -> Array:
    """Return a leaf with its tiles, which are at `axis`, side by side in the lanes."""
    leaf = jnp.moveaxis(leaf, axis, -2)
    return jnp.expand_dims(leaf.reshape(*leaf.shape[:-2], -1), axis)


def as_float(numbers: Array) -> Float32[Array, "*shape"]:
    """Return numbers of 8 or 16 bits in float32; uint16 holds the bits of bfloat16."""
    if numbers.dtype == jnp.uint16:
        return lax.bitcast_convert_type(numbers.astype(jnp.uint32) << np.uint32(16), jnp.float32)
    return numbers.astype(jnp.float32)


def _full_scale(scale: Array, by: Leaf) -> Float32[Array, "*lead G tiles lanes"]:
    """Return the scales by group, multiplied with that of their super-block, if there is one."""
    *lead, sums, tiles, count, lanes = scale.shape
    small = jnp.swapaxes(scale, -3, -2).astype(jnp.float32)
    if by is not None:
        nb = by.shape[-3]
        small = small.reshape(*lead, nb, sums * count // nb, tiles, lanes)
        small = by[..., None, :, :].astype(jnp.float32) * small
    return small.reshape(*lead, sums * count, tiles, lanes)
