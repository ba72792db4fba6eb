"""A packed leaf holds the file's bytes as the fields of ggml's struct, and tells its true shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

from blocks import BLOCK_SIZES
from qllama_jax.quants import FORMATS, Block, Leaf, take
from qllama_jax.quants.block import block_format
from qllama_jax.tensor_types import TensorType
from quant_weights import (
    assert_same_bits,
    dequantized,
    every_format,
    on_device,
    oracle,
    rng_of,
    some_weight,
)


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
