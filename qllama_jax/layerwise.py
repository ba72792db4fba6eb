"""A prefill a layer at a time, driven from the host.

XLA's time to compile a module grows with its layers: SmolLM2's first token takes 12 s more with all
30 in one. A layer alone is compiled once for all of its kind, and Ctrl-C waits for two, not for
all. The results are those of `prefill`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from qllama_jax.cache import KVCache
from qllama_jax.compiling import Program
from qllama_jax.config import ModelConfig
from qllama_jax.decoding import last_logits
from qllama_jax.matmul import Activations
from qllama_jax.model import enter, leave
from qllama_jax.params import Params
from qllama_jax.transformer_block import Entry, run_block

_enter = jax.jit(enter, static_argnames=("config", "max_length", "dtype"))


def _run_layer(
    block: Any, x: Array, k: Array, v: Array, entry: Entry, *layer: Array, **static: Any
) -> Any:
    x, k, v, _ = run_block(block, x, k, v, entry, *layer, **static)
    return x, k, v


_layer = jax.jit(_run_layer, static_argnames=("config", "activations"), donate_argnames=("k", "v"))


def _leave(params: Params, x: Array, entry: Entry, lengths: Array, **static: Any) -> Array:
    return last_logits(params, leave(x, entry), lengths, **static)


_logits = jax.jit(_leave, static_argnames=("config", "activations"))


def programs(
    params: Params,
    tokens: Int32[Array | np.ndarray | jax.ShapeDtypeStruct, "B T"],
    lengths: Int32[Array | np.ndarray | jax.ShapeDtypeStruct, " B"],
    cache: KVCache,
    *,
    config: ModelConfig,
    activations: Activations,
    dtype: DTypeLike = jnp.float32,
) -> Iterator[Program]:
    """Yield what `prefill` of such arrays compiles, what takes longest first."""
    ends = dataclasses.replace(params, blk=())
    static = {"config": config, "activations": activations}
    entering = Program(
        _enter,
        (ends, tokens, cache.lengths, lengths),
        {"config": config, "max_length": cache.max_length, "dtype": dtype},
    )
    x, entry = _enter.eval_shape(*entering.arguments, **entering.static)
    kinds: dict[Any, Program] = {}
    keys, values = _buffers(cache)
    for i, block in enumerate(params.blk):
        leaves, structure = jax.tree.flatten(block)
        kind = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        at, layer = _place(cache, i)
        arguments = (block, x, keys[at], values[at], entry, *layer)
        kinds.setdefault(kind, Program(_layer, arguments, static))
    yield from kinds.values()
    yield Program(_logits, (ends, x, entry, lengths), static)
    yield entering


def prefill(
    params: Params,
    tokens: Int32[Array | np.ndarray, "B T"],
    lengths: Int32[Array | np.ndarray, " B"],
    cache: KVCache,
    *,
    config: ModelConfig,
    activations: Activations,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Return the logits of each row's last counted token and the cache, as `decoding.prefill`.

    The cache is donated. Cannot be traced. A KeyboardInterrupt comes between two layers: it leaves
    the weights as they were, and of the cache nothing to go on with.
    """
    ends = dataclasses.replace(params, blk=())
    room = cache.max_length
    x, entry = _enter(
        ends, tokens, cache.lengths, lengths, config=config, max_length=room, dtype=dtype
    )
    static = {"config": config, "activations": activations}
    keys, values = _buffers(cache)
    for i, block in enumerate(params.blk):
        before, (at, layer) = x, _place(cache, i)
        x, keys[at], values[at] = _layer(block, x, keys[at], values[at], entry, *layer, **static)
        # What is queued cannot be called back, and without this all layers would be. One waits
        # while another runs: to have none wait costs a short prompt a tenth of its time.
        jax.block_until_ready(before)
    logits = _logits(ends, x, entry, lengths, **static)
    k, v = (keys[0], values[0]) if cache.is_stacked else (tuple(keys), tuple(values))
    return logits, KVCache(k=k, v=v, lengths=entry.lengths)


def _buffers(cache: KVCache) -> tuple[list[Any], list[Any]]:
    """Return the keys' and the values' arrays: one a layer, or one of all layers."""
    return ([cache.k], [cache.v]) if cache.is_stacked else (list(cache.k), list(cache.v))


def _place(cache: KVCache, layer: int) -> tuple[int, tuple[np.int32, ...]]:
    """Return which of the buffers holds a layer, and its number there if they are of all layers."""
    return (0, (np.int32(layer),)) if cache.is_stacked else (layer, ())
