"""Weights in the blocks of a file, for tests of products with them, and what they mean."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql
from blocks import blocks_like, dequantize
from qllama_jax.quants import FORMATS
from qllama_jax.tensor_types import TensorType

PLAIN = [qtype for qtype in FORMATS if FORMATS[qtype].block_size == 1]
PACKED = [qtype for qtype in FORMATS if qtype not in PLAIN]

#: Error of a float32 sum of products over |a| |b|: four roundings of the size that products of
#: some 1,000 terms have. The result itself is typically 1/32 of |a| |b|, so this is 8e-6 of it.
FLOAT32 = 2.0**-22

#: Four tiles of 251 rows, the last of which starts a row early.
OUT, IN = 1003, 2048

multiply = jax.jit(ql.matmul, static_argnames="activations")


@functools.cache
def weight(
    qtype: TensorType, out: int = OUT, width: int = IN, seed: int = 0
) -> tuple[Any, np.ndarray]:
    """A weight of normal values, and what it means in float64."""
    rng = np.random.default_rng([seed, qtype.value])
    raw = blocks_like(rng.standard_normal((out, width), dtype=np.float32), qtype, rng)
    packed = jax.tree.map(jnp.asarray, FORMATS[qtype].from_bytes(raw))
    return packed, dequantize(raw, qtype).astype(np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_is_product(found: jax.Array, a: np.ndarray, b: np.ndarray) -> None:
    """Hold `found` against a @ b.T, a [*batch, n] and b [m, n], in float64."""
    wide = a.astype(np.float64)
    wanted = wide @ b.T
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    scale = np.linalg.norm(wide, axis=-1)[..., None] * np.linalg.norm(b, axis=-1)
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= FLOAT32 * scale).all()


def relative_error(found: jax.Array, wanted: np.ndarray) -> float:
    difference = np.asarray(found, np.float64) - wanted
    return float(np.sqrt((difference**2).sum() / (wanted**2).sum()))
