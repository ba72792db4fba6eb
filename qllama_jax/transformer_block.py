"""One transformer block, what it needs to know of its tokens, and how a module of many calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from qllama_jax.attention import store_and_attend
from qllama_jax.cache_tiles import Keys, Values
from qllama_jax.calls import apart_on_a_cpu
from qllama_jax.config import ModelConfig
from qllama_jax.layers import linear, rms_norm, swiglu
from qllama_jax.matmul import Activations
from qllama_jax.moe import Routing, moe_swiglu
from qllama_jax.params import DenseBlock, MoEBlock
from qllama_jax.rope import rotate
from qllama_jax.sharding import Partitioning

Tap = Callable[[str, Array], Array]

# Named activations of a block, in the order of computation; "blk.3.attn_out" is a full name.
# All are [B, T, D]: the residual stream before the block, the normed input and the output of
# each half, and the residual stream between and after them.
BLOCK_SITES = ("in", "attn_norm", "attn_out", "mid", "ffn_norm", "ffn_out", "out")


class Entry(NamedTuple):
    """What the blocks need to know of the tokens that go into them."""

    cos_sin: tuple[Array, Array]  # float32[B, T, pairs] each
    positions: Array  # int32[B, T]
    counts: Array  # int32[B]: tokens that are stored; none of a poisoned row
    lengths: Array  # int32[B]: of the cache after them
    bad: Array  # bool[B]: poisoned rows
    partitioning: Partitioning | None = None  # static


def run_block(
    block: DenseBlock | MoEBlock,
    x: Float[Array, "B T D"],
    k_cache: Keys,
    v_cache: Values,
    entry: Entry,
    *layer: Int32[Array, ""],
    config: ModelConfig,
    activations: Activations,
    probe: Tap = lambda _, x: x,
) -> tuple[Float[Array, "B T D"], Array, Array, Routing | None]:
    """One transformer block: x + attention(norm(x)), then x + ffn(norm(x)).

    Stores keys and values of the first entry.counts[b] tokens of row b at entry.positions[b, 0]
    onwards and returns the new residual stream, both buffers, and what a router chose.
    The buffers are the block's own, or those of all layers and `layer` its number.
    `probe(site, x) -> x` sees every named activation.
    """
    B, T, _ = x.shape
    cos_sin, positions, count = entry.cos_sin, entry.positions, entry.counts
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    x = probe("in", x)
    with jax.named_scope("attn"):
        y = probe("attn_norm", rms_norm(x, block.attn_norm.weight, config.norm_eps))
        q = linear(y, block.attn_q, activations).reshape(B, T, N, H)
        k = linear(y, block.attn_k, activations).reshape(B, T, K, H)
        v = linear(y, block.attn_v, activations).reshape(B, T, K, H)
        with jax.named_scope("rope"):
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        y, k_cache, v_cache = store_and_attend(
            q, k, v, k_cache, v_cache, positions, count, *layer, partitioning=entry.partitioning
        )
        y = y.reshape(B, T, N * H)
        x = probe("mid", x + probe("attn_out", linear(y, block.attn_output, activations)))
    with jax.named_scope("mlp"):
        y = probe("ffn_norm", rms_norm(x, block.ffn_norm.weight, config.norm_eps))
        routing = None
        if isinstance(block, MoEBlock):
            counted = jnp.arange(T, dtype=jnp.int32)[None] < count[:, None]
            active, partitioning = config.num_experts_per_token, entry.partitioning
            y, routing = moe_swiglu(
                y, counted, block, active, activations, partitioning=partitioning
            )
        else:
            y = swiglu(y, block, activations)
        x = probe("out", x + probe("ffn_out", y))
    return x, k_cache, v_cache, routing


# Layers of equal shapes and formats share one trace and one lowering, and what a CPU's compiler may
# not inline it optimizes a layer at a time: a module of many layers compiles quickly.
call_block = apart_on_a_cpu(run_block, static_argnames=("config", "activations"))


def probing(prefix: str, tap: Tap | None, capture: frozenset[str], into: dict[str, Array]) -> Tap:
    """Return a probe for `run_block`: it shows each site to `tap` and puts captured ones `into`."""

    def probe(site: str, x: Array) -> Array:
        name = prefix + site
        if tap is not None:
            x = tap(name, x)
        if name in capture:
            into[name] = x
        return x

    return probe
