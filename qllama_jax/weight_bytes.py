"""A file's tensor table -> bytes of its weights in memory, before any of them is read."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
from gguf import GGMLQuantizationType

from qllama_jax.matmul import cpu
from qllama_jax.matmul.cpu.layouts import GROUP
from qllama_jax.matmul.cpu.weight import lanes_of
from qllama_jax.tensor_file import GGUFFile, GGUFTensor
from qllama_jax.tensor_reader import Layout
from qllama_jax.tensor_types import BLOCK_SIZES


def weight_bytes(file: GGUFFile, layout: Layout) -> int:
    """Return the bytes that `load` makes of the tensors, as `TensorReader` arranges them."""
    packs = layout == "auto" and jax.default_backend() == "cpu"
    # Rows of it are looked up; where it serves as output too, it is multiplied with.
    tables = {"token_embd.weight"} if "output.weight" in file.tensors else set()
    return sum(
        _bytes(tensor, packs and name not in tables) for name, tensor in file.tensors.items()
    )


def _bytes(tensor: GGUFTensor, packs: bool) -> int:
    width, *rows = tensor.shape
    if not rows:  # a vector, float32 whatever it is in the file
        return 4 * width
    if not (packs and cpu.can_pack(tensor.qtype.name, width)):
        return tensor.nbytes
    out, *experts = rows
    tiles = math.prod(experts) * -(-out // lanes_of(tensor.qtype.name))
    unit, unit_bytes = _tile_unit(tensor.qtype.name)
    return tiles * (width // unit) * unit_bytes


@functools.cache
def _tile_unit(format: str) -> tuple[int, int]:
    """Return the fewest weights a row that can be packed, and the bytes of a tile of them."""
    block, block_bytes = BLOCK_SIZES[GGMLQuantizationType[format]]
    unit = max(block, GROUP)
    packed = cpu.pack(format, np.zeros((lanes_of(format), unit // block * block_bytes), np.uint8))
    return unit, packed.nbytes
