"""Params, tokens and a cache in; hidden states or logits and the new cache out.

Everything here is a pure function. Nothing is donated, so a cache can be used again; nothing
raises inside a trace, so a row that goes wrong is poisoned (see `hidden_states`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from qllama_jax.cache import KVCache, buffer_shapes
from qllama_jax.config import ModelConfig
from qllama_jax.layers import rms_norm
from qllama_jax.matmul import Activations, check_activations, matmul
from qllama_jax.moe import Routing
from qllama_jax.params import Linear, Params, StackedBlocks
from qllama_jax.rope import rope_cos_sin
from qllama_jax.transformer_block import (
    BLOCK_SITES,
    Entry,
    Tap,
    call_block,
    probing,
    run_block,
)


def sites(config: ModelConfig) -> tuple[str, ...]:
    """Return the names that `tap` sees and `capture` takes, in the order of computation."""
    return tuple(f"blk.{i}.{site}" for i in range(config.num_layers) for site in BLOCK_SITES)


@functools.partial(jax.jit, static_argnames=("config", "activations", "dtype"))
def forward(
    params: Params,
    tokens: Int32[Array, "B T"],
    cache: KVCache,
    *,
    config: ModelConfig,
    lengths: Int32[Array, " B"] | None = None,
    activations: Activations = "float",
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float32[Array, "B T V"], KVCache]:
    """Return the logits of every position and the cache with the tokens' keys and values.

    Equivalent to `hidden_states`, then `unembed`; where only the last position is wanted, take it
    before `unembed`.

    Args:
        params: the weights.
        tokens: ids, `int32[B, T]`, rows right-padded with anything. (Of numpy's int64 JAX takes the
            lower half, unsaid, before this function sees it.)
        cache: what came before, `cache.lengths[b]` positions of row b; the tokens follow there.
        config: what the file says (static).
        lengths: `int32[B]`, tokens of each row that count; None: all T.
        activations: how activations enter a product with packed weights, see `matmul` (static).
        dtype: of the activations between the products and of what enters them, float32 or bfloat16
            (static); a product, a norm and a softmax sum up in float32 all the same.

    Raises:
        ValueError: shapes that do not fit each other, or a dtype that is none of the two.

    A token id outside 0..V-1 or a position past the cache's end makes that row's logits NaN.
    """
    hidden, cache, _ = hidden_states(
        params, tokens, cache, config=config, lengths=lengths, activations=activations, dtype=dtype
    )
    return unembed(params, hidden, config=config, activations=activations), cache


def hidden_states(
    params: Params,
    tokens: Int32[Array, "B T"] | None,
    cache: KVCache,
    *,
    config: ModelConfig,
    lengths: Int32[Array, " B"] | None = None,
    inputs_embeds: Float[Array, "B T D"] | None = None,
    tap: Tap | None = None,
    capture: Sequence[str] = (),
    activations: Activations = "float",
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T D"], KVCache, dict[str, Array]]:
    """Return the residual stream after the last block (before the output norm), cache and aux.

    aux holds the captured activations by their names and, for every block that is a mixture of
    experts, the router's choices: "blk.3.experts" int32 `[B, T, A]` and "blk.3.expert_weights"
    float32 `[B, T, A]` (see `Routing`).

    Args:
        params: the weights.
        tokens: ids, `int32[B, T]`; may be None where `inputs_embeds` is given.
        cache: as in `forward`.
        config: as in `forward`.
        lengths: as in `forward`.
        inputs_embeds: `[B, T, D]`, takes the place of the tokens' embeddings.
        tap: `tap(name, x) -> x` is called at each of `sites(config)` and may change x.
        capture: names out of `sites(config)` whose activations are returned in aux.
        activations: as in `forward`.
        dtype: as in `forward`; `inputs_embeds` come with their own.

    Raises:
        ValueError: shapes that do not fit each other, an unknown name in `capture`, or a dtype as
            in `forward`.

    A row is poisoned, its hidden states NaN and its cache length above the cache's room, by an id
    outside the vocabulary, a position past the cache's end, or a cache row that was poisoned.
    """
    check_activations(activations)
    _check_sites(config, capture)
    if inputs_embeds is None and tokens is None:
        raise ValueError("hidden_states: neither tokens nor inputs_embeds")
    B, T = (tokens if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
    _check_shapes(config, params, cache, B, T, lengths, inputs_embeds)
    counts = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
    x, entry = enter(
        params,
        tokens,
        cache.lengths,
        counts,
        config=config,
        max_length=cache.max_length,
        inputs_embeds=inputs_embeds,
        dtype=dtype,
    )
    aux: dict[str, Array] = {}
    if isinstance(params.blk, StackedBlocks):
        if tap is not None or capture:
            raise ValueError("hidden_states: tap and capture want blocks each, not in stacks")
        (x, k, v), routing = _loop_over(
            params.blk, x, cache, entry, config=config, activations=activations
        )
        if routing is not None:
            for i in range(config.num_layers):
                aux |= _aux(i, jax.tree.map(lambda of_layers, i=i: of_layers[i], routing))
        return leave(x, entry), KVCache(k=k, v=v, lengths=entry.lengths), aux
    keys, values = [], []
    for i, block in enumerate(params.blk):
        arguments = (block, x, cache.k[i], cache.v[i], entry)
        if tap is None and not capture:
            x, k, v, routing = call_block(*arguments, config=config, activations=activations)
        else:
            probe = probing(f"blk.{i}.", tap, frozenset(capture), aux)
            x, k, v, routing = run_block(
                *arguments, config=config, activations=activations, probe=probe
            )
        keys.append(k)
        values.append(v)
        if routing is not None:
            aux |= _aux(i, routing)
    cache = KVCache(k=tuple(keys), v=tuple(values), lengths=entry.lengths)
    return leave(x, entry), cache, aux


def _loop_over(
    blocks: StackedBlocks, x: Float[Array, "B T D"], cache: KVCache, entry: Entry, **static: Any
) -> tuple[tuple[Any, Any, Any], Routing | None]:
    """Run the blocks as a loop; return x, the cache's arrays and what routers chose, `[L, ...]`."""

    def step(carry: tuple[Any, Any, Any], layer: Array) -> tuple[tuple, Routing | None]:
        x, k, v, routing = run_block(blocks[layer], *carry, entry, layer, **static)
        return (x, k, v), routing

    return lax.scan(step, (x, cache.k, cache.v), jnp.arange(len(blocks), dtype=jnp.int32))


