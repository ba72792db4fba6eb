"""Parameters become rows of one dtype each, and those outside their ranges are refused by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.sampling_ranges import check_sampling

DTYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repeat_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "penalty_last_n": np.int32,
    "typical_p": np.float32,
    "logit_bias": np.float32,
}


def test_per_row_broadcasts_numbers_and_keeps_rows():
    rows = ql.Sampling(temperature=np.asarray([0.5, 1.0, 2.0], np.float32), top_k=7).per_row(3)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(rows)] == [
        ((3, 1) if name == "logit_bias" else (3,), np.dtype(dtype))
        for name, dtype in DTYPES.items()
    ]
    assert rows.temperature.tolist() == [0.5, 1.0, 2.0]
    assert rows.top_k.tolist() == [7, 7, 7]
    for bias in (np.arange(5.0), np.ones((3, 5), np.float32)):
        rows = ql.Sampling(logit_bias=bias).per_row(3)
        np.testing.assert_array_equal(rows.logit_bias, np.broadcast_to(bias, (3, 5)))
        again = rows.per_row(3)
        jax.tree.map(np.testing.assert_array_equal, rows, again)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", float("nan")),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.0001),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.05),
        ("min_p", float("nan")),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", -1.0),
        ("repeat_penalty", float("inf")),
        ("repeat_penalty", float("nan")),
        ("presence_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("presence_penalty", 1e39),  # infinite in float32
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", float("-inf")),
        ("penalty_last_n", -2),
        ("penalty_last_n", 2.5),
        ("penalty_last_n", float("nan")),
        ("penalty_last_n", float("inf")),
        ("penalty_last_n", 2**31),
        ("typical_p", 0.0),
        ("typical_p", -0.5),
        ("typical_p", 1.0001),
        ("typical_p", float("nan")),
        ("typical_p", float("inf")),
    ],
)
def test_a_parameter_out_of_its_range_is_refused_by_name(name: str, value: float):
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        check_sampling(ql.Sampling(**{name: value}))
    good = getattr(ql.Sampling(), name)
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        check_sampling(ql.Sampling(**{name: np.asarray([good, value])}))


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"logit_bias"}))
def test_a_parameter_that_is_no_number_is_refused_by_name(name: str):
    for value in (True, "1", None, np.asarray([False])):
        with pytest.raises(TypeError, match=rf"^{name}=.*: expected "):
            check_sampling(ql.Sampling(**{name: value}))
    with pytest.raises(ValueError, match=rf"^{name}: \(3,\) numbers for 2 rows"):
        check_sampling(ql.Sampling(**{name: np.ones(3)}), 2)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (1.0, ValueError, r"expected 0, or floats of shape \(3,\) or \(2, 3\), found 1.0"),
        (float("nan"), ValueError, "found nan"),
        (np.zeros(4), ValueError, r"found shape \(4,\)"),
        (np.zeros((3, 3)), ValueError, r"found shape \(3, 3\)"),
        (np.zeros((1, 2, 3)), ValueError, r"found shape \(1, 2, 3\)"),
        (np.zeros(3, bool), TypeError, "found bool"),
        ("1", TypeError, "found <U1"),
        (np.asarray([0, np.nan, 0]), ValueError, "nan for token 1"),
        (np.asarray([[0, 0, 0], [0, 0, np.inf]]), ValueError, "inf for token 2"),
        (np.asarray([1e39, 0, 0]), ValueError, "inf for token 0"),
        (np.full(3, -np.inf), ValueError, "none to choose"),
        (np.asarray([[0, 0, 0], [-np.inf] * 3]), ValueError, "none to choose"),
    ],
    ids=str,
)
def test_a_bias_of_another_form_or_value_is_refused(bias: Any, error: type, message: str):
    with pytest.raises(error, match=rf"^logit_bias: .*{message}"):
        check_sampling(ql.Sampling(logit_bias=bias), 2, 3)


def test_the_ends_of_every_range_are_allowed_and_traced_values_not_looked_at():
    for values in (
        {},
        {"temperature": 1e9, "top_k": 2**31 - 1, "top_p": 1e-9, "min_p": 1.0},
        {"repeat_penalty": 1e-9, "min_p": 0, "top_p": 1, "temperature": np.asarray([0.0, 2.0])},
        {"top_k": np.asarray([0, 40], np.int32), "repeat_penalty": jnp.asarray(2.0)},
        {"presence_penalty": -2.0, "frequency_penalty": -2, "penalty_last_n": -1},
        {"penalty_last_n": 2**31 - 1, "typical_p": 1e-9},
        {"penalty_last_n": np.asarray([0, 64]), "typical_p": 1},
        {"logit_bias": np.asarray([[-np.inf, 0.0], [1e30, -np.inf]])},
        {"logit_bias": jnp.asarray([-100.0, 100.0])},
        {"logit_bias": jnp.asarray([-1, 1], jnp.bfloat16)},
        {"logit_bias": 0},
    ):
        check_sampling(ql.Sampling(**values))
    for values in ({}, {"logit_bias": np.ones((2, 3))}, {"logit_bias": np.ones(3)}):
        check_sampling(ql.Sampling(**values).per_row(2), 2, 3)

    @jax.jit
    def traced(value: jax.Array) -> jax.Array:
        check_sampling(ql.Sampling(temperature=value, top_p=value))
        return value

    assert float(traced(-1.0)) == -1.0


def test_of_traced_parameters_the_shapes_are_looked_at():
    @jax.jit
    def traced(sampling: ql.Sampling) -> None:
        check_sampling(sampling, 2, 5)

    traced(ql.Sampling())
    traced(ql.Sampling(logit_bias=np.zeros(5, np.float32)).per_row(2))
    with pytest.raises(ValueError, match=r"^top_p: \(3,\) numbers for 2 rows"):
        traced(ql.Sampling(top_p=np.ones(3, np.float32)))
    for shape in ((4,), (3, 5), (5, 1)):
        with pytest.raises(ValueError, match=r"^logit_bias: .*found shape"):
            traced(ql.Sampling(logit_bias=np.zeros(shape, np.float32)))
