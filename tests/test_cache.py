"""The cache has the documented shapes, and writing touches what it says and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import qllama_jax as ql
from qllama_jax.cache import write
from tiny import write_tiny_llama

S, K, H = 12, 2, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ql.ModelConfig:
    path = tmp_path_factory.mktemp("cache") / "a.gguf"
    shape: dict[str, Any] = {
        "layers": 3,
        "embed": 64,
        "ffn": 32,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 8,
    }
    return ql.load(write_tiny_llama(path, **shape, tokenizer=None)).config  # pyright: ignore[reportArgumentType]


def test_an_empty_cache_has_the_documented_shapes_and_is_zero(config: ql.ModelConfig):
    cache = ql.init_cache(config, batch_size=5, max_length=7)
    assert [k.shape for k in cache.k] == [(5, 2, 16, 7)] * 3
    assert [v.shape for v in cache.v] == [(5, 2, 7, 16)] * 3
    assert (cache.batch_size, cache.max_length) == (5, 7)
    assert cache.lengths.dtype == np.int32
    assert cache.lengths.tolist() == [0] * 5
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(cache))


def test_one_program_makes_the_arrays_of_all_layers(config: ql.ModelConfig):
    made = jax.make_jaxpr(lambda: ql.init_cache(config, 1, 8))()
    operations = [equation.primitive.name for equation in made.eqns]
    assert operations.count("jit") == 1
    assert len(operations) <= 3  # and the lengths


def test_a_mesh_need_not_be_the_one_around(config: ql.ModelConfig):
    devices = np.asarray(jax.devices("cpu")[:2])
    around, own = (Mesh(part[None], ("data", "model")) for part in (devices, devices[::-1]))
    with jax.set_mesh(around):
        cache = ql.init_cache(config, 1, 8, mesh=own)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(cache)} == {own}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keys_and_values_have_the_dtype_that_was_asked_for(config: ql.ModelConfig, dtype: type):
    cache = ql.init_cache(config, 2, 4, dtype)
    assert {leaf.dtype for leaf in (*cache.k, *cache.v)} == {jnp.dtype(dtype)}
    size = sum(leaf.size for leaf in (*cache.k, *cache.v))
    assert size == 2 * 3 * 2 * 2 * 4 * 16  # 2 * layers * B * K * S * H


@pytest.mark.parametrize(("batch_size", "max_length"), [(0, 8), (-1, 8), (1, 0), (1, -3)])
def test_an_empty_batch_and_no_room_are_refused(
    config: ql.ModelConfig, batch_size: int, max_length: int
):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}, max_length={max_length}"):
        ql.init_cache(config, batch_size, max_length)


def some_cache(config: ql.ModelConfig) -> ql.KVCache:
    rng = np.random.default_rng(0)
    cache = ql.init_cache(config, 3, 5)
    filled = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), cache)
    return replace(filled, lengths=jnp.asarray([0, 5, 2], jnp.int32))


@pytest.mark.parametrize("room", [5, 6, 13])
def test_resizing_keeps_the_contents_and_adds_zeros(config: ql.ModelConfig, room: int):
    old = some_cache(config)
    new = ql.resize_cache(old, room)
    assert (new.max_length, new.batch_size) == (room, 3)
    assert new.lengths.tolist() == [0, 5, 2]
    for before, after in zip(old.v, new.v, strict=True):
        np.testing.assert_array_equal(after[:, :, :5], before)
        assert not np.asarray(after[:, :, 5:]).any()
    for before, after in zip(old.k, new.k, strict=True):
        np.testing.assert_array_equal(after[..., :5], before)
        assert not np.asarray(after[..., 5:]).any()


def test_a_poisoned_row_stays_poisoned_when_resized(config: ql.ModelConfig):
    old = replace(some_cache(config), lengths=jnp.asarray([6, 5, 1000], jnp.int32))
    for room in (5, 6, 2000):
        lengths = np.asarray(ql.resize_cache(old, room).lengths)
        assert (lengths > room).tolist() == [True, False, True]
        assert lengths[1] == 5


def test_resizing_below_the_room_is_refused(config: ql.ModelConfig):
    with pytest.raises(ValueError, match="max_length=4 < 5"):
        ql.resize_cache(some_cache(config), 4)


def written(
    buffer: np.ndarray, new: np.ndarray, start: np.ndarray, count: np.ndarray, axis: int
) -> np.ndarray:
    """What `write` means, one position at a time."""
    out = np.moveaxis(buffer.copy(), axis, 1)
    for b, t in itertools.product(range(len(buffer)), range(new.shape[axis])):
        if t < count[b]:
            out[b, start[b] + t] = np.moveaxis(new, axis, 1)[b, t].astype(buffer.dtype)
    return np.moveaxis(out, 1, axis)


def arrays(B: int, T: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([B, T, axis])
    shapes = ((B, K, S, H), (B, K, T, H)) if axis == 2 else ((B, K, H, S), (B, K, H, T))
    buffer, new = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return buffer, new


# Windows of 8 stick out past the end from start 5 on, and one of 16 does from the beginning.
@pytest.mark.parametrize("T", [1, 3, 8, 12, 16])
@pytest.mark.parametrize("axis", [2, 3])
def test_write_stores_count_positions_from_start_and_changes_nothing_else(T: int, axis: int):
    cases = [(s, n) for s in range(S + 1) for n in range(T + 1) if s + n <= S]
    assert len(cases) >= 25
    start, count = np.asarray(cases, np.int32).T
    buffer, new = arrays(2, T, axis)
    jitted = jax.jit(write, static_argnames="axis")
    for row in range(0, len(cases) - 1):  # each case in both rows, beside another
        two = start[row : row + 2], count[row : row + 2]
        result = jitted(buffer, new, *two, axis=axis)
        np.testing.assert_array_equal(result, written(buffer, new, *two, axis))


@pytest.mark.parametrize("axis", [2, 3])
def test_padding_that_is_not_finite_is_never_stored(axis: int):
    buffer, new = arrays(2, 8, axis)
    np.moveaxis(new, axis, 0)[3:] = np.nan
    start, count = np.asarray([9, 2], np.int32), np.asarray([3, 2], np.int32)
    result = write(*map(jnp.asarray, (buffer, new, start, count)), axis=axis)
    assert np.isfinite(np.asarray(result)).all()
    np.testing.assert_array_equal(result, written(buffer, new, start, count, axis))


@pytest.mark.parametrize("axis", [2, 3])
def test_a_bfloat16_buffer_stores_rounded_values(axis: int):
    buffer, new = arrays(2, 3, axis)
    rounded = np.asarray(jnp.asarray(buffer).astype(jnp.bfloat16))
    start, count = np.asarray([1, 10], np.int32), np.asarray([3, 2], np.int32)
    result = write(*map(jnp.asarray, (rounded, new, start, count)), axis=axis)
    assert result.dtype == jnp.bfloat16
    wanted = written(rounded, new, start, count, axis)
    np.testing.assert_array_equal(np.asarray(result, np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("axis", [2, 3])
def test_write_under_vmap_equals_row_by_row(axis: int):
    buffer, new = arrays(4, 3, axis)
    start, count = np.asarray([0, 9, 11, 4], np.int32), np.asarray([3, 3, 1, 0], np.int32)

    def one(*row: jax.Array) -> jax.Array:
        return write(*(x[None] for x in row), axis=axis)[0]

    result = jax.vmap(one)(*map(jnp.asarray, (buffer, new, start, count)))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(result, written(buffer, new, start, count, axis))
