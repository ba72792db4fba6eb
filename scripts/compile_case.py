"""A model of shapes on a mesh: its bytes on a device, and its programs, lowered."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql
from qllama_jax.attention import (
    GPU_KEY_BLOCK,
    GPU_QUERY_BLOCK,
    KEY_BLOCK,
    QUERY_BLOCK,
    STEP_KEY_BLOCK,
)
from qllama_jax.config import ModelConfig
from qllama_jax.decoding import prefill
from qllama_jax.matmul import blocks, xla
from qllama_jax.matmul.sharded import ShardedWeight
from qllama_jax.params import Params
from qllama_jax.sharding import Partitioning

PROGRAMS = ("prefill", "decode", "generate")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh, and the sizes to compile it for."""

    params: Params
    config: ModelConfig
    partitioning: Partitioning
    batch: int
    prompt: int
    context: int
    new_tokens: int
    dtype: Any

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Shape of an argument that every device has."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.partitioning.sharding())

    @functools.cached_property
    def cache(self) -> Any:
        """Shapes of a cache with room for the context."""
        c, B = self.config, self.batch
        cut = self.partitioning.cache_axes(B, c.num_heads, c.num_kv_heads)
        make = functools.partial(ql.init_cache, c, B, self.context, dtype=self.dtype)

        def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            over = self.partitioning.sharding(*(cut if len(x.shape) > 1 else ()))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over)

        return jax.tree.map(placed, jax.eval_shape(make))


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def local_matrices(params: Params) -> Iterator[tuple[int, ...]]:
    """Yield the dimensions of each packed weight's part on a device."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ShardedWeight))
    for w in leaves:
        if isinstance(w, ShardedWeight) and not isinstance(w.weight, jax.ShapeDtypeStruct):
            sizes = [w.partitioning.size(over) for over in w.axes]
            yield tuple(n // size for n, size in zip(w.shape, sizes, strict=True))


def weight_sizes(case: Case, program: str) -> set[int]:
    """Numbers of values that a buffer has if it holds a weight as a whole, and as nothing else."""
    matrices = list(local_matrices(case.params))
    length = 1 if program == "decode" else case.prompt
    others = {case.batch * length * n for dims in matrices for n in dims}  # activations
    cached = {x.sharding.shard_shape(x.shape) for x in case.cache.k}
    keys = (case.context, KEY_BLOCK, STEP_KEY_BLOCK, GPU_KEY_BLOCK)
    others |= {math.prod(dims) // case.context * n for dims in cached for n in keys}
    group = case.config.num_heads // case.config.num_kv_heads
    for block in (QUERY_BLOCK, GPU_QUERY_BLOCK):
        queries = group * min(length, block)
        others |= {rows * heads * queries * n for rows, heads, *_ in cached for n in keys}  # scores
    values = {math.prod(dims) for dims in matrices}
    for tile_values in (xla.TILE_VALUES, blocks.TILE_BYTES // jnp.dtype(case.dtype).itemsize):
        cut = [(out, n) for *_, out, n in matrices if out * n > tile_values]
        tiles = {n * xla.tile_rows(out, n, tile_values) for out, n in cut}
        others |= tiles
        # A scale for 16 or 32 weights, and what tells a super-block's sub-blocks apart.
        others |= {n // weights for n in tiles | values for weights in (16, 32)}
    return values - others


def dense_layer_bytes(case: Case) -> int:
    """Bytes of the largest layer's weights in float32, a device's part of them."""
    layers = (dataclasses.replace(case.params, blk=(block,)) for block in case.params.blk)
    no_table = (dataclasses.replace(p, token_embd=None, output=None) for p in layers)
    return 4 * max(sum(map(math.prod, local_matrices(p))) for p in no_table)


def lower(case: Case, program: str) -> Any:
    """Lower one of PROGRAMS; a decoding step is a prefill of one token."""
    B, config, dtype = case.batch, case.config, case.dtype
    tokens = case.array((B, 1 if program == "decode" else case.prompt), jnp.int32)
    lengths = case.array((B,), jnp.int32)
    if program != "generate":
        step = jax.jit(prefill, static_argnames=("config", "dtype"), donate_argnames="cache")
        return step.lower(case.params, tokens, lengths, case.cache, config=config, dtype=dtype)
    static = ("config", "max_new_tokens", "dtype")
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(ql.generate_tokens, static_argnames=static).lower(
        case.params,
        tokens,
        lengths,
        case.array(key.shape, key.dtype),
        config=config,
        sampling=jax.tree.map(lambda x: case.array(np.shape(x), jnp.result_type(x)), ql.Sampling()),
        max_new_tokens=case.new_tokens,
        stop_tokens=case.array((1,), jnp.int32),
        dtype=dtype,
    )
