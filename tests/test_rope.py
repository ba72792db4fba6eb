"""Rotary embedding: the angles of float64 at every position, and a rotation that is one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qllama_jax.config import ModelConfig, RopeScaling, ScalingKind
from qllama_jax.errors import GGUFError
from qllama_jax.rope import rope_cos_sin, rope_frequencies, rotate

#: Largest error of cos and sin at any position. Angles in float32 would miss it a hundredfold at
#: position 4,095 and two thousandfold at 131,071.
TOLERANCE = 1e-6

POSITIONS = np.concatenate(
    [
        np.arange(300),
        [4095, 4096, 8191, 32_767, 65_535, 65_536, 131_071, 2**19 + 1, 2**20 - 1],
        np.random.default_rng(0).integers(0, 131_072, 700),
    ]
).astype(np.int32)


def config_of(
    head_dim: int = 128,
    theta: float = 10_000.0,
    *,
    rope_dim: int | None = None,
    scaling: RopeScaling | None = None,
) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        embed_dim=head_dim,
        ffn_dim=head_dim,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        vocab_size=1,
        context_length=4096,
        rope_theta=theta,
        rope_dim=rope_dim or head_dim,
        norm_eps=1e-5,
        num_experts=0,
        num_experts_per_token=0,
        rope_scaling=scaling,
    )


def scaled(kind: ScalingKind, factor: float, original: int = 4096, attn: float = 1.0) -> Any:
    return RopeScaling(kind, factor, original, attn)


def cos_sin_of(
    config: ModelConfig, positions: np.ndarray, factors: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cos and sin [1, T, pairs] with traced positions."""
    frequencies = rope_frequencies(config, factors)
    return jax.jit(rope_cos_sin)(frequencies, jnp.asarray(positions)[None])


def assert_are_the_angles(
    found: tuple[jax.Array, jax.Array],
    frequencies: np.ndarray,
    magnitude: float = 1.0,
    positions: np.ndarray = POSITIONS,
) -> None:
    """Hold cos and sin against those of float64; `frequencies` in radians a position."""
    angles = positions.astype(np.float64)[:, None] * frequencies
    for one, function in zip(found, (np.cos, np.sin), strict=True):
        assert one.dtype == np.float32
        wanted = function(angles) * magnitude
        assert one.shape == (1, *wanted.shape)
        assert np.abs(np.asarray(one[0], np.float64) - wanted).max() <= TOLERANCE * magnitude


