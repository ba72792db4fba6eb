"""A packed weight means, bit for bit, what ggml says, and its arrays are the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

from blocks import BLOCK_SIZES, dequantize, random_blocks, set_scale
from qllama_jax.quants import FORMATS, MXFP4, NVFP4, Q8_K, Block, Leaf, take
from qllama_jax.quants.block import block_format
from qllama_jax.tensor_types import OldType, TensorType

every_format = pytest.mark.parametrize("qtype", list(FORMATS), ids=lambda qtype: qtype.name)


@jax.jit
def dequantized(w: Any) -> jax.Array:
    return w.dequantize()


def rng_of(qtype: TensorType) -> np.random.Generator:
    return np.random.default_rng([7, qtype.value])


def on_device(raw: np.ndarray, qtype: TensorType) -> Any:
    """Any, because leaves and methods of the formats differ."""
    return jax.tree.map(jnp.asarray, FORMATS[qtype].from_bytes(raw))


def some_weight(qtype: TensorType, *out: int, blocks: int = 2) -> tuple[Any, np.ndarray]:
    """A weight [*out, blocks * block_size] of finite values, and its raw bytes."""
    shape = (*out, blocks * FORMATS[qtype].block_size)
    raw = random_blocks(qtype, shape, rng_of(qtype))
    return on_device(raw, qtype), raw


def assert_same_bits(found: jax.Array, wanted: np.ndarray) -> None:
    """Equal float32 bits, so that -0 is not 0; one NaN is as good as another."""
    assert (found.dtype, wanted.dtype) == (np.float32, np.float32)
    assert found.shape == wanted.shape
    found_array, nan = np.asarray(found), np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found_array), nan)
    np.testing.assert_array_equal(found_array.view("u4")[~nan], wanted.view("u4")[~nan])


def oracle(raw: np.ndarray, qtype: TensorType) -> np.ndarray:
    """gguf-py's dequantize, which warns of the infinities that random bytes are full of."""
    with np.errstate(all="ignore"):
        return dequantize(raw, qtype).astype(np.float32)


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


# Bytes.


@every_format
@pytest.mark.parametrize("out", [(), (5,), (2, 3)], ids=str)
def test_to_bytes_is_the_inverse_of_from_bytes(qtype: TensorType, out: tuple[int, ...]):
    _, nbytes = BLOCK_SIZES[qtype]
    raw = rng_of(qtype).integers(0, 256, (*out, 3 * nbytes), dtype=np.uint8)
    np.testing.assert_array_equal(FORMATS[qtype].from_bytes(raw).to_bytes(), raw)
    np.testing.assert_array_equal(on_device(raw, qtype).to_bytes(), raw)


@every_format
def test_fields_do_not_share_memory_with_the_bytes_they_came_from(qtype: TensorType):
    _, raw = some_weight(qtype, 4)
    packed = FORMATS[qtype].from_bytes(raw)
    for leaf in jax.tree.leaves(packed):
        assert not np.shares_memory(leaf, raw)
        assert leaf.flags.c_contiguous
        assert leaf.flags.aligned


@every_format
def test_rows_that_end_within_a_block_are_refused(qtype: TensorType):
    _, nbytes = BLOCK_SIZES[qtype]
    with pytest.raises(ValueError, match="divisor"):
        FORMATS[qtype].from_bytes(np.zeros((2, 2 * nbytes - 1), np.uint8))


@every_format
def test_the_arrays_are_the_fields_of_the_struct_and_add_up_to_the_files_bytes(qtype: TensorType):
    w, raw = some_weight(qtype, 6)
    layout = FORMATS[qtype].layout
    paths, _ = jax.tree_util.tree_flatten_with_path(w)
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [
        f".{name}" for name in layout.names or ()
    ]
    for (_, leaf), name in zip(paths, layout.names or (), strict=True):
        assert leaf.shape == (6, 2, *layout[name].shape)
        assert leaf.dtype == layout[name].base
    assert sum(leaf.nbytes for _, leaf in paths) == raw.nbytes == w.nbytes


# The registry.


@every_format
def test_the_struct_has_the_size_of_ggmls_table(qtype: TensorType):
    block = FORMATS[qtype]
    assert block.qtype == qtype
    assert (block.block_size, block.layout.itemsize) == BLOCK_SIZES[qtype]
    assert block.__name__ == qtype._name_


def test_a_struct_of_another_size_or_with_other_fields_is_not_registered():
    before = dict(FORMATS)
    with pytest.raises(AssertionError, match=r"Q4_0.*17.*18"):
        block_format(QType.Q4_0, [("d", "<f2"), ("qs", "u1", 15)])

    class Swapped(Block):
        qs: Leaf
        d: Leaf

    with pytest.raises(AssertionError):
        block_format(QType.Q4_0, [("d", "<f2"), ("qs", "u1", 16)])(Swapped)
    assert before == FORMATS


