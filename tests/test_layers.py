"""The layers equal their formulas in float64, and masks and head groups are the literal ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formulas import assert_close, attention64, normal
from qllama_jax.attention import attention
from qllama_jax.layers import linear, rms_norm, swiglu
from qllama_jax.params import DenseBlock, Linear


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm_is_its_formula(eps: float, size: float):
    x, weight = size * normal(2, 3, 48), normal(48)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight
    assert_close(rms_norm(jnp.asarray(x), jnp.asarray(weight), eps), wanted)


def test_rms_norm_of_bfloat16_sums_in_float32_and_returns_bfloat16():
    x = jnp.asarray(1 + normal(1, 4096) / 8).astype(jnp.bfloat16)
    weight = normal(4096)
    found = rms_norm(x, jnp.asarray(weight), 1e-5)
    assert found.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    error = np.abs(np.asarray(found, np.float64) - wanted) / np.abs(wanted)
    assert error.max() <= 2.0**-8  # one rounding to 8 bits, and no other


def test_linear_is_its_formula_with_and_without_bias():
    x, weight, bias = normal(2, 3, 32), normal(7, 32), normal(7)
    wanted = x.astype(np.float64) @ weight.T.astype(np.float64)
    jx, jw = jnp.asarray(x), jnp.asarray(weight)
    assert_close(linear(jx, Linear(weight=jw), "float"), wanted)
    assert_close(linear(jx, Linear(weight=jw, bias=jnp.asarray(bias)), "float"), wanted + bias)


def block_of(gate: np.ndarray, up: np.ndarray, down: np.ndarray, biases: list) -> DenseBlock:
    unused = Linear(weight=jnp.zeros(()))
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
    given = {
        name: Linear(weight=jnp.asarray(w), bias=None if b is None else jnp.asarray(b))
        for name, w, b in zip(
            ("ffn_gate", "ffn_up", "ffn_down"), (gate, up, down), biases, strict=True
        )
    }
    return DenseBlock(**dict.fromkeys(names, unused), **given)


@pytest.mark.parametrize("biased", [False, True])
def test_swiglu_is_its_formula(biased: bool):
    D, F = 32, 48
    x, gate, up, down = normal(2, 3, D), normal(F, D), normal(F, D, seed=1), normal(D, F)
    biases = [biased * normal(F), biased * normal(F, seed=1), biased * normal(D)]
    wide = x.astype(np.float64)
    a, b = wide @ gate.T + biases[0], wide @ up.T + biases[1]
    wanted = (a / (1 + np.exp(-a)) * b) @ down.T + biases[2]
    block = block_of(gate, up, down, biases if biased else [None] * 3)
    assert_close(swiglu(jnp.asarray(x), block, "float"), wanted)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_attention_is_its_formula(N: int, K: int):
    q, k, v = 3 * normal(2, 5, N, 8), normal(2, K, 8, 11), normal(2, K, 11, 8)
    positions = np.asarray([[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]], np.int32)
    found = attention(*map(jnp.asarray, (q, k, v, positions)))
    assert_close(found, attention64(q, k, v, positions))


def test_attention_does_not_depend_on_the_size_of_a_common_score():
    q, k, v = normal(1, 3, 2, 8), normal(1, 2, 8, 5), normal(1, 2, 5, 8)
    q[..., 0], k[:, :, 0] = 1e3, 100.0  # scores near 35,000, beyond exp's range
    positions = np.asarray([[2, 3, 4]], np.int32)
    found = attention(*map(jnp.asarray, (q, k, v, positions)))
    # float32 scores of this size have steps of 2^-8
    assert_close(found, attention64(q, k, v, positions), 2e-2)


def test_the_mask_is_the_literal_lower_triangle_from_each_rows_position():
    # Equal scores, values that are unit vectors: the output is the row of the mask, over its sum.
    S = 6
    q, k = jnp.zeros((2, 3, 1, S)), jnp.zeros((2, 1, S, S))
    v = jnp.broadcast_to(jnp.eye(S)[None, None], (2, 1, S, S))
    positions = jnp.asarray([[0, 1, 2], [3, 4, 5]], jnp.int32)
    seen = np.asarray(attention(q, k, v, positions))[:, :, 0] > 0
    assert seen.astype(int).tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    ]


def test_what_is_masked_has_no_weight_at_all():
    q, k, v = normal(1, 1, 2, 8), normal(1, 1, 8, 4), normal(1, 1, 4, 8)
    huge_k, huge_v = k.copy(), v.copy()
    huge_k[..., 2:], huge_v[:, :, 2:] = 1e18, 1e18
    positions = jnp.asarray([[1]], jnp.int32)
    found = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), positions)
    other = attention(jnp.asarray(q), jnp.asarray(huge_k), jnp.asarray(huge_v), positions)
    np.testing.assert_array_equal(found, other)


def test_query_heads_read_the_key_value_head_of_their_group():
    N, K, H = 12, 3, 4
    v = jnp.broadcast_to(jnp.arange(K, dtype=jnp.float32)[None, :, None, None], (1, K, 2, H))
    q, k = jnp.asarray(normal(1, 1, N, H)), jnp.asarray(normal(1, K, H, 2))
    found = np.asarray(attention(q, k, v, jnp.asarray([[1]], jnp.int32)))[0, 0, :, 0]
    np.testing.assert_allclose(found, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], atol=1e-6)


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.fixture(params=["this platform's", "a GPU's"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as it is lowered for the platform that the tests run on, and for a GPU."""
    if request.param == "a GPU's":
        monkeypatch.setattr(
            "qllama_jax.attention._by_platform",
            lambda elsewhere, on_a_gpu, arguments: on_a_gpu(*arguments),
        )


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("T", "S"), [(1, 513), (1, 700), (2, 300), (130, 300), (256, 256), (300, 417), (520, 1100)]
)
def test_a_long_prompt_in_blocks_is_the_formula(T: int, S: int):
    # Neither number divides into blocks, the rows are at different positions, the last key unseen.
    q, k, v = 3 * normal(2, T, 4, 4), normal(2, 2, 4, S), normal(2, 2, S, 4)
    positions = np.stack([np.arange(T), np.arange(T) + max(S - T - 1, 0)]).astype(np.int32)
    found = attention(*map(jnp.asarray, (q, k, v, positions)))
    assert_close(found, attention64(q, k, v, positions))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("T", "S"), [(130, 140), (520, 560)])