def plain_frequencies(dims: int, theta: float) -> np.ndarray:
    return np.asarray([theta ** (-2 * i / dims) for i in range(dims // 2)])


# Angles.


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
def test_cos_and_sin_are_those_of_float64_at_every_position(theta: float, head_dim: int):
    found = cos_sin_of(config_of(head_dim, theta), POSITIONS)
    assert_are_the_angles(found, plain_frequencies(head_dim, theta))


def test_position_0_is_no_rotation_at_all():
    cos, sin = cos_sin_of(config_of(), np.zeros(1, np.int32))
    np.testing.assert_array_equal(cos, 1)
    np.testing.assert_array_equal(sin, 0)


def test_every_row_has_positions_of_its_own():
    positions = np.asarray([[0, 1, 2], [131_070, 131_071, 7]], np.int32)
    frequencies = rope_frequencies(config_of(64))
    cos, sin = rope_cos_sin(frequencies, jnp.asarray(positions))
    for row in (0, 1):
        found = cos[row][None], sin[row][None]
        wanted = plain_frequencies(64, 1e4)
        assert_are_the_angles(found, wanted, positions=positions[row])


@pytest.mark.parametrize("rope_dim", [2, 32, 96])
def test_frequencies_count_from_the_rotated_dimensions_not_the_heads(rope_dim: int):
    found = cos_sin_of(config_of(128, rope_dim=rope_dim), POSITIONS)
    assert_are_the_angles(found, plain_frequencies(rope_dim, 1e4))


def test_freq_factors_divide_the_frequencies():
    factors = np.geomspace(1, 32, 64).astype(np.float32)
    found = cos_sin_of(config_of(theta=5e5), POSITIONS, factors)
    assert_are_the_angles(found, plain_frequencies(128, 5e5) / factors.astype(np.float64))


def test_frequencies_of_more_than_a_turn_a_position_keep_their_fraction():
    factors = np.full(64, 0.05, np.float32)  # the first pair turns 3.18 times a position
    found = cos_sin_of(config_of(), POSITIONS, factors)
    assert_are_the_angles(found, plain_frequencies(128, 1e4) / np.float64(np.float32(0.05)))


# Scaling.


@pytest.mark.parametrize("factor", [0.5, 4.0, 7.3])
def test_linear_scaling_divides_every_position_by_its_factor(factor: float):
    found = cos_sin_of(config_of(scaling=scaled("linear", factor)), POSITIONS)
    assert_are_the_angles(found, plain_frequencies(128, 1e4) / factor)


def test_attn_factor_multiplies_cos_and_sin():
    found = cos_sin_of(config_of(scaling=scaled("linear", 2.0, attn=1.75)), POSITIONS)
    assert_are_the_angles(found, plain_frequencies(128, 1e4) / 2, 1.75)


def yarn(dims: int, theta: float, factor: float, original: int) -> tuple[np.ndarray, float]:
    """Frequencies and magnitude of YaRN, a pair at a time as ggml computes it."""

    def corrected(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(corrected(32))), min(dims - 1, math.ceil(corrected(1)))
    frequencies = []
    for i in range(dims // 2):
        extrapolated = theta ** (-2 * i / dims)
        ramp = (i - low) / max(0.001, high - low)
        mix = 1 - min(1.0, max(0.0, ramp))
        frequencies.append(extrapolated / factor * (1 - mix) + extrapolated * mix)
    return np.asarray(frequencies), 1 + 0.1 * math.log(max(factor, 1.0))


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "original"),
    [
        (128, 1e4, 16.0, 4096),
        (64, 5e5, 4.0, 8192),
        (128, 1e6, 2.5, 32_768),
        (64, 1e4, 8.0, 100),  # no pair turns 32 times in 100 positions
        (16, 2.0, 8.0, 10**6),  # every pair does
        (16, 10.0, 8.0, 734),  # the slowest is counted as pair 15, not 17
        (128, 1e4, 0.5, 4096),  # squeezed, not stretched: the magnitude stays 1
    ],
)
def test_yarn_is_its_formula(head_dim: int, theta: float, factor: float, original: int):
    config = config_of(head_dim, theta, scaling=scaled("yarn", factor, original, 1.25))
    frequencies, magnitude = yarn(head_dim, theta, factor, original)
    assert_are_the_angles(cos_sin_of(config, POSITIONS), frequencies, 1.25 * magnitude)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones_by_the_factor():
    # Llama 2 in 16 times its context: pair 20 turns 36 times in 4,096 positions, pair 46 0.87.
    found = cos_sin_of(config_of(scaling=scaled("yarn", 16.0)), POSITIONS)
    fast, slow = (tuple(x[..., part] for x in found) for part in (slice(21), slice(46, None)))
    plain = plain_frequencies(128, 1e4)
    magnitude = 1.2772588722239782  # 1 + 0.1 ln 16
    assert_are_the_angles((fast[0], fast[1]), plain[:21], magnitude)
    assert_are_the_angles((slow[0], slow[1]), plain[46:] / 16, magnitude)


def test_freq_factors_come_before_yarn():
    factors = np.geomspace(1, 8, 64).astype(np.float32)
    config = config_of(scaling=scaled("yarn", 16.0))
    frequencies, magnitude = yarn(128, 1e4, 16.0, 4096)
    wanted = frequencies / factors.astype(np.float64)
    assert_are_the_angles(cos_sin_of(config, POSITIONS, factors), wanted, magnitude)


def test_longrope_divides_by_its_factors_and_by_the_scale():
    factors = np.geomspace(1, 16, 64).astype(np.float32)
    found = rope_frequencies(config_of(scaling=scaled("longrope", 4.0)), factors)
    wanted = rope_frequencies(config_of(scaling=scaled("linear", 4.0)), factors)
    np.testing.assert_array_equal(found.coarse, wanted.coarse)
    np.testing.assert_array_equal(found.fine, wanted.fine)
    plain = rope_frequencies(config_of())
    turns = found.coarse.astype(np.float64) / plain.coarse
    np.testing.assert_allclose(turns[:8], 1 / (4 * factors[:8].astype(np.float64)), rtol=1e-6)


# Rotation.


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def as_complex(x: Any) -> np.ndarray:
    """The pairs (2i, 2i + 1) as numbers 2i + i·(2i + 1) of complex128."""
    wide = np.asarray(x, np.float64)
    return wide[..., 0::2] + 1j * wide[..., 1::2]


def test_rotate_multiplies_each_pair_of_neighbours_by_a_unit_complex_number():
    x = normal(1, POSITIONS.size, 3, 64)
    found = rotate(jnp.asarray(x), *cos_sin_of(config_of(64), POSITIONS))
    angles = POSITIONS.astype(np.float64)[:, None] * plain_frequencies(64, 1e4)
    wanted = as_complex(x) * np.exp(1j * angles)[None, :, None]
    assert found.dtype == np.float32
    assert np.abs(as_complex(found) - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_rotate_keeps_the_length_of_every_pair():
    x = normal(1, POSITIONS.size, 2, 128)
    found = rotate(jnp.asarray(x), *cos_sin_of(config_of(), POSITIONS))
    before, after = np.abs(as_complex(x)), np.abs(as_complex(found))
    assert np.abs(after - before).max() <= TOLERANCE * before.max()


@pytest.mark.parametrize("shift", [1, 1000, 131_000, 2**20 - 72])
def test_scores_depend_on_the_distance_of_query_and_key_alone(shift: int):
    T, H = 64, 128
    q, k = normal(1, 1, 1, H), normal(1, 1, 1, H, seed=1)
    config = config_of(theta=5e5)

    def scores(first: int) -> np.ndarray:
        turns = cos_sin_of(config, np.arange(first, first + T, dtype=np.int32))
        rows = [rotate(jnp.broadcast_to(x, (1, T, 1, H)), *turns) for x in (q, k)]
        queries, keys = (np.asarray(row, np.float64)[0, :, 0] for row in rows)
        return queries @ keys.T

    distance = np.arange(T)[:, None] - np.arange(T)
    turned = np.exp(1j * distance[..., None] * plain_frequencies(H, 5e5))
    pairs = as_complex(q)[0, 0, 0] * np.conj(as_complex(k)[0, 0, 0])
    wanted = (turned * pairs).real.sum(axis=-1)
    bound = 2 * TOLERANCE * np.linalg.norm(q) * np.linalg.norm(k)
    assert np.abs(scores(0) - wanted).max() <= bound
    assert np.abs(scores(shift) - wanted).max() <= bound


@pytest.mark.parametrize("rope_dim", [2, 64, 94])
def test_channels_beyond_rope_dim_stay_bit_for_bit(rope_dim: int):
    x = normal(2, 5, 3, 96)
    positions = np.asarray([[1, 2, 3, 4, 5], [9, 99, 999, 9999, 99_999]], np.int32)
    frequencies = rope_frequencies(config_of(96, rope_dim=rope_dim))
    cos, sin = rope_cos_sin(frequencies, jnp.asarray(positions))
    found = np.asarray(rotate(jnp.asarray(x), cos, sin))
    np.testing.assert_array_equal(found[..., rope_dim:], x[..., rope_dim:])
    part = rotate(jnp.asarray(x[..., :rope_dim]), cos, sin)
    np.testing.assert_array_equal(found[..., :rope_dim], part)
    assert (found[..., :rope_dim] != x[..., :rope_dim]).all()


def test_rotate_of_bfloat16_is_the_float64_rotation_rounded():
    x = jnp.asarray(normal(1, 64, 2, 64)).astype(jnp.bfloat16)
    positions = np.arange(64, dtype=np.int32)
    found = rotate(x, *cos_sin_of(config_of(64), positions))
    assert found.dtype == jnp.bfloat16
    angles = positions.astype(np.float64)[:, None] * plain_frequencies(64, 1e4)
    wanted = as_complex(x) * np.exp(1j * angles)[None, :, None]
    # Three roundings of 2^-9 at most: of cos and sin, of the products, of the sum.
    assert np.abs(as_complex(found) - wanted).max() <= 2.0**-6 * np.abs(wanted).max()


def test_a_frequency_of_many_turns_a_position_is_the_fraction_of_a_turn_that_is_left():
    config = config_of(64, scaling=scaled("linear", 2.0**-24))
    radians = 10_000.0 ** -(np.arange(0, 64, 2) / 64) * 2.0**24  # 2.7 million turns
    positions = POSITIONS[:100]
    assert_are_the_angles(cos_sin_of(config, positions), radians % (2 * np.pi), positions=positions)


def test_yarn_without_a_base_above_1_is_refused():
    with pytest.raises(GGUFError, match=r"freq_base 1\.0, wanted above 1"):
        rope_frequencies(config_of(64, 1.0, scaling=scaled("yarn", 4.0)))


def test_frequencies_that_overflow_are_refused():
    with pytest.raises(GGUFError, match="frequencies up to inf"):
        rope_frequencies(config_of(64, 1e-308, scaling=scaled("linear", 1e-308)))
    with pytest.raises(GGUFError, match="frequencies up to nan"):
        rope_frequencies(config_of(64, scaling=scaled("yarn", 5e-324)))


@pytest.mark.parametrize("factor", [1e308, 1e-320])
def test_a_scale_of_cos_and_sin_that_is_no_float32_is_refused(factor: float):
    scaling = dataclasses.replace(scaled("linear", 2.0), attn_factor=factor)
    with pytest.raises(GGUFError, match=r"scale cos and sin by 1e.*, wanted a float32"):
        rope_frequencies(config_of(64, scaling=scaling))
