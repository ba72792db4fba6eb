"""Every form of a product with a file's blocks is the product; each platform is given its own."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import blocks_like, dequantize
from qllama_jax.matmul import blocks
from qllama_jax.quants import FORMATS
from qllama_jax.tensor_types import TensorType

OUT, IN = 40, 512
# As in test_matmul.py: four roundings of the size that products of some 1,000 terms have.
FLOAT32 = 2.0**-22
BY_TILES = [blocks.by_large_tiles, blocks.by_padded_tiles]
FORMS = [blocks.row_by_row, *BY_TILES]


@functools.cache
def weight(qtype: TensorType, out: int = OUT, width: int = IN) -> tuple[Any, np.ndarray]:
    """A weight of normal values, and what it means in float64."""
    rng = np.random.default_rng(qtype.value)
    raw = blocks_like(rng.standard_normal((out, width), dtype=np.float32), qtype, rng)
    packed = jax.tree.map(jnp.asarray, FORMATS[qtype].from_bytes(raw))
    return packed, dequantize(raw, qtype).astype(np.float64)


def rows(count: int, width: int = IN) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def assert_is_product(found: jax.Array, x: np.ndarray, w: np.ndarray) -> None:
    wide = x.astype(np.float64)
    scale = np.linalg.norm(wide, axis=-1)[:, None] * np.linalg.norm(w, axis=-1)
    assert found.dtype == np.float32
    assert found.shape == (len(x), len(w))
    assert (np.abs(np.asarray(found, np.float64) - wide @ w.T) <= FLOAT32 * scale).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("qtype", list(FORMATS), ids=lambda qtype: qtype.name)
def test_each_form_is_x_times_the_dequantized_weight(form: Any, qtype: TensorType):
    packed, dense = weight(qtype)
    x = rows(3)
    found = jax.jit(form, static_argnames="count")(jnp.asarray(x), packed, None, count=OUT)
    assert_is_product(found, x, dense)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_each_form_takes_the_rows_that_are_asked_for(form: Any):
    packed, dense = weight(QType.Q4_0)
    x = rows(1)
    part = jax.jit(form, static_argnames="count")(jnp.asarray(x), packed, jnp.int32(8), count=24)
    assert_is_product(part, x, dense[8:32])


@pytest.mark.parametrize("form", BY_TILES, ids=lambda form: form.__name__)
@pytest.mark.parametrize("first", [None, 8])
def test_a_weight_of_several_tiles_is_multiplied_by_one_after_another(
    form: Any, first: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "TILE_BYTES", 4 * 10 * IN)
    packed, dense = weight(QType.Q4_0)
    start = None if first is None else jnp.int32(first)
    multiply = jax.jit(lambda x, w: form(x, w, start, count=32))
    x = rows(3)
    assert "stablehlo.while" in multiply.lower(x, packed).as_text()
    assert_is_product(multiply(x, packed), x, dense[first or 0 :][:32])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_padding_to_the_matrix_unit_changes_no_row(count: int):
    packed, dense = weight(QType.Q5_1)
    x = rows(count)
    found = jax.jit(blocks.by_padded_tiles, static_argnames="count")(
        jnp.asarray(x), packed, None, count=OUT
    )
    assert_is_product(found, x, dense)


def lowered(platform: str, count: int, qtype: TensorType = QType.Q4_0) -> str:
    """StableHLO of a product for a platform that need not be there."""
    packed, _ = weight(qtype)
    x = jax.ShapeDtypeStruct((count, IN), jnp.float32)
    traced = jax.jit(ql.matmul).trace(x, packed)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def dots(text: str) -> list[str]:
    """Types of the left operands of all products of matrices."""
    return re.findall(r"dot_general.*: \(tensor<([\dx]+)xf32>", text)


def test_a_gpu_is_given_a_sum_for_few_rows_and_a_product_of_matrices_for_many():
    for count in (1, 8):
        few = lowered("cuda", count)
        assert not dots(few)
        assert few.count("stablehlo.reduce") == count
        assert "while" not in few
    many = lowered("cuda", 9)
    assert dots(many) == [f"9x{IN}"]
    assert "while" not in many


def test_a_tpu_is_given_at_least_eight_rows():
    for count, given in ((1, 8), (9, 9)):
        text = lowered("tpu", count)
        assert dots(text) == [f"{given}x{IN}"]
        assert "while" not in text


@pytest.mark.parametrize("qtype", list(FORMATS), ids=lambda qtype: qtype.name)
def test_formats_of_tables_have_tiles_of_their_own(qtype: TensorType):
    # What a TPU looks up it pads; NVFP4 looks up its scales too.
    of_tables = "stablehlo.gather" in lowered("tpu", 1, qtype)
    assert (qtype.name in blocks.LOOKED_UP_TILE_BYTES) == of_tables


def test_a_cpu_is_given_the_rows_as_they_are():
    assert dots(lowered("cpu", 1)) == [f"1x{IN}"]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("qtype", list(FORMATS), ids=lambda qtype: qtype.name)
def test_no_half_float_is_in_arithmetic(platform: str, qtype: TensorType):
    # Mosaic refuses to load them and XLA's compilers multiply them in their own ways: they are
    # converted to float32 before anything else.
    text = lowered(platform, 1, qtype)
    operations = [line for line in text.splitlines() if re.search(r"xf16>|tensor<f16>", line)]
    allowed = (
        r"stablehlo\.(convert|reshape|slice|dynamic_slice|broadcast_in_dim|optimization_barrier"
        r"|bitcast_convert|while|return|case)|func\.func|return|call @|iterArg"
    )
    assert not [line for line in operations if not re.search(allowed, line)]
