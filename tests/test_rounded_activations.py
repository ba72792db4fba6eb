"""Activations that are rounded before a product: how far, in which groups, with which gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from block_weights import (
    IN,
    OUT,
    PACKED,
    PLAIN,
    assert_is_product,
    multiply,
    normal,
    relative_error,
    weight,
)
from qllama_jax.tensor_types import TensorType


@pytest.mark.parametrize("qtype", PACKED, ids=lambda qtype: qtype.name)
def test_int8_loses_half_a_percent_and_int8x2_a_hundred_times_less(qtype: TensorType):
    packed, dense = weight(qtype)
    x = normal(5, IN)
    wanted = x.astype(np.float64) @ dense.T
    int8 = relative_error(multiply(jnp.asarray(x), packed, activations="int8"), wanted)
    int8x2 = relative_error(multiply(jnp.asarray(x), packed, activations="int8x2"), wanted)
    # The largest of 32 normal values is 2.1: steps of 1/60, an error of 1/60 / sqrt(12) = 0.0048.
    assert 0.004 <= int8 <= 0.006
    # 254 times finer; what is computed in float32 all the way is below 1e-6.
    assert 1.2e-5 <= int8x2 <= 3e-5
    assert int8x2 <= int8 / 100


def groups_of_known_integers(
    *batch: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x = d (q + r / 254 + noise), and d, q, r: groups of 32 of which one value is ±127 d."""
    rng = np.random.default_rng(seed)
    shape = (*batch, IN // 32, 32)
    d = 2.0 ** rng.integers(-6, 7, (*batch, IN // 32, 1)) * rng.integers(
        8, 16, (*batch, IN // 32, 1)
    )
    q, r = rng.integers(-126, 127, shape), rng.integers(-100, 101, shape)
    noise = rng.uniform(-0.4, 0.4, shape) / 254
    top = rng.integers(0, 32, (*batch, IN // 32, 1))
    at_top = np.arange(32) == top
    q = np.where(at_top, 127 * rng.choice([-1, 1], q.shape), q)
    r, noise = np.where(at_top, 0, r), np.where(at_top, 0, noise)
    x = (d * (q + r / 254 + noise)).astype(np.float32)
    return x.reshape(*batch, IN), d, q, r


@pytest.mark.parametrize("qtype", PACKED, ids=lambda qtype: qtype.name)
def test_int8_multiplies_the_nearest_integers_of_each_32_values(qtype: TensorType):
    packed, dense = weight(qtype)
    x, d, q, r = groups_of_known_integers(5)
    int8 = multiply(jnp.asarray(x), packed, activations="int8")
    assert_is_product(int8, (d * q).reshape(x.shape), dense)
    int8x2 = multiply(jnp.asarray(x), packed, activations="int8x2")
    assert_is_product(int8x2, (d * (q + r / 254)).reshape(x.shape), dense)


@pytest.mark.parametrize("activations", ["int8", "int8x2"])
def test_the_gradient_passes_straight_through_the_rounding(activations: Any):
    w, dense = weight(QType.Q4_0)
    x, g = jnp.asarray(normal(3, IN)), normal(3, OUT, seed=1)
    gradient = jax.grad(lambda x: (ql.matmul(x, w, activations=activations) * g).sum())(x)
    assert_is_product(gradient, g, dense.T)


@pytest.mark.parametrize("activations", ["int8", "int8x2"])
def test_rounded_activations_of_zeros_are_zeros_and_of_nan_are_nan(activations: str):
    packed, dense = weight(QType.Q4_0)
    x = groups_of_known_integers(3)[0]
    x[0], x[1, 64:96], x[2, 5] = 0, 0, np.nan
    found = np.asarray(multiply(jnp.asarray(x), packed, activations=activations))
    assert not found[0].any()
    wanted = x[1].astype(np.float64) @ dense.T
    assert relative_error(jnp.asarray(found[1]), wanted) <= 0.006
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("activations", ["int8", "int8x2"])
def test_a_rounded_row_does_not_depend_on_the_rows_beside_it(activations: str):
    packed, dense = weight(QType.Q4_K)
    x, d, q, r = groups_of_known_integers(2)
    x[1] *= 1000
    found = multiply(jnp.asarray(x), packed, activations=activations)
    rounded = d * q if activations == "int8" else d * (q + r / 254)
    assert_is_product(found[:1], rounded[:1].reshape(1, IN), dense)


@pytest.mark.parametrize("qtype", [*PLAIN, None], ids=lambda q: q.name if q else "array")
@pytest.mark.parametrize("activations", ["int8", "int8x2", "auto"])
def test_weights_that_are_floats_meet_float_activations(qtype: TensorType | None, activations: str):
    packed, dense = weight(qtype or QType.F32)
    w = packed if qtype else jnp.asarray(dense.astype(np.float32))
    x = jnp.asarray(normal(3, IN))
    np.testing.assert_array_equal(multiply(x, w, activations=activations), multiply(x, w))


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q6_K], ids=lambda qtype: qtype.name)
def test_auto_loses_no_more_than_int8(qtype: TensorType):
    packed, dense = weight(qtype)
    x = normal(5, IN)
    found = multiply(jnp.asarray(x), packed, activations="auto")
    assert relative_error(found, x.astype(np.float64) @ dense.T) <= 0.006
