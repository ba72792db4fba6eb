"""Weights packed for a CPU, for tests of its kernels, and what they mean."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as QType

from blocks import blocks_like, dequantize, random_blocks
from qllama_jax.matmul.cpu import LAYOUTS, CPUWeight, pack
from qllama_jax.matmul.cpu.weight import LANES

#: Formats that have an integer kernel.
IN_WORDS = [name for name in LAYOUTS if LAYOUTS[name].words]


def on_device(name: str, raw: np.ndarray) -> CPUWeight:
    return jax.tree.map(jnp.asarray, pack(name, raw))


@functools.cache
def weight(name: str, out: int, width: int) -> tuple[CPUWeight, np.ndarray]:
    """A weight of normal values, and what it means in float64."""
    rng = np.random.default_rng(out)
    raw = blocks_like(rng.standard_normal((out, width), dtype=np.float32), QType[name], rng)
    return on_device(name, raw), dequantize(raw, QType[name]).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def temporary_bytes(multiply: Any, name: str, shape: tuple[int, int, int], **options: Any) -> int:
    """What `multiply`, jitted, takes; shape: (rows of x, inputs, tiles of the weight)."""
    rows, width, tiles = shape
    one = pack(name, random_blocks(QType[name], (LANES, width), np.random.default_rng(0)))
    w = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], tiles, *leaf.shape[2:]), leaf.dtype), one
    ).replace(out=tiles * LANES)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    memory = multiply.lower(x, w, **options).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