def test_attention_in_blocks_has_the_gradient_of_the_formula(T: int, S: int):
    arguments = [normal(1, T, 2, 4), normal(1, 1, 4, S), normal(1, 1, S, 4)]
    positions = (np.arange(T) + 3)[None].astype(np.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, jnp.asarray(positions)).sum()

    def loss64(moved: int, step: np.ndarray) -> float:
        wide = [a.astype(np.float64) for a in arguments]
        wide[moved] += step
        q, k, v = wide
        return attention64(q, k, v, positions).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    for i, gradient in enumerate(gradients):
        step = 1e-6 * np.random.default_rng(i).standard_normal(gradient.shape)
        change = loss64(i, step) - loss64(i, -step)
        wanted = np.sum(np.asarray(gradient, np.float64) * 2 * step)
        np.testing.assert_allclose(change, wanted, rtol=1e-4)


def test_a_long_prompt_needs_room_for_a_block_of_scores_not_for_all():
    T = S = 2048
    q, k, v = normal(1, T, 2, 4), normal(1, 1, 4, S), normal(1, 1, S, 4)
    positions = np.arange(T)[None].astype(np.int32)
    compiled = jax.jit(lambda *a: attention(*a)).lower(q, k, v, positions).compile()
    assert temp_bytes(compiled) <= 0.25 * (2 * T * S * 4)


@pytest.mark.parametrize(("T", "S"), [(1, 4096), (512, 4096)])
def test_a_gpu_is_given_attention_without_branches(T: int, S: int):
    # At each the host waits for the device: a step of 22 layers took 1.24 times as long with one in
    # each (H100).
    q, k, v = (
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, 4, 8), (1, 2, 8, S), (1, 2, S, 8))
    )
    positions = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def branches(platform: str, function: Any, *arguments: Any) -> int:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("stablehlo.case")

    def choice(q: jax.Array) -> jax.Array:  # of a platform, which XLA makes when it compiles
        return jax.lax.platform_dependent(q, cuda=jnp.sin, rocm=jnp.sin, default=jnp.cos)

    for platform in ("cuda", "rocm"):
        assert branches(platform, attention, q, k, v, positions) == branches(platform, choice, q)
    assert branches("cpu", attention, q, k, v, positions) > branches("cpu", choice, q)


def test_keys_that_no_query_of_a_block_sees_cost_nothing():
    # Infinite values would make NaN of a weight of zero: their blocks are not looked at.
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU looks at all blocks")
    q, k, v = normal(1, 2, 2, 4), normal(1, 1, 4, 300), normal(1, 1, 300, 4)
    v[:, :, 128:] = np.inf
    positions = np.asarray([[100, 101]], np.int32)
    found = attention(*map(jnp.asarray, (q, k, v, positions)))
    assert_close(found, attention64(q, k, v, positions))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("filled", [1, 128, 256, 257, 349, 350, 351, 700])
def test_one_query_a_row_is_the_formula_however_much_of_the_cache_is_filled(filled: int):
    S = 700  # more than half filled is computed at once, less in blocks
    q, k, v = 3 * normal(2, 1, 4, 4), normal(2, 2, 4, S), normal(2, 2, S, 4)
    positions = np.asarray([[filled - 1], [filled // 2]], np.int32)
    found = attention(*map(jnp.asarray, (q, k, v, positions)))
    assert_close(found, attention64(q, k, v, positions))


@pytest.mark.parametrize(
    ("filled", "looked_at"), [(1, 256), (256, 256), (257, 512), (1024, 1024), (1025, 2048)]
)
def test_one_query_looks_at_little_more_of_a_large_cache_than_is_filled(
    filled: int, looked_at: int
):
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU looks at all keys")
    q, k, v = normal(1, 1, 2, 4), normal(1, 1, 4, 2048), normal(1, 1, 2048, 4)
    v[:, :, looked_at:] = np.inf  # would make NaN of a weight of zero
    positions = np.asarray([[filled - 1]], np.int32)
    found = attention(*map(jnp.asarray, (q, k, v, positions)))
    assert_close(found, attention64(q, k, v, positions))
