"""What a packed weight is: a pytree of the fields of a ggml block struct; the registry of formats.

A GGUF row of K values is K / block_size blocks. The struct of one block is declared once, as a
numpy dtype, so `raw.view(layout)` is the parser; the fields then live on the device as arrays
`[*out, nb, *field]`, `nb` blocks along the contracted axis. Because every leaf begins with
`*out`, gathering rows, slicing, stacking and vmapping need no code of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from qllama_jax.tensor_types import BLOCK_SIZES, TensorType

# A pytree node must accept whatever a tree.map puts in place of an array (shapes, specs, None),
# so the fields of a struct are not type-checked; their dtypes and shapes stand in `layout`.
Leaf = Any

FORMATS: dict[TensorType, type[Block]] = {}


class Block:
    """A weight in ggml blocks; logical shape `[*out, nb * block_size]`, values `dequantize()`."""

    qtype: ClassVar[TensorType]
    block_size: ClassVar[int]  # values a block
    layout: ClassVar[np.dtype]  # the block struct, byte for byte

    @classmethod
    def view(cls, raw: UInt8[np.ndarray, "*out bytes"]) -> Block:
        """View rows of raw GGUF bytes as blocks: numpy fields that lie among each other."""
        blocks = raw.view(cls.layout)
        return cls(**{name: blocks[name] for name in cls.layout.names or ()})

    @classmethod
    def from_bytes(cls, raw: UInt8[np.ndarray, "*out bytes"]) -> Block:
        """Take rows of raw GGUF bytes as blocks: numpy fields, each in memory of its own."""
        return jax.tree.map(lambda field: np.array(field, order="C"), cls.view(raw))

    def to_bytes(self) -> UInt8[np.ndarray, "*out bytes"]:
        """Return the rows as GGUF stores them; the inverse of `from_bytes`."""
        first = np.asarray(self._leaves[0])
        blocks = np.empty(first.shape[: self._leading], self.layout)
        for name, leaf in zip(self.layout.names or (), self._leaves, strict=True):
            blocks[name] = np.asarray(leaf)
        return blocks.view(np.uint8).reshape(*blocks.shape[:-1], -1)

    def dequantize(self) -> Float32[Array, "*out in"]:
        """Return the values, bit-equal to ggml's dequantize_row of this type."""
        raise NotImplementedError

    def dequantize_transposed(self) -> Float32[Array, "*in out"]:
        """Return the values with rows as columns."""
        return jnp.swapaxes(self.dequantize(), -1, -2)

    def slice_rows(self, start: Array, count: int) -> Block:
        """Return `count` rows from row `start`, which may be traced, still packed."""
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, count), self)

    def dequantize_rows(self, rows: Int32[Array, "*rows"]) -> Float32[Array, "*rows in"]:
        """Return `dequantize()[rows]`; only those rows are read."""
        return take(self, rows).dequantize()

    def not_finite(self) -> dict[str, Bool[np.ndarray, ...]]:
        """Return by field which of its numbers are NaN or infinite; for blocks of numpy arrays.

        The fields left out are integers of which each is finite. A format that keeps a float in
        integers says here what ggml_validate_row_data says of it.
        """
        fields = {name: getattr(self, name) for name in self.layout.names or ()}
        floats = {name: leaf for name, leaf in fields.items() if leaf.dtype.kind == "f"}
        return {name: ~np.isfinite(leaf) for name, leaf in floats.items()}

    @property
    def _leaves(self) -> list[Leaf]:
        return [getattr(self, name) for name in self.layout.names or ()]

    @property
    def _leading(self) -> int:
        """Number of axes before the fields' own: those of `*out`, and `nb`."""
        return len(self._leaves[0].shape) - self.layout[0].ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `(*out, in)`, derived from the arrays."""
        *out, nb = self._leaves[0].shape[: self._leading]
        return (*out, nb * self.block_size)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays: those of the file."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self._leaves)

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__}(shape={self.shape}, nbytes={self.nbytes})"
        except (AttributeError, TypeError, ValueError):  # other leaves, as within tree.map
            return f"{type(self).__name__}({', '.join(map(repr, self._leaves))})"


BlockType = TypeVar("BlockType", bound=type[Block])
Tree = TypeVar("Tree")


@dataclass_transform(frozen_default=True)
def block_format(
    qtype: TensorType, fields: list[tuple[Any, ...]]
) -> Callable[[BlockType], BlockType]:
    """Register a Block class as the format of `qtype`, with its struct as numpy dtype fields.

    The struct's size is held against ggml's own table, as ggml's static_assert does.
    """
    layout = np.dtype(fields)
    block_size, type_size = BLOCK_SIZES[qtype]
    assert layout.itemsize == type_size, (qtype.name, layout.itemsize, type_size)

    def register(cls: BlockType) -> BlockType:
        cls.qtype, cls.block_size, cls.layout = qtype, block_size, layout
        # JAX compares the static fields of dataclasses but not the classes: without one of its own
        # a jitted function may take a format for another that has the same arrays (Q4_0, IQ4_NL).
        cls.__annotations__["format"] = str
        setattr(cls, "format", struct.field(pytree_node=False, default=qtype.name))  # noqa: B010
        cls = struct.dataclass(cls, repr=False)  # type: ignore[assignment]
        names = [field.name for field in dataclasses.fields(cast(Any, cls))]
        assert names == [*(layout.names or ()), "format"]
        FORMATS[qtype] = cls
        return cls

    return register


def take(w: Tree, rows: Any) -> Tree:
    """Gather rows of a packed or plain weight; `take(w, i).dequantize() = w.dequantize()[i]`."""
    return jax.tree.map(lambda leaf: leaf[rows], w)
