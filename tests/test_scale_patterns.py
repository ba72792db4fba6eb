"""All 65,536 patterns of a 16-bit scale or weight mean the same packed for a CPU as in the file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import dequantize, random_blocks
from qllama_jax.matmul.cpu import LAYOUTS, CPUWeight, pack, rounding
from qllama_jax.quants import FORMATS

PATTERNS = 2**16
PARTS = 8

multiply = jax.jit(ql.matmul, static_argnames="activations")


def sixteen_bit_fields(name: str) -> list[str]:
    layout = FORMATS[QType[name]].layout
    return [field for field in layout.names or () if layout[field].str in ("<f2", "<u2")]


FIELDS = [(name, field) for name in LAYOUTS for field in sixteen_bit_fields(name)]
each_field = pytest.mark.parametrize(("name", "field"), FIELDS)


@functools.cache
def blocks_of_every_pattern(name: str, field: str) -> np.ndarray:
    """Raw rows, of a block or of 32 numbers each, that have the field's patterns in any order."""
    rng = np.random.default_rng([len(name), len(field)])
    block = FORMATS[QType[name]]
    width = max(block.block_size, 32)
    count = PATTERNS * block.block_size // width if block.block_size == 1 else PATTERNS
    raw = random_blocks(QType[name], (count, width), rng)
    patterns = rng.permutation(PATTERNS).astype("<u2").view(block.layout[field])
    blocks = raw.view(block.layout)
    blocks[field] = patterns.reshape(blocks.shape)
    return blocks.view(np.uint8).reshape(count, -1)


def parts(name: str, field: str) -> Iterator[tuple[CPUWeight, np.ndarray]]:
    """Packed weights, and what gguf-py says of the same bytes."""
    for raw in np.split(blocks_of_every_pattern(name, field), PARTS):
        with np.errstate(all="ignore"):
            yield jax.tree.map(jnp.asarray, pack(name, raw)), dequantize(raw, QType[name])


@jax.jit
def dequantized(w: Any) -> jax.Array:
    return w.dequantize()


@each_field
def test_a_packed_weight_of_any_scale_dequantizes_to_the_bits_of_gguf_py(name: str, field: str):
    seen = 0
    for w, wanted in parts(name, field):
        found, nan = np.asarray(dequantized(w)), np.isnan(wanted)
        np.testing.assert_array_equal(np.isnan(found), nan)
        np.testing.assert_array_equal(found.view("u4")[~nan], wanted.view("u4")[~nan])
        seen += int(nan.any(axis=1).sum())
    assert seen >= 32  # the patterns that are NaN; infinity times zero is NaN too


@pytest.mark.parametrize(
    ("name", "field", "activations"),
    [(*pair, "float") for pair in FIELDS]
    + [(*pair, "int8") for pair in FIELDS if LAYOUTS[pair[0]].words],
)
def test_its_product_is_exact_or_not_finite(name: str, field: str, activations: str):
    """Also where the scale is subnormal; and where it is NaN or infinite no product is a number."""
    for w, dense in parts(name, field):
        x = np.random.default_rng(0).standard_normal((2, dense.shape[1]), np.float32)
        found = np.asarray(multiply(jnp.asarray(x), w, activations=activations), np.float64)
        if activations == "int8":
            x = rounding.round_activations(jnp.asarray(x), w.layout, with_residual=False)
        finite = np.isfinite(dense).all(axis=1)
        assert not np.isfinite(found[:, ~finite]).any()
        exact, dense = np.asarray(x, np.float64), dense[finite].astype(np.float64)
        # A minimum may take away most of what the scale adds, so the largest weight says how large
        # the parts may be; a sum of bfloat16 numbers may be too large for float32.
        most = np.abs(exact).sum(axis=1)[:, None] * np.abs(dense).max(axis=1)
        holds = most < 1e38
        assert holds.mean() > 0.25
        # 2**-100: XLA on a CPU takes subnormal factors and sums for zero.
        error = np.abs(found[:, finite] - exact @ dense.T)[holds]
        assert (error <= 2.0**-21 * most[holds] + 2.0**-100).all()