def _aux(layer: int, routing: Routing) -> dict[str, Array]:
    return {
        f"blk.{layer}.experts": routing.experts,
        f"blk.{layer}.expert_weights": routing.weights,
    }


def enter(
    params: Params,
    tokens: Int32[Array, "B T"] | None,
    start: Int32[Array, " B"],
    counts: Int32[Array, " B"],
    *,
    config: ModelConfig,
    max_length: int,
    inputs_embeds: Float[Array, "B T D"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T D"], Entry]:
    """Return the residual stream before the first block, and what the blocks need beside it.

    counts[b] tokens of row b follow start[b] positions of a cache with room for `max_length`.
    """
    check_dtype(dtype)
    T = (tokens if inputs_embeds is None else inputs_embeds).shape[1]  # type: ignore[union-attr]
    if params.partitioning is not None:
        tokens, start, counts = params.partitioning.whole((tokens, start, counts))
    bad = (start + counts > max_length) | (counts < 0) | (counts > T)
    if inputs_embeds is None:
        assert tokens is not None
        bad |= _any_outside_vocabulary(tokens, counts, config.vocab_size)
        x = embed(params, tokens).astype(dtype)
    else:
        x = inputs_embeds
    count = jnp.where(bad, 0, counts)  # nothing of a poisoned row is written
    lengths = jnp.where(bad, max_length + 1, start + counts)
    start = jnp.minimum(start, max_length)
    positions = start[:, None] + np.arange(T, dtype=np.int32)[None]
    with jax.named_scope("rope"):
        cos_sin = rope_cos_sin(params.rope, positions)
    return x, Entry(cos_sin, positions, count, lengths, bad, params.partitioning)


def leave(x: Float[Array, "B T D"], entry: Entry) -> Float[Array, "B T D"]:
    """Return the residual stream after the last block, NaN in poisoned rows."""
    return jnp.where(entry.bad[:, None, None], np.asarray(np.nan, x.dtype), x)


def embed(params: Params, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the tokens' rows of the embedding; ids outside it are clamped, not diagnosed."""
    table = params.token_embd.weight
    rows = jnp.clip(tokens, 0, table.shape[0] - 1)
    return table[rows] if isinstance(table, jax.Array) else table.dequantize_rows(rows)


def unembed(
    params: Params,
    hidden: Float[Array, "*batch D"],
    *,
    config: ModelConfig,
    activations: Activations = "float",
) -> Float32[Array, "*batch V"]:
    """Compute output(rms_norm(hidden)): the logits that `hidden` stands for.

    Takes any residual stream, so that of an inner block gives the logit lens.
    """
    with jax.named_scope("output"):
        output: Linear = params.token_embd if params.output is None else params.output
        x = rms_norm(hidden, params.output_norm.weight, config.norm_eps)
        logits = matmul(x, output.weight, activations=activations).astype(jnp.float32)
        # Each device gets all of them, so that choosing a token is the same on a mesh.
        return logits if params.partitioning is None else params.partitioning.whole(logits)


def _any_outside_vocabulary(
    tokens: Int32[Array, "B T"], count: Int32[Array, " B"], vocab_size: int
) -> Bool[Array, " B"]:
    T = tokens.shape[1]
    counted = np.arange(T, dtype=np.int32)[None] < count[:, None]
    return jnp.any(counted & ((tokens < 0) | (tokens >= vocab_size)), axis=1)


def check_dtype(dtype: DTypeLike) -> None:
    """Raise ValueError unless activations may be of this dtype."""
    try:
        known = jnp.dtype(dtype) in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype={dtype!r}: expected float32 or bfloat16")


def _check_sites(config: ModelConfig, capture: Sequence[str]) -> None:
    unknown = sorted(set(capture) - set(sites(config)))
    if unknown:
        raise ValueError(
            f"capture: no site {unknown[0]!r}; there are blk.0 to blk.{config.num_layers - 1} with "
            + ", ".join(BLOCK_SITES)
        )


def _check_shapes(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    B: int,
    T: int,
    lengths: Array | None,
    inputs_embeds: Array | None,
) -> None:
    if T == 0:
        raise ValueError("0 tokens a row, expected at least 1")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"{B} rows of tokens, but lengths of shape {lengths.shape}")
    if inputs_embeds is not None and inputs_embeds.shape[2:] != (config.embed_dim,):
        wanted = (B, T, config.embed_dim)
        raise ValueError(f"inputs_embeds of shape {inputs_embeds.shape}, wanted {wanted}")
    if cache.is_stacked != isinstance(params.blk, StackedBlocks):
        found, wanted = ("one array", "one each") if cache.is_stacked else ("one each", "one array")
        raise ValueError(f"the layers' cache is {found}, wanted {wanted}, as params.blk is")
    wanted = buffer_shapes(config, B, cache.max_length, stacked=cache.is_stacked)
    for what, buffers, shape in zip(("keys", "values"), (cache.k, cache.v), wanted, strict=True):
        layers, found = len(buffers), {leaf.shape for leaf in jax.tree.leaves(buffers)}
        layer = shape
        if cache.is_stacked:
            layer, found = shape[1:], {whole[1:] for whole in found}
        if layers != config.num_layers or found != {layer}:
            raise ValueError(
                f"{B} rows of tokens need a cache of {config.num_layers} layers of {layer} of"
                f" {what}, found {layers} of {', '.join(map(str, sorted(found)))}"
            )
    # Rows padded beyond the cache's end are fine where their lengths say that the rest fits.
    if lengths is None and cache.max_length < T:
        raise ValueError(f"{T} tokens a row do not fit a cache of {cache.max_length} positions")
