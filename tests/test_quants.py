"""A packed weight means, bit for bit, what ggml says, and its arrays are the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

from blocks import BLOCK_SIZES, random_blocks, set_scale
from qllama_jax.quants import FORMATS, MXFP4, NVFP4, Q8_K
from qllama_jax.tensor_types import OldType, TensorType
from quant_weights import (
    assert_same_bits,
    dequantized,
    every_format,
    on_device,
    oracle,
    rng_of,
    some_weight,
)


def bytes_of_every_value(qtype: TensorType) -> np.ndarray:
    """512 rows of 4 blocks: each byte of the struct takes each value eight times, at random.

    A grid of 2,048 codes is looked up 65,536 times, so that each of them occurs.
    """
    _, nbytes = BLOCK_SIZES[qtype]
    values = np.tile(np.arange(256, dtype=np.uint8)[:, None], (8, nbytes))
    return rng_of(qtype).permuted(values, axis=0).reshape(512, 4 * nbytes)


# What the bytes mean.


@every_format
@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_dequantize_is_ggufs_bit_for_bit_on_random_bytes(qtype: TensorType, how: Callable):
    raw = bytes_of_every_value(qtype)
    wanted = oracle(raw, qtype)
    # Something finite, and a NaN or an infinity somewhere; NVFP4 cannot say one.
    assert 0 < np.isfinite(wanted).sum() <= wanted.size
    assert np.isfinite(wanted).all() == (qtype == QType.NVFP4)
    assert_same_bits(how(lambda w: w.dequantize())(on_device(raw, qtype)), wanted)


@pytest.mark.parametrize(
    "qtype",
    # Those of GGUF that are more than a cast, without Q8_K, which libgguf keeps for activations.
    [
        qtype
        for qtype in FORMATS
        if isinstance(qtype, QType) and FORMATS[qtype].block_size > 1 and qtype != QType.Q8_K
    ],
    ids=lambda qtype: qtype.name,
)
def test_dequantize_is_ggmls_own_c_bit_for_bit_on_random_bytes(qtype: QType):
    raw = bytes_of_every_value(qtype)
    wanted = np.asarray(libgguf.dequantize_rows(raw, qtype))
    assert_same_bits(dequantized(on_device(raw, qtype)), wanted)


def sixteen_bit_fields(qtype: TensorType) -> list[str]:
    layout = FORMATS[qtype].layout
    return [name for name in layout.names or () if layout[name].str in ("<f2", "<u2")]


@pytest.mark.parametrize(
    "qtype", [qtype for qtype in FORMATS if sixteen_bit_fields(qtype)], ids=lambda qtype: qtype.name
)
def test_all_65536_patterns_of_a_half_float_scale_dequantize_as_ggufs(qtype: TensorType):
    rng = rng_of(qtype)
    block = FORMATS[qtype]
    raw = random_blocks(qtype, (2**16, block.block_size), rng, finite=False)
    blocks = raw.view(block.layout)
    for name in sixteen_bit_fields(qtype):
        patterns = rng.permutation(2**16).astype("<u2")
        blocks[name] = patterns.view(block.layout[name])[:, None]
    for part in np.split(raw, 8):
        assert_same_bits(dequantized(on_device(part, qtype)), oracle(part, qtype))


def test_all_65536_patterns_of_iq1_ms_scattered_scale_dequantize_as_ggufs():
    raw = random_blocks(QType.IQ1_M, (2**16, 256), rng_of(QType.IQ1_M), finite=False)
    patterns = np.arange(2**16, dtype="<u2").view("<f2")
    set_scale(raw, QType.IQ1_M, patterns)
    wanted = oracle(raw, QType.IQ1_M)
    np.testing.assert_array_equal(np.isfinite(wanted).all(axis=1), np.isfinite(patterns))
    for part, values in zip(np.split(raw, 8), np.split(wanted, 8), strict=True):
        assert_same_bits(dequantized(on_device(part, QType.IQ1_M)), values)


E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NIBBLES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_mxfp4_is_a_power_of_two_times_e2m1_for_every_exponent_and_every_code(how: Callable):
    e = np.arange(256, dtype=np.uint8)
    # Bytes of all pairs of codes, 16 a block: the low codes come first.
    qs = np.broadcast_to(NIBBLES.reshape(16, 16), (256, 16, 16))
    w = MXFP4(e=jnp.broadcast_to(jnp.asarray(e)[:, None], (256, 16)), qs=jnp.asarray(qs))
    codes = np.concatenate([qs & 15, qs >> 4], axis=-1).reshape(256, 512)
    with np.errstate(over="ignore"):
        # ggml has no zero of sign -, and no NaN for e = 255.
        wanted = (2.0 ** (e.astype(float) - 127)[:, None] * E2M1[codes]).astype(np.float32)
    subnormal = (wanted != 0) & (np.abs(wanted) < np.finfo(np.float32).tiny)
    assert subnormal.sum() == 32 * 2 * (3 + 1)  # 0.5, 1 and 1.5 of e = 0, and 0.5 of e = 1
    assert_same_bits(how(lambda w: w.dequantize())(w), wanted)


def test_nvfp4_is_e4m3_times_e2m1_for_every_scale_and_every_code():
    d = np.arange(256, dtype=np.uint8)
    qs = np.broadcast_to(NIBBLES.reshape(32, 8), (256, 32, 8)).reshape(256, 8, 32)
    scales = np.broadcast_to(d[:, None, None], (256, 8, 4))
    exponent, fraction = (d >> 3 & 15).astype(float), (d & 7) / 8
    value = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    value[0x7F] = 0  # the NaN of E4M3; ggml takes 0xFF, which is no NaN to it, for 480
    codes = qs.reshape(256, 32, 8)
    codes = np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(256, 512)
    wanted = (value[:, None] * E2M1[codes]).astype(np.float32)
    w = NVFP4(d=jnp.asarray(scales), qs=jnp.asarray(qs))
    assert_same_bits(dequantized(w), wanted)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_q8_k_is_d_times_q_rounded_once_for_every_exponent_of_d_and_every_q(how: Callable):
    # XLA on CPU takes subnormals for zero, in numbers that come in and in results.
    mantissas = [0, 1, 2, 3, 0x2AAAAA, 0x3FFFFF, 0x400000, 0x400001, 0x555555, 0x7FFFFE, 0x7FFFFF]
    powers = [1 << bit for bit in range(23)]
    bits = [e << 23 | m for e in range(256) for m in mantissas] + powers
    d = np.asarray([*bits, *(b | 1 << 31 for b in bits)], np.uint32).view(np.float32)
    q = np.arange(-128, 128, dtype=np.int8)
    w = Q8_K(
        d=jnp.asarray(d[:, None]),
        qs=jnp.broadcast_to(jnp.asarray(q), (d.size, 1, 256)),
        bsums=jnp.zeros((d.size, 1, 16), jnp.int16),
    )
    with np.errstate(all="ignore"):
        # At most 24 + 8 significant bits: exact in float64, and then rounded once.
        wanted = (d[:, None].astype(np.float64) * q.astype(np.float64)).astype(np.float32)
    magnitude = np.abs(wanted)
    subnormal = (magnitude > 0) & (magnitude < np.finfo(np.float32).tiny)
    assert subnormal.sum() > 5000
    assert_same_bits(how(lambda w: w.dequantize())(w), wanted)


@pytest.mark.parametrize("qtype", [OldType.Q4_1_V1, OldType.Q4_1_V2], ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_float32_d_times_q_plus_m_rounds_twice_for_all_pairs_of_magnitudes(
    qtype: TensorType, how: Callable
):
    rng = rng_of(qtype)
    special = [0, 1, 2, 3, 0x400000, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F800000]
    # Every exponent, and those around the smallest numbers and the seams of the formula more often.
    seams = [63, 64, 65, 66, *range(30)]
    exponents = np.concatenate([np.arange(256), np.repeat(seams, 8)]).astype(np.uint32)
    magnitudes = exponents << 23 | rng.integers(0, 2**23, exponents.size, np.uint32)
    bits = np.asarray([*special, *magnitudes.tolist()], np.uint32)
    bits = np.concatenate([bits, bits | 1 << 31])
    d = np.repeat(bits, bits.size).view(np.float32)
    m = np.tile(bits, bits.size).view(np.float32)
    # -7 d, rounded and exact: sums that cancel.
    with np.errstate(all="ignore"):
        near = (d[: 2**14] * np.float32(-7)).astype(np.float32)
    d, m = np.concatenate([d, d[: 2**14]]), np.concatenate([m, near])
    block = FORMATS[qtype]
    raw = np.empty((d.size, 1), block.layout)
    raw["d"], raw["m"] = d[:, None], m[:, None]
    raw["qs"] = rng.permuted(np.tile(np.arange(16, dtype=np.uint8) * 17, (d.size, 1)), axis=1)[
        :, None
    ]
    for part in np.array_split(raw.view(np.uint8).reshape(d.size, -1), 16):
        wanted = oracle(part, qtype)
        assert_same_bits(how(lambda w: w.dequantize())(on_device(part, qtype)), wanted)


def test_the_sums_of_q8_k_do_not_change_its_values():
    w, raw = some_weight(QType.Q8_K, 3)
    other = w.replace(bsums=w.bsums + np.int16(1))
    assert_same_bits(dequantized(other), oracle(raw, QType.Q8_K))


# Which are finite.


def products_may_overflow(qtype: TensorType) -> bool:
    """Whether a finite scale, a float32 or 2^127, can make a product too large."""
    block = FORMATS[qtype]
    fields = [block.layout[name].str for name in block.layout.names or ()]
    return qtype == QType.MXFP4 or (block.block_size > 1 and "<f4" in fields)


@pytest.mark.parametrize(
    "qtype",
    [qtype for qtype in FORMATS if not products_may_overflow(qtype)],
    ids=lambda qtype: qtype.name,
)
def test_a_block_has_a_number_that_is_not_finite_where_a_value_is_not(qtype: TensorType):
    raw = bytes_of_every_value(qtype)
    bad = np.zeros((512, 4), bool)
    for of_field in FORMATS[qtype].from_bytes(raw).not_finite().values():
        assert of_field.shape[:2] == bad.shape
        bad |= of_field.reshape(512, 4, -1).any(axis=2)
    values = oracle(raw, qtype).reshape(512, 4, -1)
    np.testing.assert_array_equal(bad, ~np.isfinite(values).all(axis=2))
    assert bad.any() == (qtype != QType.NVFP4)


def test_of_mxfp4s_exponents_255_alone_is_not_finite():
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    (bad,) = FORMATS[QType.MXFP4].from_bytes(raw).not_finite().values()
    assert np.argwhere(bad).tolist() == [[255, 0]]
