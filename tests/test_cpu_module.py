"""What XLA makes of the CPU's kernels: the forms that it vectorizes, of which no result tells.

Each of these conditions, where it did not hold, cost two to a hundred times the speed.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import random_blocks
from cpu_weights import IN_WORDS
from qllama_jax.matmul import Activations, matmul_expert
from qllama_jax.matmul.cpu import LAYOUTS, compiler_options, pack, processor
from qllama_jax.matmul.cpu.fence import BARRIER_HOLDS
from qllama_jax.matmul.cpu.int8_kernel import WHOLE_SUMS
from qllama_jax.matmul.cpu.tiles import tile_rows
from qllama_jax.matmul.cpu.weight import lanes_of
from qllama_jax.sampling import sample

pytestmark = pytest.mark.usefixtures("on_a_cpu")
NUMBERS = [name for name in LAYOUTS if not LAYOUTS[name].words]
# Multiplications in a format's integer products: one a bit, of all words with a field there.
OPERATIONS = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 4),
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 16),
    **{"Q2_K": 8, "Q3_K": 8, "Q6_K": 4},
}
# An instruction of a module's text: its type, its sizes, its operation.
INSTRUCTION = re.compile(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")


@pytest.fixture(autouse=True)
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16 in vectors, so that these tests are the same on all."""
    monkeypatch.setattr(processor, "instructions", lambda: frozenset({"avx512f", "avx512_bf16"}))


@functools.cache
def module(name: str, rows: int, maker: str = "") -> str:
    """The compiled product of `rows` rows of x and a weight, for a maker's processor."""
    w = pack(name, random_blocks(QType[name], (1024, 1024), np.random.default_rng(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "vendor", lambda: maker)
        product = jax.jit(functools.partial(ql.matmul, activations="auto"))
        text = product.lower(jnp.ones((rows, 1024)), jax.device_put(w)).compile().as_text()
    assert text is not None
    return text


def out_of_a_stack(name: str, rows: int, activations: Activations) -> str:
    """The compiled product with one of two weights."""
    w = pack(name, random_blocks(QType[name], (256, 512), np.random.default_rng(0)))
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), w)
    product = jax.jit(functools.partial(matmul_expert, activations=activations))
    arguments = jnp.ones((rows, 512)), jax.device_put(stack), jnp.int32(1)
    text = product.lower(*arguments).compile().as_text()
    assert text is not None
    return text


def kernels(name: str, rows: int, maker: str = "") -> list[list[tuple[str, str, str]]]:
    """Its fused loops, each as its instructions."""
    parts = module(name, rows, maker).split("\n\n")
    return [INSTRUCTION.findall(part) for part in parts if "%fused" in part[:10]]


