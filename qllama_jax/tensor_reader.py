"""Tensors of a file by name, each taken once: checked against the wanted shape, packed, placed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from qllama_jax.errors import GGUFError, quoted
from qllama_jax.matmul import cpu
from qllama_jax.matmul.experts import SeparateExperts
from qllama_jax.quants import F32, FORMATS, Block, Leaf
from qllama_jax.stacking import FormatStack
from qllama_jax.tensor_file import DATA_ALIGNMENT, GGUFFile, GGUFTensor, TensorRows

Progress = Callable[[int, int], None]
Layout = Literal["auto", "file"]
_OF_A_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class TensorReader:
    """Takes tensors out of a file and knows what is left."""

    def __init__(
        self, file: GGUFFile, check_tensors: bool, progress: Progress | None, layout: Layout
    ) -> None:
        """All but the file as in `load`."""
        self.file = file
        self._left = dict(file.tensors)
        self._check_tensors = check_tensors
        self._progress = progress
        self._for_cpu = layout == "auto" and jax.default_backend() == "cpu"
        self._bytes_total = sum(tensor.nbytes for tensor in file.tensors.values())
        self._bytes_done = 0
        self._stacks: dict[tuple[str, str, tuple[int, ...]], FormatStack] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor of that name that was not taken yet."""
        return name in self._left

    def matrix(self, name: str, shape: tuple[int, ...]) -> Leaf:
        """Weights `[*, out, in]` on the device: packed, or a plain array where they are F32."""
        with self._take(name, shape) as rows:
            return self._leaf(rows, shape, name)

    def table(self, name: str, shape: tuple[int, int]) -> Leaf:
        """Weights `[rows, in]` that nothing is multiplied with; only rows are looked up."""
        with self._take(name, shape) as rows:
            return self._blocks(rows, shape)

    def matrices(self, name: str, rows: Sequence[int], width: int) -> list[Leaf]:
        """Weights that the file holds one below the other, taken apart after so many rows each."""
        ends = np.cumsum(rows).tolist()
        with self._take(name, (sum(rows), width)) as whole:
            return [
                self._leaf(whole.part(end - out, end), (out, width))
                for out, end in zip(rows, ends, strict=True)
            ]

    def stacked(self, names: Sequence[str], shape: tuple[int, int]) -> Leaf:
        """Weights `[E, out, in]` of E tensors `[out, in]`: a leaf each where formats differ."""
        formats = {_format_of(self._left[name]) for name in names if name in self}
        if len(formats) == 1 and not any(self._packs(block, shape[-1]) for block in formats):
            (block,) = formats
            parts = []
            for name in names:
                with self._take(name, shape) as rows:
                    parts.append(rows[:])
            return _placed(block, np.stack(parts))
        return SeparateExperts(tuple(self.matrix(name, shape) for name in names))

    def vector(self, name: str, size: int) -> Float32[np.ndarray, " size"]:
        """A norm, bias or frequency factor, float32 on the host."""
        with self._take(name, (size,)) as rows:
            return np.asarray(place(rows.block.from_bytes(rows[:][0])).dequantize())

    def optional_vector(self, name: str, size: int) -> Float32[np.ndarray, " size"] | None:
        """As `vector`, None where the file has none."""
        return self.vector(name, size) if name in self else None

    def stacks(self) -> dict[str, list[FormatStack]]:
        """Return, by their name within a block, the weights of layers that lie one after another.

        To be asked for after all weights have been taken. They share the memory of those.
        """
        found: dict[str, list[FormatStack]] = {}
        for (name, *_), stack in self._stacks.items():
            found.setdefault(name, []).append(stack._replace(weights=place(stack.weights)))
        return found

    def _leaf(self, rows: CheckedRows, shape: tuple[int, ...], name: str = "") -> Leaf:
        """Place weights in the arrangement from which this backend multiplies fastest.

        Those of a block, which their name tells, beside other layers' of the name and format.
        """
        *experts, out, width = shape
        if not self._packs(rows.block, width):
            return self._blocks(rows, shape)
        format = rows.block.qtype.name
        parts = [rows.part(first, first + out) for first in range(0, rows.shape[0], out)]
        rooms = self._rooms(rows, name, shape, len(parts))
        leaves = tuple(
            place(cpu.pack(format, part, room)) for part, room in zip(parts, rooms, strict=True)
        )
        return SeparateExperts(leaves) if experts else leaves[0]

    def _rooms(
        self, rows: CheckedRows, name: str, shape: tuple[int, ...], parts: int
    ) -> list[cpu.CPUWeight | None]:
        """Return memory in a stack for the parts of a layer's tensor, None where there is none."""
        tensor, found = rows.rows.tensor, _OF_A_BLOCK.fullmatch(name)
        if found is None:
            return [None] * parts
        layer, name, format = int(found[1]), found[2], rows.block.qtype.name
        stack = self._stacks.get((name, format, shape))
        if stack is None:
            alike = [
                other
                for other in self.file.tensors.values()
                if (match := _OF_A_BLOCK.fullmatch(other.name)) and match[2] == name
                if (other.qtype, other.nbytes) == (tensor.qtype, tensor.nbytes)
            ]
            *experts, out, _ = shape
            weights = cpu.room_for(format, out, rows.shape[1], len(alike) * parts)
            # Else JAX would copy it.
            if any(leaf[0].nbytes % DATA_ALIGNMENT for leaf in jax.tree.leaves(weights)):
                return [None] * parts
            stack = FormatStack(weights, [], *experts) if experts else FormatStack(weights, [])
            self._stacks[name, format, shape] = stack
        first = len(stack.layers) * parts
        stack.layers.append(layer)
        return [
            jax.tree.map(lambda leaf, at=at: leaf[at], stack.weights)
            for at in range(first, first + parts)
        ]

    def _blocks(self, rows: CheckedRows, shape: tuple[int, ...]) -> Leaf:
        """Place weights in the blocks of the file."""
        return _placed(rows.block, rows[:].reshape(*shape[:-1], -1))

    def _packs(self, block: type[Block], width: int) -> bool:
        return self._for_cpu and cpu.can_pack(block.qtype.name, width)

    @contextmanager
    def _take(self, name: str, shape: tuple[int, ...]) -> Iterator[CheckedRows]:
        """Take a tensor out of the file, to be read by rows."""
        block, tensor = self._claim(name, shape)
        with tensor.open() as rows:
            yield CheckedRows(rows, block, self._check_tensors)
        self._done(tensor)

    def _claim(self, name: str, shape: tuple[int, ...]) -> tuple[type[Block], GGUFTensor]:
        """Take a tensor of this shape out of those that are left, unread: its format and itself."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise GGUFError(f"{self.file.path}: tensor {quoted(name)} is missing")
        # As ggml writes a shape: without the 1 at the end of what is a stack of one.
        one = shape[0] == 1 and len(shape) > 1 and tensor.shape[::-1] == shape[1:]
        if tensor.shape[::-1] != shape and not one:
            found, wanted = list(tensor.shape), list(shape[::-1])
            raise tensor.error(f"shape {found}, wanted {wanted}")
        return _format_of(tensor), tensor

    def _done(self, tensor: GGUFTensor) -> None:
        self._bytes_done += tensor.nbytes
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)

    def place(self, tree: Any) -> Any:
        """Put every array of a tree where the weights are."""
        return place(tree)

    def place_bias(self, name: str, bias: np.ndarray | None) -> Leaf:
        """Put the bias of a linear layer, if it has one, where the layer's outputs are."""
        return self.place(bias)

    def check_nothing_left(self) -> None:
        """Refuse a file with tensors that nobody took: it is not what it says it is."""
        if self._left:
            names = ", ".join(quoted(name) for name in list(self._left)[:5])
            raise GGUFError(
                f"{self.file.path}: {len(self._left)} tensors that no part of the architecture"
                f" 'llama' uses: {names}"
            )


