"""matmul is x @ dequantize(w).T for every kind of weight, and never holds a packed one dense."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from block_weights import (
    FLOAT32,
    IN,
    OUT,
    assert_is_product,
    multiply,
    normal,
    relative_error,
    weight,
)
from qllama_jax.matmul import register, xla
from qllama_jax.quants import FORMATS
from qllama_jax.tensor_types import TensorType

every_format = pytest.mark.parametrize("qtype", list(FORMATS), ids=lambda qtype: qtype.name)


def test_the_weights_of_these_tests_need_several_tiles_and_a_remainder():
    rows = xla.tile_rows(OUT, IN, xla.TILE_VALUES)
    assert 2 * rows < OUT
    assert OUT % rows


@pytest.mark.parametrize("width", [32, 2048, 5632])
@pytest.mark.parametrize("tile_values", [2**12, 2**19, 2**21])
def test_tiles_are_two_at_least_small_enough_and_nearly_alike(width: int, tile_values: int):
    for count in (1, 2, 3, 7, 100, 1000, 5632, 32_000):
        rows = xla.tile_rows(count, width, tile_values)
        tiles = -(-count // rows)
        assert tiles >= 2 or count == 1
        assert rows * width <= tile_values or rows == 1
        assert tiles * rows - count < tiles  # repeated: not a row for each tile


# The product.


@every_format
@pytest.mark.parametrize("batch", [(1,), (5,)], ids=str)
def test_matmul_is_x_times_the_dequantized_weight(qtype: TensorType, batch: tuple[int, ...]):
    packed, dense = weight(qtype)
    x = normal(*batch, IN)
    assert_is_product(multiply(jnp.asarray(x), packed), x, dense)


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q6_K, QType.BF16], ids=lambda q: q.name)
@pytest.mark.parametrize(
    ("out", "width"),
    [(1, 256), (7, 512), (256, 1024), (257, 1024), (511, 1024), (3, 2**18), (2, 2**18 + 256)],
)
def test_matmul_of_every_number_of_rows_and_tiles(qtype: TensorType, out: int, width: int):
    packed, dense = weight(qtype, out, width)
    x = normal(2, width)
    found = multiply(jnp.asarray(x), packed)
    wanted = x.astype(np.float64) @ dense.T
    scale = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(dense, axis=-1)
    assert found.shape == (2, out)
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= FLOAT32 * scale).all()


@pytest.mark.parametrize("batch", [(), (0,), (2, 0, 3), (201,), (2, 1, 3, 2)], ids=str)
def test_matmul_keeps_the_shape_of_the_batch(batch: tuple[int, ...]):
    packed, dense = weight(QType.Q4_1)
    x = normal(*batch, IN)
    assert_is_product(multiply(jnp.asarray(x), packed), x, dense)
    assert_is_product(multiply(jnp.asarray(x), jnp.asarray(dense.astype(np.float32))), x, dense)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_bfloat16_product_is_one_of_bfloat16_weights_rounded_once(packed: bool):
    leaf, dense = weight(QType.Q8_0)
    x = jnp.asarray(normal(5, IN)).astype(jnp.bfloat16)
    w = leaf if packed else jnp.asarray(dense.astype(np.float32))
    found = multiply(x, w)
    assert found.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(dense.astype(np.float32)).astype(jnp.bfloat16), np.float64)
    wide = np.asarray(x, np.float64)
    wanted = wide @ rounded.T
    scale = np.linalg.norm(wide, axis=-1)[:, None] * np.linalg.norm(rounded, axis=-1)
    # The result is rounded to 8 bits, and nothing before it: halves in bfloat16 would add to this.
    error = np.abs(np.asarray(found, np.float64) - wanted)
    assert (error <= 2.0**-8 * np.abs(wanted) + FLOAT32 * scale).all()


# Under transformations.


@every_format
def test_matmul_under_vmap_is_matmul_of_each(qtype: TensorType):
    first, dense = weight(qtype, 300)
    second, other = weight(qtype, 300, seed=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    assert stacked.shape == (2, 300, IN)
    x = normal(2, 3, IN)
    each = jax.jit(jax.vmap(ql.matmul))(jnp.asarray(x), stacked)
    assert_is_product(each[0], x[0], dense)
    assert_is_product(each[1], x[1], other)


def test_matmul_under_vmap_over_x_alone_and_over_w_alone_is_matmul_of_each():
    first, dense = weight(QType.Q5_K)
    second, other = weight(QType.Q5_K, seed=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    x = normal(2, 3, IN)
    over_x = jax.jit(jax.vmap(ql.matmul, in_axes=(0, None)))(jnp.asarray(x), first)
    assert_is_product(over_x, x, dense)
    over_w = jax.jit(jax.vmap(ql.matmul, in_axes=(None, 0)))(jnp.asarray(x), stacked)
    assert_is_product(over_w[0], x, dense)
    assert_is_product(over_w[1], x, other)


def test_matmul_without_jit_is_the_product():
    packed, dense = weight(QType.Q3_K)
    x = normal(3, IN)
    assert_is_product(ql.matmul(jnp.asarray(x), packed), x, dense)


# Gradients.


@every_format
def test_the_gradient_for_x_is_g_times_the_dequantized_weight(qtype: TensorType):
    packed, dense = weight(qtype)
    x, g = normal(2, 3, IN), normal(2, 3, OUT)

    @jax.jit
    def gradient(x: jax.Array, w: Any, g: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (ql.matmul(x, w) * g).sum())(x)

    assert_is_product(gradient(jnp.asarray(x), packed, jnp.asarray(g)), g, dense.T)


def test_the_gradient_under_vmap_over_stacked_weights_is_that_of_each():
    first, dense = weight(QType.Q4_K)
    second, other = weight(QType.Q4_K, seed=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    x, g = normal(2, 3, IN), normal(2, 3, OUT)

    def gradient(x: jax.Array, w: Any, g: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (ql.matmul(x, w) * g).sum())(x)

    found = jax.jit(jax.vmap(gradient))(jnp.asarray(x), stacked, jnp.asarray(g))
    assert_is_product(found[0], g[0], dense.T)
    assert_is_product(found[1], g[1], other.T)


def test_packed_leaves_have_no_gradient():
    packed, _ = weight(QType.Q4_0)
    x = jnp.asarray(normal(3, IN))
    found = jax.grad(lambda w: ql.matmul(x, w).sum(), allow_int=True)(packed)
    assert not np.asarray(found.d).any()
    assert found.qs.dtype == jax.dtypes.float0


# Memory. 8,192 rows of 2,048 values are 64 MiB in float32, a tile is 2 MiB.


def big(qtype: TensorType) -> Any:
    """Shapes of a packed weight [8192, 2048], no arrays."""
    packed, _ = weight(qtype)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((8192, *leaf.shape[1:]), leaf.dtype), packed
    )


@every_format
def test_matmul_and_its_gradient_hold_a_few_tiles_and_never_the_dense_weight(qtype: TensorType):
    x = jax.ShapeDtypeStruct((4, IN), jnp.float32)
    w = big(qtype)
    assert w.shape == (8192, IN)
    few_tiles, dense = 4 * 4 * xla.TILE_VALUES, 4 * 8192 * IN

    def gradient(x: jax.Array, w: Any) -> jax.Array:
        return jax.grad(lambda x: (ql.matmul(x, w) ** 2).sum())(x)

    memory = jax.jit(gradient).lower(x, w).compile().memory_analysis()
    assert memory is not None
    # A GPU takes so few rows without tiles: it may hold the integers of the weight, a byte each, or
    # scales for each row of x.
    most = 0.6 * dense if jax.default_backend() == "gpu" else few_tiles
    assert memory.temp_size_in_bytes <= most  # pyright: ignore[reportOptionalMemberAccess]


@every_format
def test_what_the_backward_pass_keeps_is_the_packed_weight(qtype: TensorType):
    x = jax.ShapeDtypeStruct((4, IN), jnp.float32)
    w = big(qtype)
    _, pullback = jax.eval_shape(lambda x, w: jax.vjp(lambda x: ql.matmul(x, w), x), x, w)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "dtype")]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert w.nbytes <= size <= w.nbytes + 4 * 4 * IN


# Refusals.


@pytest.mark.parametrize("width", [IN - 32, IN + 32, 1])
def test_inner_sizes_that_differ_are_refused_with_both_shapes(width: int):
    packed, dense = weight(QType.Q4_0)
    x = jnp.zeros((2, width))
    for w in (packed, jnp.asarray(dense.astype(np.float32))):
        message = rf"\(2, {width}\).*\({OUT}, {IN}\)"
        with pytest.raises(ValueError, match=message):
            ql.matmul(x, w)


@pytest.mark.parametrize("activations", ["int4", "", "Float"])
def test_unknown_activations_are_refused_for_every_kind_of_weight(activations: Any):
    packed, dense = weight(QType.Q4_0)
    x = jnp.zeros((2, IN))
    unchecked = inspect.unwrap(ql.matmul)  # as users have it: types are checked in tests alone
    for w in (packed, jnp.asarray(dense.astype(np.float32))):
        with pytest.raises(ValueError, match=r"activations=.*'auto', 'float', 'int8', 'int8x2'"):
            unchecked(x, w, activations=activations)


def test_a_weight_of_a_type_that_is_not_registered_is_refused_by_name():
    class Unknown:
        shape = (OUT, IN)

    with pytest.raises(TypeError, match="weight of type Unknown"):
        ql.matmul(jnp.zeros((2, IN)), Unknown())


# A weight of the user's own.


@struct.dataclass
class Adapted:
    """base + B A: a packed weight and a trainable difference of low rank."""

    base: Any
    A: Any  # [rank, in]
    B: Any  # [out, rank]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


@register(Adapted)
def _(w: Adapted, x: jax.Array, activations: Any) -> jax.Array:
    return ql.matmul(x, w.base, activations=activations) + ql.matmul(ql.matmul(x, w.A), w.B)


def test_a_registered_adapter_multiplies_and_gets_its_gradients():
    packed, dense = weight(QType.Q4_K)
    x, A, B, g = normal(3, IN), normal(4, IN) / 32, normal(OUT, 4), normal(3, OUT)

    @jax.jit
    def run(x: jax.Array, packed: Any, A: jax.Array, B: jax.Array) -> Any:
        def loss(x: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = ql.matmul(x, Adapted(packed, A, B))
            return (y * jnp.asarray(g)).sum(), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, A, B)

    (dx, dA, dB), y = run(jnp.asarray(x), packed, jnp.asarray(A), jnp.asarray(B))
    x64, A64, B64, g64 = (v.astype(np.float64) for v in (x, A, B, g))
    whole = dense + B64 @ A64
    for found, wanted in (
        (y, x64 @ whole.T),
        (dx, g64 @ whole),
        (dA, (g64 @ B64).T @ x64),
        (dB, g64.T @ (x64 @ A64.T)),
    ):
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) <= 1e-6


def test_a_registered_adapter_hands_activations_on():
    packed, dense = weight(QType.Q4_K)
    x = normal(3, IN)
    w = Adapted(packed, jnp.zeros((1, IN)), jnp.zeros((OUT, 1)))
    found = multiply(jnp.asarray(x), w, activations="int8")
    assert 0.004 <= relative_error(found, x.astype(np.float64) @ dense.T) <= 0.006
