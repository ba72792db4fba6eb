"""Meshes of the tests' eight CPU devices, tiny models that they divide, and what both compare."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import qllama_jax as ql

SHAPES = [(1, 8), (2, 4), (4, 2), (8, 1)]
V = 384
#: Every axis divides by 8, in blocks of 32 too.
SMALL = {
    "layers": 1,
    "embed": 64,
    "ffn": 256,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 32,
    "vocab": V,
}
KINDS = {
    "dense": {"qtype": "Q4_0", "biases": True, **SMALL},
    "mixture": {"qtype": "Q8_0", "experts": 8, "experts_used": 2, **SMALL},
}
#: Blocks of 256 divide by 4 where they are cut.
WIDE = {"embed": 256, "ffn": 1024, "heads": 8, "kv_heads": 4, "head_dim": 128, "vocab": V}
#: Rows of a batch, which every mesh of SHAPES divides.
ROWS, LENGTH = 8, 12
TOKENS = np.random.default_rng(0).integers(0, V, (ROWS, LENGTH)).astype(np.int32)
PROMPT = 6


def make_mesh(shape, types=AxisType.Auto, names=("data", "model")):
    axis_types = (types,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=jax.devices("cpu"))


def logits_of(model, tokens, mesh=None):
    cache = ql.init_cache(model.config, len(tokens), tokens.shape[1], mesh=mesh)
    logits, cache = ql.forward(model.params, jnp.asarray(tokens), cache, config=model.config)
    return np.asarray(logits), cache


def device_bytes(tree):
    """Bytes on each device of all arrays of a tree."""
    found = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            found[shard.device] += shard.data.nbytes
    return found


def assert_close(found, wanted, bound=1e-5):
    assert np.abs(found - wanted).max() / np.abs(wanted).max() <= bound