# What a packed leaf says of itself.


@every_format
def test_shape_and_nbytes_are_true_after_slicing_stacking_and_reshaping(qtype: TensorType):
    w, raw = some_weight(qtype, 6)
    K = 2 * FORMATS[qtype].block_size
    row = raw.shape[-1]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, w, w)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), w, w)
    one_block = jax.tree.map(lambda leaf: leaf[:, :1], w)
    for packed, shape, nbytes in (
        (w, (6, K), 6 * row),
        (take(w, slice(1, 4)), (3, K), 3 * row),
        (take(w, 2), (K,), row),
        (stacked, (3, 6, K), 18 * row),
        (joined, (12, K), 12 * row),
        (one_block, (6, K // 2), 3 * row),
    ):
        assert (packed.shape, packed.ndim, packed.nbytes) == (shape, len(shape), nbytes)
        assert jax.eval_shape(dequantized, packed).shape == shape


@every_format
def test_shape_is_true_under_vmap_scan_and_eval_shape(qtype: TensorType):
    w, raw = some_weight(qtype, 3, 4)
    K = 2 * FORMATS[qtype].block_size
    seen = []

    def observed(one: Any) -> jax.Array:
        seen.append((one.shape, one.nbytes))
        return one.dequantize()

    wanted = oracle(raw, qtype)
    assert_same_bits(jax.jit(jax.vmap(observed))(w), wanted)
    _, scanned = jax.lax.scan(lambda carry, one: (carry, observed(one)), 0, w)
    assert_same_bits(scanned, wanted)
    abstract = jax.eval_shape(lambda w: w, w)
    assert (abstract.shape, abstract.nbytes) == ((3, 4, K), w.nbytes)
    assert jax.eval_shape(observed, abstract).shape == (3, 4, K)
    # vmap and scan see one of three; eval_shape all.
    third = ((4, K), w.nbytes // 3)
    assert set(seen[:-1]) == {third}
    assert seen[-1] == ((3, 4, K), w.nbytes)


def test_no_format_is_taken_for_another_with_the_same_arrays():
    """JAX's caches compare tree structures; that of two dataclasses is equal but for statics."""
    packed = {qtype: some_weight(qtype, 2, blocks=1)[0] for qtype in FORMATS}
    structures = {qtype: jax.tree.structure(w) for qtype, w in packed.items()}
    for qtype, structure in structures.items():
        assert [other for other in FORMATS if structures[other] == structure] == [qtype]
        assert jax.tree.unflatten(structure, jax.tree.leaves(packed[qtype])).qtype == qtype


@every_format
def test_the_static_part_of_a_leaf_does_not_depend_on_its_sizes(qtype: TensorType):
    small, large = some_weight(qtype, 1, blocks=1)[0], some_weight(qtype, 2, 3)[0]
    assert jax.tree.structure(small) == jax.tree.structure(large)


@every_format
@pytest.mark.parametrize(
    "rows",
    [4, -1, slice(1, 5, 2), np.asarray([3, 0, 3, 5]), np.asarray([[0, 1], [5, 2]])],
    ids=["one", "last", "slice", "repeated", "matrix"],
)
def test_take_then_dequantize_is_dequantize_then_take(qtype: TensorType, rows: Any):
    w, raw = some_weight(qtype, 6)
    wanted = oracle(raw, qtype)[rows]
    assert_same_bits(dequantized(take(w, rows)), wanted)
    assert_same_bits(jnp.asarray(take(dequantized(w), rows)), wanted)


@every_format
def test_take_with_a_traced_index_is_dequantize_then_take(qtype: TensorType):
    w, raw = some_weight(qtype, 6)
    rows = np.asarray([5, 2, 2], np.int32)
    found = jax.jit(lambda w, rows: dequantized(take(w, rows)))(w, rows)
    assert_same_bits(found, oracle(raw, qtype)[rows])


@every_format
def test_repr_tells_the_size_and_prints_no_array(qtype: TensorType):
    w, raw = some_weight(qtype, 6)
    K = 2 * FORMATS[qtype].block_size
    assert repr(w) == f"{qtype._name_}(shape=(6, {K}), nbytes={raw.nbytes})"


def test_repr_of_leaves_that_are_no_arrays_or_numbers_shows_them():
    w, _ = some_weight(QType.Q4_0, 2)
    assert (
        repr(jax.tree.map(lambda leaf: np.uint8(leaf.ndim), w)) == "Q4_0(np.uint8(2), np.uint8(3))"
    )
    assert repr(jax.tree.map(lambda leaf: leaf.ndim, w)) == "Q4_0(2, 3)"
