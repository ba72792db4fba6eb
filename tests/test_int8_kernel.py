"""The CPU's kernels multiply with a packed weight as they are defined to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import cpu_weights
import qllama_jax as ql
from blocks import BLOCK_SIZES, blocks_like, dequantize
from cpu_weights import (
    IN,
    check_zeros_and_what_is_not_finite,
    each_in_words,
    every_format,
    normal,
    on_device,
    relative_error,
    weight,
)
from qllama_jax.matmul import cpu
from qllama_jax.matmul.cpu import LAYOUTS, int8_kernel, processor, rounding
from qllama_jax.matmul.cpu.weight import WORD_LANES, lanes_of

pytestmark = pytest.mark.usefixtures("on_a_cpu", "without_a_matrix_unit")

multiply = jax.jit(ql.matmul, static_argnames="activations")
integer_product = jax.jit(int8_kernel.multiply, static_argnums=2)


@every_format
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (13,), (140,)], ids=str)
def test_a_float_product_is_that_of_the_dequantized_weight(name: str, batch: tuple[int, ...]):
    w, dense = weight(name)
    x = normal(*batch, IN)
    found = multiply(jnp.asarray(x), w)
    wanted = x.astype(np.float64) @ dense.T
    assert found.shape == wanted.shape
    scale = np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(dense, axis=-1)
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= 2.0**-22 * scale).all()


def assert_is_product_of_rounded(
    found: Any, x: np.ndarray, w: cpu.CPUWeight, dense: np.ndarray, *, with_residual: bool = False
):
    rounded = rounding.round_activations(jnp.asarray(x), w.layout, with_residual)
    wanted = np.asarray(rounded, np.float64) @ dense.T
    scale = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(dense, axis=-1)
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= 2.0**-21 * scale).all()


@each_in_words
@pytest.mark.parametrize("rows", [1, 4, 9, 40, 140])
@pytest.mark.parametrize("out", [7, 1000])
def test_int8_is_the_product_with_rounded_activations(name: str, rows: int, out: int):
    w, dense = weight(name, out)
    x = normal(rows, IN)
    for activations in ("int8", "int8x2"):
        found = multiply(jnp.asarray(x), w, activations=activations)
        assert_is_product_of_rounded(found, x, w, dense, with_residual=activations == "int8x2")


@each_in_words
@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("out", [7, 1000])
def test_a_weight_in_slabs_is_the_same_product(
    name: str, rows: int, out: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8_kernel, "WHOLE_SUMS", 0)
    w, dense = weight(name, out)
    x = normal(rows, IN)
    assert_is_product_of_rounded(cpu_weights.multiply(x, w, "int8"), x, w, dense)


@each_in_words
def test_a_row_in_four_streams_is_the_same_product(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor, "vendor", lambda: "GenuineIntel")
    w, dense = weight(name)
    x = normal(1, IN)
    assert_is_product_of_rounded(cpu_weights.multiply(x, w, "int8"), x, w, dense)


@pytest.mark.parametrize(("rows", "maker"), [(1, ""), (1, "GenuineIntel"), (4, ""), (40, "")])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 8, 12, 18])
def test_rows_meet_any_number_of_groups(
    groups: int, rows: int, maker: str, monkeypatch: pytest.MonkeyPatch
):
    # One, two and four streams: what is read side by side, and on two cores.
    monkeypatch.setattr(processor, "vendor", lambda: maker)
    w, dense = weight("Q4_1", 100, 32 * groups)
    np.testing.assert_array_equal(w.dequantize(), dense)
    x = normal(rows, 32 * groups)
    assert_is_product_of_rounded(cpu_weights.multiply(x, w, "int8"), x, w, dense)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("rows", [129, 300])
def test_rows_go_through_a_large_weight_in_parts(name: str, rows: int):
    # Twice 65 rows, one of them a filling; three times 100.
    w, dense = weight(name, 2048, 2048)
    assert int8_kernel.most_rows(w, with_residual=False, beside_bfloat16=False) >= rows
    x = normal(rows, 2048)
    found = multiply(jnp.asarray(x), w, activations="int8")
    assert_is_product_of_rounded(found, x, w, dense)


def test_rows_go_through_a_small_weight_in_parts():
    w, dense = weight("Q4_K")
    x = normal(140, IN)
    assert_is_product_of_rounded(integer_product(jnp.asarray(x), w, False), x, w, dense)


@pytest.mark.parametrize("activations", ["int8", "int8x2", "auto"])
def test_no_rows_give_no_rows(activations: Any):
    w, _ = weight("Q4_0")
    x = jnp.zeros((2, 0, IN))
    assert multiply(x, w, activations=activations).shape == (2, 0, 100)
    gradient = jax.grad(lambda x: ql.matmul(x, w, activations=activations).sum())(x)
    assert gradient.shape == x.shape


#: How far a format's integers lie from the one that the kernel takes out of them.
FARTHEST = {
    "Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16,
    "Q2_K": 3, "Q3_K": 4, "Q4_K": 8, "Q5_K": 16, "Q6_K": 32,
}  # fmt: skip


@each_in_words
def test_activations_are_rounded_to_steps_that_are_powers_of_two(name: str):
    layout, size = LAYOUTS[name], 16 if name in ("Q2_K", "Q3_K", "Q6_K") else 32
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, IN)) * 2.0 ** rng.integers(-60, 60, (64, 1))
    x[:8] = np.sign(x[:8]) * np.geomspace(1, 2, 8, endpoint=False)[:, None]
    x[8:16, ::7] *= 100
    x = x.astype(np.float32)
    magnitudes = np.abs(x.astype(np.float64)).reshape(64, -1, size)
    # A sum of int16 holds the largest integers of a group whatever their signs are; each may be
    # rounded up by a half.
    room = (2**15 - 1) // FARTHEST[name]
    limited = room < 256 * size
    largest = magnitudes.max(-1)
    if limited:
        largest = np.maximum(largest, magnitudes.sum(-1) * 256 / (room - size // 2))
    step = 2.0 ** (np.floor(np.log2(largest))[..., None] - 7)
    wanted = step * np.rint(x.astype(np.float64).reshape(64, -1, size) / step)
    found = np.asarray(rounding.round_activations(jnp.asarray(x), layout, with_residual=False))
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
    np.testing.assert_array_equal(found.astype(jnp.bfloat16).astype(np.float32), found)
    if limited:
        assert (np.abs(wanted / step).sum(-1) <= room).all()


@each_in_words
def test_activations_of_any_size_are_rounded_or_nan(name: str):
    # Steps are 2**-126 at least, as XLA on a CPU has no subnormal numbers; and of the largest there
    # may be no sum in float32.
    x = 2.0 ** np.r_[-149:-100, 100:128][:, None] * np.sign(normal(IN))
    x = x.astype(np.float32)
    for with_residual in (False, True):
        found = rounding.round_activations(jnp.asarray(x), LAYOUTS[name], with_residual)
        found = np.asarray(found, np.float64)
        error = np.abs(found - x)
        assert (np.isnan(found) | (error <= np.maximum(2.0**-126, np.abs(x) / 60))).all()
        assert not np.isnan(found[np.abs(x) <= 2.0**122]).any()
        assert found[-40:].all()


@each_in_words
def test_no_sum_of_tiny_activations_overflows(name: str):
    raw = farthest_blocks(name, WORD_LANES, IN)
    w, dense = on_device(name, raw), dequantize(raw, QType[name]).astype(np.float64)
    x = np.repeat(np.geomspace(2.0**-120, 2.0**-112, 64)[:, None], IN, axis=1).astype(np.float32)
    most = np.abs(x).astype(np.float64) @ np.abs(dense.T)
    found = np.asarray(integer_product(jnp.asarray(x), w, False), np.float64)
    assert (np.abs(found - x.astype(np.float64) @ dense.T) <= 0.02 * most + 2.0**-118).all()


@each_in_words
def test_int8_loses_half_a_percent_and_int8x2_a_hundred_times_less(name: str):
    w, dense = weight(name)
    x = normal(5, IN)
    wanted = x.astype(np.float64) @ dense.T
    int8 = relative_error(multiply(jnp.asarray(x), w, activations="int8"), wanted)
    int8x2 = relative_error(multiply(jnp.asarray(x), w, activations="int8x2"), wanted)
    # 127 steps to the largest of each 32 values, as ggml has them, would lose 0.0053 of any.
    assert 0.003 <= int8 <= {8: 0.0045, 16: 0.005, 32: 0.0056}[max(8, FARTHEST[name])]
    assert int8x2 <= int8 / 100
    np.testing.assert_array_equal(
        multiply(jnp.asarray(x), w, activations="auto"),
        multiply(jnp.asarray(x), w, activations="int8"),
    )


def farthest_blocks(name: str, out: int, width: int) -> np.ndarray:
    """Weights whose integers are as far from their middle as the format has them."""
    size, nbytes = BLOCK_SIZES[QType[name]]
    rng = np.random.default_rng(0)
    values = np.full((out, width), -1.0, np.float32)
    raw = blocks_like(values, QType[name], rng)
    # q = 0, and 3 where the middle is 0; scales as they were.
    farthest = 0xFF if name == "Q2_K" else 0
    extreme = np.full((out, width // size, nbytes), farthest, np.uint8)
    template = raw.reshape(extreme.shape)
    scale_bytes = {
        "Q4_0": [0, 1], "Q4_1": [0, 1, 2, 3], "Q5_0": [0, 1], "Q5_1": [0, 1, 2, 3],
        "Q2_K": [*range(16), *range(80, 84)], "Q3_K": range(96, 110), "Q4_K": range(16),
        "Q5_K": range(16), "Q6_K": range(192, 210),
    }[name]  # fmt: skip
    extreme[..., list(scale_bytes)] = template[..., list(scale_bytes)]
    return extreme.reshape(out, -1)


@each_in_words
@pytest.mark.parametrize("with_residual", [False, True])
def test_no_sum_overflows_where_all_weights_and_activations_are_extreme(
    name: str, with_residual: bool
):
    """|x| as large everywhere as it gets, q at its farthest: the sums that int16 must hold."""
    raw = farthest_blocks(name, WORD_LANES, IN)
    w, dense = on_device(name, raw), dequantize(raw, QType[name]).astype(np.float64)
    # Just below a power of two of steps sums are the largest, and residuals near half a step: some
    # of these are near both.
    x = np.repeat(np.geomspace(1, 2, 256, dtype=np.float32)[:, None], IN, axis=1)
    x[::2] *= normal(IN) * 0.01 + 1
    x = np.concatenate([x, -x])
    wanted = x.astype(np.float64) @ dense.T
    found = np.asarray(integer_product(jnp.asarray(x), w, with_residual), np.float64)
    most = np.abs(x) @ np.abs(dense.T)
    assert (np.abs(found - wanted) <= (2e-4 if with_residual else 0.016) * most).all()


@each_in_words
@pytest.mark.parametrize("activations", ["int8", "int8x2"])
def test_zeros_give_zeros_and_what_is_not_finite_never_looks_finite(name: str, activations: str):
    product = functools.partial(multiply, activations=activations)
    check_zeros_and_what_is_not_finite(weight(name)[0], 4, product)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_many_rows_of_half_floats_are_few_rows(dtype: Any):
    w, _ = weight("Q6_K")
    assert int8_kernel.most_rows(w, with_residual=False, beside_bfloat16=False) < 300
    x = jnp.asarray(normal(300, IN), dtype)
    alone = np.asarray(multiply(x[:1], w, activations="int8"))
    found = np.asarray(multiply(x, w, activations="int8"))
    assert alone.dtype == found.dtype == dtype
    wanted = alone.astype(np.float64)
    # A result may be rounded to the number beside it; weights in half floats make a mean of 4e-4.
    assert relative_error(found[:1], wanted) <= 1e-4


@each_in_words
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str):
    w, _ = weight(name)
    x = normal(200, IN)
    x[1] *= 1000
    alone = np.asarray(multiply(jnp.asarray(x[:1]), w, activations="int8"))
    for rows in (2, 9, 200):
        found = np.asarray(multiply(jnp.asarray(x[:rows]), w, activations="int8"))
        assert np.abs(found[:1] - alone).max() <= 2e-6 * np.abs(alone).max()


@every_format
@pytest.mark.parametrize("activations", ["float", "int8", "int8x2"])
def test_the_gradient_is_that_of_the_exact_product(name: str, activations: Any):
    w, dense = weight(name)
    x, g = jnp.asarray(normal(3, IN)), normal(3, 100)
    gradient = jax.grad(lambda x: (ql.matmul(x, w, activations=activations) * g).sum())(x)
    assert relative_error(gradient, g.astype(np.float64) @ dense) <= 1e-6


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_a_product_under_vmap_is_that_of_each(name: str):
    w, dense = weight(name)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    assert stacked.shape == (2, 100, IN)
    x = normal(2, 3, IN)
    found = jax.jit(jax.vmap(functools.partial(ql.matmul, activations="auto")))(
        jnp.asarray(x), stacked
    )
    assert relative_error(found, x.astype(np.float64) @ dense.T) <= 0.007


def temporary_bytes(name: str, rows: int, tiles: int, activations: str) -> int:
    shape = (rows, IN, tiles)
    return cpu_weights.temporary_bytes(multiply, name, shape, activations=activations)


@every_format
@pytest.mark.parametrize("rows", [1, 4, 140])
def test_no_weight_is_held_dense(name: str, rows: int):
    tiles = 512
    dense = 4 * IN * tiles * lanes_of(name)
    output = 4 * rows * tiles * lanes_of(name)
    assert temporary_bytes(name, rows, tiles, "auto") - output <= dense / 3


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q3_K", "Q4_K", "Q6_K"])
@pytest.mark.parametrize(("activations", "rows"), [("int8", 1), ("int8x2", 1), ("int8x2", 4)])
def test_sums_of_integers_are_stored_in_16_bits_alone(name: str, activations: str, rows: int):
    tiles = 128
    residuals = 2 if activations == "int8x2" else 1
    groups = IN // LAYOUTS[name].group
    plane = 2 * groups * tiles * WORD_LANES
    # Sums of up to eight groups in float32 are a quarter of those in 16 bits; a copy of these in
    # float32 would be twice as much. XLA copies the two words of fifth bits, of which it takes 32.
    copied = 2 if name.startswith("Q5") else 0
    assert (
        temporary_bytes(name, rows, tiles, activations) <= (1.3 * rows * residuals + copied) * plane
    )
