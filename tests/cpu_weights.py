"""Weights packed for a CPU, for tests of its kernels, and what they mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import blocks_like, dequantize, random_blocks
from qllama_jax.matmul.cpu import LAYOUTS, CPUWeight, pack
from qllama_jax.matmul.cpu.weight import WORD_LANES, lanes_of

#: Formats that have an integer kernel.
IN_WORDS = [name for name in LAYOUTS if LAYOUTS[name].words]

every_format = pytest.mark.parametrize("name", list(LAYOUTS))
each_in_words = pytest.mark.parametrize("name", IN_WORDS)

OUT, IN = 100, 1024


def on_device(name: str, raw: np.ndarray) -> CPUWeight:
    return jax.tree.map(jnp.asarray, pack(name, raw))


@functools.cache
def weight(name: str, out: int = OUT, width: int = IN) -> tuple[CPUWeight, np.ndarray]:
    """A weight of normal values, and what it means in float64."""
    rng = np.random.default_rng(out)
    raw = blocks_like(rng.standard_normal((out, width), dtype=np.float32), QType[name], rng)
    return on_device(name, raw), dequantize(raw, QType[name]).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def multiply(x: Any, w: Any, activations: str) -> np.ndarray:
    """The product by the kernel that the processor, as a test has it, is given now."""
    # A function of its own each time: a trace of the same would keep its choice of a kernel.
    return np.asarray(jax.jit(lambda x, w: ql.matmul(x, w, activations=activations))(x, w))  # pyright: ignore[reportArgumentType]


def takes_bfloat16(w: CPUWeight, rows: int, activations: str) -> bool:
    x = normal(rows, w.shape[-1])
    jaxpr = jax.make_jaxpr(lambda x: ql.matmul(x, w, activations=activations))(x)  # pyright: ignore[reportArgumentType]
    return "bf16" in str(jaxpr)


def relative_error(found: Any, wanted: np.ndarray) -> float:
    difference = np.asarray(found, np.float64) - wanted
    return float(np.sqrt((difference**2).sum() / (wanted**2).sum()))


def check_zeros_and_what_is_not_finite(
    w: CPUWeight, rows: int, multiply: Callable[[np.ndarray, CPUWeight], Any]
) -> None:
    """Zeros give zeros, and what is not finite never looks finite."""
    x = normal(rows, w.shape[-1])
    x[0], x[1, 5], x[2, 70] = 0, np.nan, np.inf
    found = np.asarray(multiply(x, w))
    assert not found[0].any()
    assert not np.isfinite(found[1]).any()
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(found[3:]).all()


#: Bits of half floats that are no numbers. Of NaN all patterns: an integer that is rounded up may
#: become that of a number.
NOT_FINITE = [0x7C00, 0x7C01, 0x7DFF, 0x7E00, 0x7FFF, 0xFC00, 0xFFFF]


def check_a_scale_that_is_not_finite(bits: int, rows: int, width: int, activations: str) -> None:
    """It never makes a number."""
    raw = np.array(blocks_like(normal(WORD_LANES, width), QType.Q4_0, np.random.default_rng(0)))
    raw[1, 18:20] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
    found = multiply(normal(rows, width), on_device("Q4_0", raw), activations)
    assert not np.isfinite(found[:, 1]).any()
    assert np.isfinite(np.delete(found, 1, axis=1)).all()


def temporary_bytes(multiply: Any, name: str, shape: tuple[int, int, int], **options: Any) -> int:
    """What `multiply`, jitted, takes; shape: (rows of x, inputs, tiles of the weight)."""
    rows, width, tiles = shape
    lanes = lanes_of(name)
    one = pack(name, random_blocks(QType[name], (lanes, width), np.random.default_rng(0)))
    w = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], tiles, *leaf.shape[2:]), leaf.dtype), one
    ).replace(out=tiles * lanes)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    memory = multiply.lower(x, w, **options).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
