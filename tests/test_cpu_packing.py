"""A weight packed for a CPU is the same weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import dequantize, random_blocks
from cpu_weights import (
    IN,
    each_in_words,
    every_format,
    on_device,
    weight,
)
from qllama_jax.matmul.cpu import can_pack
from qllama_jax.matmul.cpu.weight import WORD_LANES, lanes_of

pytestmark = pytest.mark.usefixtures("on_a_cpu", "without_a_matrix_unit")

multiply = jax.jit(ql.matmul, static_argnames="activations")


@every_format
@pytest.mark.parametrize("out", [1, 16, 32, 37])
def test_a_packed_weight_dequantizes_to_the_bits_of_gguf_py(name: str, out: int):
    raw = random_blocks(QType[name], (out, IN), np.random.default_rng(out))
    w = on_device(name, raw)
    wanted = dequantize(raw, QType[name])
    assert w.shape == (out, IN)
    np.testing.assert_array_equal(jax.jit(lambda w: w.dequantize())(w), wanted)
    np.testing.assert_array_equal(jax.jit(lambda w: w.dequantize_transposed())(w), wanted.T)


@every_format
def test_rows_looked_up_are_the_dequantized_rows(name: str):
    w, dense = weight(name)
    rows = np.array([[3, 99, 0], [16, 15, 3]], np.int32)
    found = jax.jit(lambda w, rows: w.dequantize_rows(rows))(w, jnp.asarray(rows))
    np.testing.assert_array_equal(found, dense[rows])


@every_format
def test_packing_takes_no_more_bytes_than_its_scales_need(name: str):
    rows, width = 4 * lanes_of(name), 2048
    raw = random_blocks(QType[name], (rows, width), np.random.default_rng(0))
    grows = {"Q2_K": 16, "Q3_K": 4, "Q4_K": 4, "Q5_K": 4}.get(name, 0)  # bytes a super-block
    assert on_device(name, raw).nbytes == raw.nbytes + rows * width // 256 * grows


@each_in_words
def test_scales_that_are_summed_together_are_one_run_of_memory(name: str):
    w, _ = weight(name, WORD_LANES, 2048)
    groups = 2048 // w.layout.group
    assert w.scale.shape == (groups // 8, 1, 8, WORD_LANES)
    assert w.minimum is None or w.minimum.shape == w.scale.shape


@pytest.mark.parametrize(("groups", "together"), [(1, 1), (18, 3), (48, 8), (64, 8), (344, 4)])
def test_a_row_has_an_even_number_of_such_runs_where_it_can(groups: int, together: int):
    w, _ = weight("Q4_1", WORD_LANES, 32 * groups)
    assert w.scale.shape == (groups // together, 1, together, WORD_LANES)


def test_only_rows_of_whole_groups_can_be_packed():
    assert can_pack("F16", 64)
    assert not can_pack("F16", 48)
    assert not can_pack("IQ4_NL", 64)


def test_no_packed_format_is_taken_for_another_with_the_same_arrays():
    (first, dense), (second, other) = weight("F16"), weight("Q4_1")
    (third, more) = weight("Q5_1")
    for w, wanted in ((first, dense), (second, other), (third, more)):
        np.testing.assert_array_equal(multiply(jnp.eye(IN), w).T, wanted.astype(np.float32))
    assert jax.tree.structure(second) != jax.tree.structure(third)


def test_repr_tells_the_size_or_shows_leaves_that_are_numbers():
    w, _ = weight("Q4_0")
    assert repr(w) == f"CPUWeight(Q4_0, shape=(100, {IN}), nbytes={w.nbytes})"
    assert repr(jax.tree.map(lambda leaf: np.uint8(7), w)) == "CPUWeight(Q4_0, np.uint8(7))"
