"""Products of many rows by dequantized tiles, in bfloat16 where a processor multiplies that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_weights
import qllama_jax as ql
from cpu_weights import (
    IN_WORDS,
    NOT_FINITE,
    check_a_scale_that_is_not_finite,
    check_zeros_and_what_is_not_finite,
    normal,
    relative_error,
    takes_bfloat16,
    weight,
)
from qllama_jax.matmul.cpu import processor, tiles
from qllama_jax.matmul.cpu.weight import WORD_LANES

pytestmark = pytest.mark.usefixtures("on_a_cpu", "with_bfloat16")
each_in_words = pytest.mark.parametrize("name", IN_WORDS)
IN = 512


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16 in vectors; any other does it too, only slower."""
    monkeypatch.setattr(processor, "instructions", lambda: frozenset({"avx512f", "avx512_bf16"}))


def multiply(x: Any, w: Any, activations: str = "auto") -> np.ndarray:
    return cpu_weights.multiply(x, w, activations)


def rounded(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


@each_in_words
@pytest.mark.parametrize("out", [7, 1500])  # one tile with fillings; several, the last repeats rows
def test_the_product_is_that_of_both_rounded(name: str, out: int):
    w, dense = weight(name, out, IN)
    x = normal(100, IN)
    scale = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(dense, axis=-1)
    found = multiply(x, w)
    assert found.dtype == np.float32
    assert (np.abs(found - rounded(x) @ rounded(dense).T) <= 2.0**-21 * scale).all()


@each_in_words
def test_less_is_lost_than_by_activations_of_eight_bits(name: str):
    w, dense = weight(name, 1000, IN)
    x = normal(100, IN)
    wanted = x.astype(np.float64) @ dense.T
    assert relative_error(multiply(x, w), wanted) <= 0.0026
    assert relative_error(multiply(x, w, "int8"), wanted) >= 0.003


@pytest.mark.parametrize(("name", "most"), [("Q4_0", 24), ("Q4_K", 24), ("Q6_K", 24), ("Q5_0", 16)])
def test_only_many_rows_of_auto_and_a_processor_that_multiplies_it_take_bfloat16(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    w, _ = weight(name, 100, IN)
    assert takes_bfloat16(w, most + 1, "auto")
    assert not takes_bfloat16(w, most, "auto")
    for activations in ("float", "int8", "int8x2"):
        assert not takes_bfloat16(w, 300, activations)
    monkeypatch.setattr(processor, "instructions", lambda: frozenset({"avx2", "avx512f"}))
    assert not takes_bfloat16(w, 300, "auto")


@pytest.mark.parametrize("name", ["Q8_0", "F16", "BF16"])
def test_weights_of_eight_and_sixteen_bits_meet_exact_activations(name: str):
    w, dense = weight(name, 100, IN)
    x = normal(100, IN)
    scale = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(dense, axis=-1)
    assert (np.abs(multiply(x, w) - x.astype(np.float64) @ dense.T) <= 2.0**-21 * scale).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_floats_come_back_as_they_were(dtype: Any):
    w, dense = weight("Q4_K", 100, IN)
    x = jnp.asarray(normal(100, IN), dtype)
    found = multiply(x, w)
    assert found.dtype == dtype
    wanted = rounded(np.asarray(x, np.float64)) @ rounded(dense).T
    assert relative_error(found.astype(np.float64), wanted) <= 0.003


@each_in_words
def test_zeros_give_zeros_and_what_is_not_finite_never_looks_finite(name: str):
    check_zeros_and_what_is_not_finite(weight(name, 100, IN)[0], 100, multiply)


@pytest.mark.parametrize("bits", NOT_FINITE, ids=hex)
def test_a_scale_that_is_not_finite_never_makes_a_number(bits: int):
    check_a_scale_that_is_not_finite(bits, 100, IN, "auto")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_gradient_is_that_of_the_exact_product(dtype: Any):
    w, dense = weight("Q4_K", 1500, IN)
    g = normal(100, 1500)
    x = jnp.asarray(normal(100, IN), dtype)

    def loss(x: jax.Array) -> jax.Array:
        return (ql.matmul(x, w, activations="auto").astype(jnp.float32) * g).sum()

    gradient = jax.grad(loss)(x)
    assert gradient.dtype == dtype
    wanted = g.astype(np.float64) @ dense
    # What comes back to a product in half floats is in half floats.
    bound = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[np.dtype(dtype).name]
    assert relative_error(np.asarray(gradient, np.float64), wanted) <= bound


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_no_weight_is_held_dense(name: str):
    rows, out = 100, 2048 * WORD_LANES
    product = jax.jit(lambda x, w: ql.matmul(x, w, activations="auto"))
    taken = cpu_weights.temporary_bytes(product, name, (rows, IN, 2048))
    assert taken - 4 * rows * out <= 8 * tiles.MOST_ROWS * IN


@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("width", [576, 2048, 5632, 28_672])
def test_tiles_are_those_of_a_fast_product_and_repeat_few_rows(width: int, lanes: int):
    for rows in [*range(lanes, 8192, lanes), 32_000, 128_256]:
        size = tiles.tile_rows(rows, width, lanes)
        count = -(-rows // size)
        assert size % (128 if rows >= 1024 else lanes) == 0
        assert size <= min(rows, 512)
        assert size * width <= 2**21 or size == 128
        assert count > 1 or rows == lanes
        repeated = count * size - rows
        assert repeated <= max(2 * lanes, rows / 4)


def test_a_wide_tile_is_the_same_rows_and_is_cut_no_further():
    first, count = WORD_LANES, 3 * WORD_LANES
    w, dense = weight("Q4_K", 5 * WORD_LANES, IN)
    part = w.slice_rows(jnp.int32(first), count)
    assert part.shape == (count, IN)
    np.testing.assert_array_equal(part.dequantize(), dense[first : first + count])
    rows = np.array([0, WORD_LANES + 1, count - 1])
    np.testing.assert_array_equal(part.dequantize_rows(jnp.asarray(rows)), dense[first + rows])
    with pytest.raises(ValueError, match="one tile already"):
        part.slice_rows(jnp.int32(0), WORD_LANES)
