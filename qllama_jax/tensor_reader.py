"""Tensors of a file by name, each taken once: checked against the wanted shape, packed, placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32

from qllama_jax.errors import GGUFError, quoted
from qllama_jax.matmul import cpu
from qllama_jax.matmul.experts import SeparateExperts
from qllama_jax.quants import F32, FORMATS, Block, Leaf
from qllama_jax.tensor_file import GGUFFile, GGUFTensor

Progress = Callable[[int, int], None]
Layout = Literal["auto", "file"]


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

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor of that name that was not taken yet."""
        return name in self._left

    def matrix(self, name: str, shape: tuple[int, ...]) -> Leaf:
        """Weights `[*, out, in]` on the device: packed, or a plain array where they are F32."""
        return self._leaf(*self._take(name, shape))

    def table(self, name: str, shape: tuple[int, int]) -> Leaf:
        """Weights `[rows, in]` that nothing is multiplied with; only rows are looked up."""
        block, raw = self._take(name, shape)
        return place(plain_if_f32(block.from_bytes(raw)))

    def matrices(self, name: str, rows: Sequence[int], width: int) -> list[Leaf]:
        """Weights that the file holds one below the other, taken apart after so many rows each."""
        block, whole = self._take(name, (sum(rows), width))
        return [self._leaf(block, part) for part in np.split(whole, np.cumsum(rows)[:-1])]

    def stacked(self, names: Sequence[str], shape: tuple[int, int]) -> Leaf:
        """Weights `[E, out, in]` of E tensors `[out, in]`: a leaf each where formats differ."""
        parts = [self._take(name, shape) for name in names]
        blocks = {block for block, _ in parts}
        if len(blocks) > 1 or any(self._packs(block, shape[-1]) for block in blocks):
            return SeparateExperts(tuple(self._leaf(block, raw) for block, raw in parts))
        return self._leaf(blocks.pop(), np.stack([raw for _, raw in parts]))

    def vector(self, name: str, size: int) -> Float32[np.ndarray, " size"]:
        """A norm, bias or frequency factor, float32 on the host."""
        block, raw = self._take(name, (size,))
        return np.asarray(place(block.from_bytes(raw)).dequantize())

    def optional_vector(self, name: str, size: int) -> Float32[np.ndarray, " size"] | None:
        """As `vector`, None where the file has none."""
        return self.vector(name, size) if name in self else None

    def _leaf(self, block: type[Block], raw: np.ndarray) -> Leaf:
        """Place weights in the arrangement from which this backend multiplies fastest."""
        width = raw.shape[-1] // block.layout.itemsize * block.block_size
        if not self._packs(block, width):
            return place(plain_if_f32(block.from_bytes(raw)))
        if raw.ndim == 3:
            return SeparateExperts(tuple(self._leaf(block, expert) for expert in raw))
        return place(cpu.pack(block.qtype.name, raw))

    def _packs(self, block: type[Block], width: int) -> bool:
        return self._for_cpu and cpu.can_pack(block.qtype.name, width)

    def _take(self, name: str, shape: tuple[int, ...]) -> tuple[type[Block], np.ndarray]:
        """Take a tensor out of the file: its format and its bytes."""
        block, tensor = self._claim(name, shape)
        raw = tensor.data
        raw = raw.reshape(*shape[:-1], raw.shape[-1])  # a stack of one may lack its axis
        if self._check_tensors:
            self._check_finite(tensor, block.view(raw))
        self._done(tensor)
        return block, raw

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
        return self._format_of(tensor), tensor

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

    def _format_of(self, tensor: GGUFTensor) -> Any:
        if tensor.qtype not in FORMATS:
            known = ", ".join(
                qtype.name for qtype in sorted(FORMATS) if type(qtype) is type(tensor.qtype)
            )
            raise tensor.error(f"type {tensor.qtype.name} is not supported; supported are {known}")
        return FORMATS[tensor.qtype]

    def _check_finite(self, tensor: GGUFTensor, packed: Any, begin: tuple[int, ...] = ()) -> None:
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


def place(tree: Any) -> Any:
    """Put every array of a tree on the default device."""
    return jax.tree.map(jax.device_put, tree)


def plain_if_f32(packed: Any) -> Any:
    """Return the array itself for F32 blocks, which it is already."""
    return packed.w if isinstance(packed, F32) else packed