@dataclass(frozen=True)
class CheckedRows:
    """Rows of a tensor of which each slice is refused where a number in it is not finite."""

    rows: TensorRows
    block: type[Block]
    check: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and bytes of a row."""
        return self.rows.shape

    def part(self, start: int, stop: int) -> CheckedRows:
        """Rows start .. stop - 1; nothing is read."""
        return replace(self, rows=self.rows.part(start, stop))

    def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "rows row_bytes"]:
        """Read consecutive rows, as `TensorRows` does."""
        raw = self.rows[rows]
        if self.check:
            try:
                check_finite(self.rows.tensor, self.block.view(raw))
            except GGUFError:  # which shall say how often and where in all of the tensor
                check_finite(self.rows.tensor, self.block.view(self.rows.tensor.data))
                raise
        return raw


def check_finite(tensor: GGUFTensor, packed: Block, begin: tuple[int, ...] = ()) -> None:
    """Refuse what is not finite among blocks of a tensor that begin there in it."""
    for field, bad in packed.not_finite().items():
        if bad.any():
            first = list(map(int, np.argwhere(bad)[0]))
            first = [at + start for at, start in zip_longest(first, begin, fillvalue=0)]
            raise tensor.error(
                f"{int(bad.sum())} of its {bad.size} {tensor.qtype.name} field {field!r} are"
                f" NaN or infinite, the first at index {first}; check_tensors=False loads it"
                " all the same"
            )


def _format_of(tensor: GGUFTensor) -> type[Block]:
    if tensor.qtype not in FORMATS:
        known = ", ".join(
            qtype.name for qtype in sorted(FORMATS) if type(qtype) is type(tensor.qtype)
        )
        raise tensor.error(f"type {tensor.qtype.name} is not supported; supported are {known}")
    return FORMATS[tensor.qtype]


def _placed(block: type[Block], raw: UInt8[np.ndarray, "*out row_bytes"]) -> Leaf:
    return place(plain_if_f32(block.from_bytes(raw)))


def place(tree: Any) -> Any:
    """Put every array of a tree on the default device."""
    return jax.device_put(tree)


def plain_if_f32(packed: Any) -> Any:
    """Return the array itself for F32 blocks, which it is already."""
    return packed.w if isinstance(packed, F32) else packed