def with_products(
    name: str, rows: int, kind: str, count: int, maker: str = ""
) -> list[tuple[str, str, str]]:
    """The one loop with so many multiplications of lanes."""
    found = [
        kernel
        for kernel in kernels(name, rows, maker)
        if sum(
            (dtype, operation) == (kind, "multiply") and sizes.endswith(f",{lanes_of(name)}")
            for dtype, sizes, operation in kernel
        )
        >= count
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("name", IN_WORDS)
def test_integer_products_share_their_loop_with_no_wider_lanes(name: str, rows: int):
    # LLVM makes vectors of as many lanes as the widest type in a loop allows.
    kernel = with_products(name, rows, "u16", OPERATIONS[name])
    lanes = {dtype for dtype, sizes, _ in kernel if sizes.endswith(f",{lanes_of(name)}")}
    assert lanes == {"u16", "s16"}


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("name", IN_WORDS)
def test_integer_products_are_of_all_words_that_are_alike(name: str, rows: int):
    # With one for each word XLA takes 1.6 times as long to compile a model of many layers.
    kernel = with_products(name, rows, "u16", OPERATIONS[name])
    products = [sizes for dtype, sizes, kind in kernel if (dtype, kind) == ("u16", "multiply")]
    assert len(products) == OPERATIONS[name]


@pytest.mark.skipif(not BARRIER_HOLDS, reason="before 0.11 XLA fuses across a barrier")
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("name", IN_WORDS)
def test_steps_of_activations_are_not_computed_again_for_every_number(name: str, rows: int):
    divide = [
        {operation for _, _, operation in kernel}
        for kernel in kernels(name, rows)
        if any((dtype, kind) == ("f32", "divide") for dtype, _, kind in kernel)
    ]
    assert divide
    for operations in divide:
        assert "shift-right-logical" not in operations


@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("name", IN_WORDS)
def test_integer_products_read_their_words_at_places_that_are_known(name: str, rows: int):
    # Where a slice begins at a place that is computed, or a gather, XLA's loop is scalar.
    kernel = with_products(name, rows, "u16", OPERATIONS[name])
    operations = {operation for _, _, operation in kernel}
    assert not operations & {"dynamic-slice", "gather", "concatenate", "dynamic-update-slice"}


@pytest.mark.parametrize(
    ("rows", "activations"),
    [(1, "auto"), (2, "auto"), (4, "auto"), (8, "auto"), (1, "int8x2"), (4, "int8x2")],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_of_a_stack_is_stored_for_no_number_of_rows(
    name: str, rows: int, activations: Activations
):
    # For some rows XLA stored what was gathered once: 1.3 to 13 times as long.
    text = out_of_a_stack(name, rows, activations)
    gathered = rf"= (?:u16|s16|u8|s8|f16|bf16)\[[\d,]*,{lanes_of(name)}\]\S* gather\("
    parts = [part for part in text.split("\n\n") if re.search(gathered, part)]
    assert parts
    for part in parts:
        assert "%fused" in part[:10]
        multiplied = {
            sizes for dtype, sizes, kind in INSTRUCTION.findall(part) if kind == "multiply"
        }
        assert any(sizes.endswith(f",{lanes_of(name)}") for sizes in multiplied)


@pytest.mark.parametrize(("maker", "streams"), [("GenuineIntel", 4), ("AuthenticAMD", 1), ("", 1)])
@pytest.mark.parametrize("name", IN_WORDS)
def test_a_single_row_meets_as_many_streams_of_words_as_a_processor_reads_best(
    name: str, maker: str, streams: int
):
    # The other number takes up to 1.4 times as long for a weight that comes from memory.
    layout = LAYOUTS[name]
    kernel = with_products(name, 1, "u16", OPERATIONS[name], maker)
    found = {sizes for dtype, sizes, kind in kernel if (dtype, kind) == ("u16", "multiply")}
    lanes = lanes_of(name)
    outer = 1024 // layout.group // streams, 1024 // lanes, streams
    wanted = {(*outer, len(words), lanes) for words, _ in layout.factors.alike}
    # XLA leaves out what counts to one.
    assert {tuple(n for n in each.split(",") if n != "1") for each in found} == {
        tuple(str(n) for n in sizes if n != 1) for sizes in wanted
    }


@pytest.mark.parametrize("name", IN_WORDS)
def test_a_tile_is_cut_out_of_a_weight_before_it_is_dequantized(name: str):
    # In one loop both are scalar: 2.7 times as long for 128 rows of Q4_K, on jax 0.10.
    cuts = [
        # Not what is a single number: where the tile begins is computed in the same loop.
        {operation for _, sizes, operation in kernel if sizes}
        for kernel in kernels(name, 300)
        if any((dtype, kind) == ("u16", "dynamic-slice") for dtype, _, kind in kernel)
    ]
    assert cuts
    for operations in cuts:
        assert operations <= {"parameter", "dynamic-slice", "bitcast", "copy", "transpose"}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_tile_is_dequantized_from_words_that_lie_side_by_side(name: str):
    # From the weight's own tiles XLA's code gathers numbers one by one: five times as long.
    size = tile_rows(1024, 1024, lanes_of(name))
    read = [
        sizes
        for kernel in kernels(name, 300)
        if any(sizes == f"1024,{size}" and kind == "bitcast" for _, sizes, kind in kernel)
        for _, sizes, kind in kernel
        if kind == "parameter" and sizes.count(",") >= 2
    ]
    assert read
    assert all(sizes.endswith(f",{size}") for sizes in read)


@pytest.mark.parametrize("name", NUMBERS)
def test_products_of_numbers_read_them_at_places_that_are_known(name: str):
    kernel = with_products(name, 1, "f32", 32)
    operations = {operation for _, _, operation in kernel}
    assert not operations & {"dynamic-slice", "gather", "concatenate", "dynamic-update-slice"}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_no_loop_copies_the_words_of_a_weight(name: str, rows: int):
    words = pack(name, np.zeros((1024, row_bytes(name)), np.uint8)).words
    kinds = {"uint16": "u16", "int8": "s8", "float16": "f16", "bfloat16": "bf16"}
    stored = [
        operation
        for part in module(name, rows).split("\n\n")
        for line in part.splitlines()
        if "ROOT " in line or "%fused" not in part[:10]  # what a loop returns is stored
        for dtype, sizes, operation in INSTRUCTION.findall(line)
        if dtype == kinds[words.dtype.name]
        and np.prod([int(n) for n in sizes.split(",") if n]) == words.size
    ]
    assert set(stored) <= {"parameter", "bitcast", "get-tuple-element"}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", IN_WORDS)
def test_the_scales_of_a_weight_are_stored_in_no_other_form(name: str, rows: int):
    scale = pack(name, np.zeros((1024, row_bytes(name)), np.uint8)).scale
    stored = {
        dtype
        for part in module(name, rows).split("\n\n")
        if "%fused" not in part[:10]
        for dtype, sizes, operation in INSTRUCTION.findall(part)
        if operation in {"fusion", "copy", "transpose", "convert", "call"}
        and np.prod([int(n) for n in sizes.split(",") if n]) == scale.size
    }
    assert not stored & {"u8", "s8", "f16", "f32"}
    assert rows > 1 or "s16" in stored  # the sums, of which there are as many


def row_bytes(name: str) -> int:
    return random_blocks(QType[name], (1, 1024), np.random.default_rng(0)).shape[-1]


@pytest.mark.skipif(not BARRIER_HOLDS, reason="before jax 0.11 fences are loops")
@pytest.mark.parametrize("name", IN_WORDS)
def test_a_dozen_rows_meet_a_weight_of_few_sums_in_one_piece(name: str):
    assert " while(" not in module(name, 12)


def test_many_sums_are_stored_a_slab_at_a_time():
    w = jax.device_put(
        pack("Q4_0", random_blocks(QType.Q4_0, (4096, 4096), np.random.default_rng(0)))
    )
    product = jax.jit(functools.partial(ql.matmul, activations="int8"))
    text = product.lower(jnp.ones((16, 4096)), w).compile().as_text()
    assert text is not None
    assert " while(" in text
    sums = [
        math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"= s16\[([\d,]+)\]", text)
    ]
    assert 0 < max(sums) <= WHOLE_SUMS


def test_a_token_is_chosen_by_no_reduction_of_pairs():
    # Of values and indices: XLA computes them one after the other.
    logits = jnp.ones((1, 1000))
    keys, sampling = ql.row_keys(jax.random.key(0), 1), ql.Sampling().per_row(1)
    recent = jnp.full((1, 64), -1, jnp.int32)
    text = jax.jit(sample).lower(logits, keys, sampling, recent).compile().as_text()
    assert text is not None
    assert not re.search(r"= \(f32\[[^()]*, s32\[[^()]*\) reduce\(", text)


@pytest.mark.parametrize(
    ("maker", "generation", "names", "bits"),
    [
        ("AuthenticAMD", 26, "avx2 avx512f", 512),
        ("AuthenticAMD", 25, "avx2 avx512f", 0),  # which halves such vectors
        ("AuthenticAMD", 26, "avx2", 0),
        ("GenuineIntel", 26, "avx2 avx512f", 0),
    ],
)
def test_a_decoding_loop_takes_vectors_as_wide_as_a_processor_works_on(
    monkeypatch: pytest.MonkeyPatch, maker: str, generation: int, names: str, bits: int
):
    monkeypatch.setattr(processor, "vendor", lambda: maker)
    monkeypatch.setattr(processor, "family", lambda: generation)
    monkeypatch.setattr(processor, "instructions", lambda: frozenset(names.split()))
    assert compiler_options() == ({"xla_cpu_prefer_vector_width": bits} if bits else {})
