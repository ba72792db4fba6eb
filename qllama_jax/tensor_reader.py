"""Tensors of a file by name, each taken once: checked against the wanted shape, packed, placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from qllama_jax.errors import GGUFError, quoted
from qllama_jax.matmul.experts import MixedExperts
from qllama_jax.quants import F32, FORMATS, Leaf
from qllama_jax.tensor_file import GGUFFile, GGUFTensor

Progress = Callable[[int, int], None]


class TensorReader:
    """Takes tensors out of a file and knows what is left."""

    def __init__(self, file: GGUFFile, check_tensors: bool, progress: Progress | None) -> None:
        """`check_tensors` and `progress` as in `load`."""
        self.file = file
        self._left = dict(file.tensors)
        self._check_tensors = check_tensors
        self._progress = progress
        self._bytes_total = sum(tensor.nbytes for tensor in file.tensors.values())
        self._bytes_done = 0

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor of that name that was not taken yet."""
        return name in self._left

    def matrix(self, name: str, shape: tuple[int, ...]) -> Leaf:
        """Weights `[*, out, in]` on the device: packed, or a plain array where they are F32."""
        return place(plain_if_f32(self.read(name, shape)))

    def matrices(self, name: str, rows: Sequence[int], width: int) -> list[Leaf]:
        """Weights that the file holds one below the other, taken apart after so many rows each."""
        whole = self.read(name, (sum(rows), width))
        parts, first = [], 0
        for count in rows:
            cut = slice(first, first + count)
            part = jax.tree.map(lambda leaf, cut=cut: leaf[cut], whole)
            parts.append(place(plain_if_f32(part)))
            first += count
        return parts

    def stacked(self, names: Sequence[str], shape: tuple[int, int]) -> Leaf:
        """Weights `[E, out, in]` of E tensors `[out, in]`: one array where all have one format."""
        parts = [plain_if_f32(self.read(name, shape)) for name in names]
        if len({type(part) for part in parts}) > 1:
            return MixedExperts(tuple(place(part) for part in parts))
        return place(jax.tree.map(lambda *leaves: np.stack(leaves), *parts))

    def vector(self, name: str, size: int) -> Float32[np.ndarray, " size"]:
        """A norm, bias or frequency factor, float32 on the host."""
        return np.asarray(place(self.read(name, (size,))).dequantize())

    def optional_vector(self, name: str, size: int) -> Float32[np.ndarray, " size"] | None:
        """As `vector`, None where the file has none."""
        return self.vector(name, size) if name in self else None

    def read(self, name: str, shape: tuple[int, ...]) -> Any:
        """Take a tensor as a Block of numpy arrays."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise GGUFError(f"{self.file.path}: tensor {quoted(name)} is missing")
        if tensor.shape[::-1] != shape:
            found, wanted = list(tensor.shape), list(shape[::-1])
            raise GGUFError(
                f"{self.file.path}: tensor {quoted(name)}: shape {found}, wanted {wanted}"
            )
        packed = self._format_of(tensor).from_bytes(tensor.data)
        if self._check_tensors:
            self._check_finite(tensor, packed)
        self._bytes_done += tensor.nbytes
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)
        return packed

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
            raise GGUFError(
                f"{self.file.path}: tensor {quoted(tensor.name)}: type {tensor.qtype.name} is not"
                f" supported; supported are {known}"
            )
        return FORMATS[tensor.qtype]

    def _check_finite(self, tensor: GGUFTensor, packed: Any) -> None:
        for field, bad in packed.not_finite().items():
            if bad.any():
                raise GGUFError(
                    f"{self.file.path}: tensor {quoted(tensor.name)}: {int(bad.sum())} of its"
                    f" {bad.size} {tensor.qtype.name} field {field!r} are NaN or infinite, the"
                    f" first at index {list(map(int, np.argwhere(bad)[0]))}; check_tensors=False"
                    " loads it all the same"
                )


def place(tree: Any) -> Any:
    """Put every array of a tree on the default device."""
    return jax.tree.map(jax.device_put, tree)


def plain_if_f32(packed: Any) -> Any:
    """Return the array itself for F32 blocks, which it is already."""
    return packed.w if isinstance(packed, F32) else packed
