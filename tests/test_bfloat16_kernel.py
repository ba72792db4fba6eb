"""Products of many rows on a CPU with a matrix unit; what the processor is said to have decides.

The code is the same on every CPU, which multiplies bfloat16 one way or another: only slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
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
)
from qllama_jax.matmul.cpu import CPUWeight, int8_kernel, processor, rounding
from qllama_jax.matmul.cpu.processor import family, instructions, vendor
from qllama_jax.matmul.cpu.weight import lanes_of

pytestmark = pytest.mark.usefixtures("on_a_cpu")
each_in_words = pytest.mark.parametrize("name", IN_WORDS)
IN = 512
MATRIX_UNIT = ("avx512f", "amx_bf16")

SetInstructions = Callable[..., None]


@pytest.fixture(autouse=True)
def set_instructions(monkeypatch: pytest.MonkeyPatch) -> SetInstructions:
    """Function: names of instruction sets -> None; called with a matrix unit's before each test."""

    def set_them(*names: str) -> None:
        monkeypatch.setattr(processor, "instructions", lambda: frozenset(names))

    set_them(*MATRIX_UNIT)
    return set_them


def weight(name: str, out: int = 100, width: int = IN) -> tuple[CPUWeight, np.ndarray]:
    return cpu_weights.weight(name, out, width)


def multiply(x: Any, w: CPUWeight, activations: str = "int8") -> np.ndarray:
    return cpu_weights.multiply(x, w, activations)


def takes_bfloat16(name: str, rows: int, activations: str = "int8") -> bool:
    return cpu_weights.takes_bfloat16(weight(name, 16)[0], rows, activations)


@each_in_words
@pytest.mark.parametrize("activations", ["int8", "int8x2"])
@pytest.mark.parametrize("out", [7, 1000])  # one tile with fillings; two, the second repeats rows
def test_the_product_is_that_with_rounded_activations(name: str, activations: str, out: int):
    w, dense = weight(name, out)
    x = normal(300, IN)
    rounded = rounding.round_activations(jnp.asarray(x), w.layout, activations == "int8x2")
    wanted = np.asarray(rounded, np.float64) @ dense.T
    found = multiply(x, w, activations)
    assert found.dtype == np.float32
    # At the worst 2^-16, what a weight's low half is rounded by; of so many terms of either sign
    # half of it.
    scale = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(dense, axis=-1)
    error = np.abs(found - wanted)
    assert (error <= 2.0**-17 * scale).all()
    # Two products, and not one, whose error is a hundred times that.
    assert np.sqrt((error**2).sum() / (wanted**2).sum()) <= 1e-5


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_a_single_term_is_within_its_bound(name: str):
    w, dense = weight(name)
    x = np.zeros((IN, IN), np.float32)
    np.fill_diagonal(x, np.linspace(1, 2, IN))
    rounded = rounding.round_activations(jnp.asarray(x), w.layout, with_residual=False)
    wanted = np.asarray(rounded, np.float64) @ dense.T
    assert (np.abs(multiply(x, w) - wanted) <= 2.0**-16 * np.abs(wanted)).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q5_K"])
def test_only_many_rows_and_a_matrix_unit_take_it(name: str, set_instructions: SetInstructions):
    assert takes_bfloat16(name, 300)
    assert takes_bfloat16(name, 300, "int8x2")
    assert not takes_bfloat16(name, 300, "float")
    assert not takes_bfloat16(name, 8)
    assert takes_bfloat16(name, 25)
    for others in ((), ("avx2",), ("avx512f", "avx512_bf16")):
        set_instructions(*others)
        assert not takes_bfloat16(name, 300)


def test_a_processor_with_faster_tiles_leaves_the_integer_kernel_earlier(
    set_instructions: SetInstructions,
):
    weights = [weight("Q4_0", 2048, 2048)[0], weight("Q4_K", 16)[0], weight("Q6_K", 16)[0]]
    weights.append(weight("Q5_0", 16)[0])

    def most(beside_bfloat16: bool, with_residual: bool = False) -> list[int]:
        options = {"with_residual": with_residual, "beside_bfloat16": beside_bfloat16}
        return [int8_kernel.most_rows(w, **options) for w in weights]

    for names, limits in (((), [sys.maxsize, 128, 24, 16]), (("avx512f",), [64, 64, 24, 16])):
        set_instructions(*names)
        assert most(False) == limits
        assert most(True) == [24, 24, 24, 16]
        assert most(False, with_residual=True) == most(True, with_residual=True) == [8] * 4


@each_in_words
def test_zeros_give_zeros_and_what_is_not_finite_never_looks_finite(name: str):
    check_zeros_and_what_is_not_finite(weight(name)[0], 300, multiply)


@each_in_words
def test_many_rows_are_few_rows_but_for_the_halves_rounding(name: str):
    """What a prompt makes of a token and what a decoding step makes of it."""
    w, _ = weight(name)
    x = normal(300, IN)
    x[1] *= 1000
    alone, found = multiply(x[:1], w), multiply(x, w)
    assert np.abs(found[:1] - alone).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_many_rows_of_half_floats_are_few_rows(dtype: Any):
    w, _ = weight("Q4_K")
    x = jnp.asarray(normal(300, IN), dtype)
    alone, found = multiply(x[:1], w), multiply(x, w)
    assert alone.dtype == found.dtype == dtype
    difference = found[:1].astype(np.float64) - alone.astype(np.float64)
    # A result may be rounded to the number beside it; one that loses x's rounding is off by 4e-3.
    assert np.sqrt((difference**2).mean()) <= 2e-4 * np.sqrt((alone.astype(np.float64) ** 2).mean())


@pytest.mark.parametrize("bits", NOT_FINITE, ids=hex)
def test_a_scale_that_is_not_finite_never_makes_a_number(bits: int):
    check_a_scale_that_is_not_finite(bits, 300, IN, "int8")


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_no_weight_is_held_dense(name: str):
    rows, tiles = 300, 2048
    product = jax.jit(lambda x, w: ql.matmul(x, w, activations="int8"))
    taken = cpu_weights.temporary_bytes(product, name, (rows, IN, tiles))
    # Two halves of a tile, and its 16-bit words once for each weight.
    assert taken - 4 * rows * tiles * lanes_of(name) <= 4 * IN * tiles * lanes_of(name) / 3


def test_the_gradient_is_that_of_the_exact_product():
    w, dense = weight("Q4_K")
    g = normal(300, 100)
    x = jnp.asarray(normal(300, IN))
    gradient = jax.grad(lambda x: (ql.matmul(x, w, activations="int8") * g).sum())(x)
    wanted = g.astype(np.float64) @ dense
    assert np.abs(gradient - wanted).max() <= 1e-5 * np.abs(wanted).max()


INTEL = (
    "vendor_id\t: GenuineIntel\ncpu family\t: 6\nfpu\t: yes\nflags\t: fpu avx2\n"
    "vmx flags\t: vnmi\n\nflags\t: fpu\n"
)


@pytest.mark.parametrize(
    ("text", "maker", "generation", "names"),
    [
        (INTEL, "GenuineIntel", 6, "fpu avx2"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "", 0, ""),
        ("vendor_id\ncpu family\nflags\n", "", 0, ""),
        ("", "", 0, ""),
        (None, "", 0, ""),
    ],
    ids=["x86", "arm", "no colon", "empty", "no file"],
)
def test_a_processor_is_what_linux_says(
    tmp_path: Path, text: str | None, maker: str, generation: int, names: str
):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert instructions(path) == frozenset(names.split())
    assert vendor(path) == maker
    assert family(path) == generation
