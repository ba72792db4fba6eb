"""Mixture of experts: a router picks A of E feed-forward networks for each token (Mixtral).

Each expert works on the tokens that chose it, gathered into tiles, and on nothing else: the weights
of an expert that no token chose are not read, so whatever they hold never reaches the output. A
step of decoding is the same code with a tile of one token.

Dimensions: E experts, A active experts a token, P = tokens * A pairs of a token and an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from qllama_jax.carries import varying
from qllama_jax.matmul import Activations, matmul, matmul_expert
from qllama_jax.matmul.sharded import parts, weight_axes
from qllama_jax.params import MoEBlock
from qllama_jax.quants import Leaf
from qllama_jax.sharding import MeshAxes, Partitioning, spec

# Tokens of an expert that are multiplied at a time, at the most. More of them dequantize an expert
# less often, but the last tile of each expert is half empty on average.
LARGEST_TILE = 256


@struct.dataclass
class Routing:
    """The router's choice for each token, most probable expert first.

    experts: int32 `[B, T, A]`. weights: float32 `[B, T, A]`, what an expert's output is multiplied
    by; they add up to 1. Padding has a choice too, which is not computed.
    """

    experts: Leaf
    weights: Leaf


def route(x: Float[Array, "B T D"], router: Leaf, active: int) -> Routing:
    """Return the `active` largest of softmax(x @ router.T), renormalised (Jiang et al. 2024).

    The softmax is over all experts, in float32; of equally probable experts the one with the lower
    index comes first. `router` is a weight `[E, D]`; activations always meet it as floats, since a
    rounding that changes the choice changes the whole output. A token whose logits are not all
    finite has NaN for weights: an expert with -inf would never be chosen, and nobody would know.
    """
    logits = matmul(x, router).astype(jnp.float32)
    probabilities, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), active)
    weights = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
    # After the softmax: put in before it, NaN came out of jax 0.10's XLA for CPUs as 1 and 0.
    finite = jnp.all(jnp.isfinite(logits), axis=-1, keepdims=True)
    weights = jnp.where(finite, weights, np.float32(np.nan))
    return Routing(experts=experts.astype(jnp.int32), weights=weights)


def moe_swiglu(
    x: Float[Array, "B T D"],
    counted: Bool[Array, "B T"],
    block: MoEBlock,
    active: int,
    activations: Activations,
    *,
    tile_size: int | None = None,
    partitioning: Partitioning | None = None,
) -> tuple[Float[Array, "B T D"], Routing]:
    """Compute the sum over each token's experts e of weight_e down_e(silu(gate_e(x)) * up_e(x)).

    Args:
        x: normed activations.
        counted: False for padding, whose output is zero and which no expert computes.
        block: the router and the experts.
        active: A, experts a token.
        activations: as in `matmul`.
        tile_size: tokens that an expert multiplies at a time; None: picked from the shapes. It
            changes the result by float rounding at the most, if activations are not "auto".
        partitioning: how the block lies on a mesh, where each device computes what its own experts,
            or its own part of every expert, add to the output of its own rows.
    """
    if partitioning is None:
        return _sum_over_experts(x, counted, block, active, activations, tile_size)
    over_experts, over_ffn, _ = weight_axes(block.ffn_gate_exps.weight)
    together = (*over_experts, *over_ffn)
    rows = partitioning.dividing("batch", x.shape[0])
    by_row = spec(() if set(rows) & set(together) else rows)
    own_block, block_specs = parts(block)

    def on_a_device(x: Array, counted: Array, block: MoEBlock) -> tuple[Array, Routing]:
        part = lax.axis_index(over_experts) if over_experts else np.int32(0)
        return _sum_over_experts(
            x, counted, block, active, activations, tile_size, part=part, together=together
        )

    in_specs = by_row, by_row, block_specs
    return partitioning.call(on_a_device, in_specs, by_row, x, counted, own_block)


def _sum_over_experts(
    x: Float[Array, "B T D"],
    counted: Bool[Array, "B T"],
    block: MoEBlock,
    active: int,
    activations: Activations,
    tile_size: int | None,
    *,
    part: Int32[Array, ""] | np.int32 = np.int32(0),  # noqa: B008
    together: MeshAxes = (),
) -> tuple[Float[Array, "B T D"], Routing]:
    """Compute `moe_swiglu` where `block` holds the `part`-th so many of the experts, or all.

    What the devices along the mesh axes `together` find is added up.
    """
    B, T, D = x.shape
    E = block.ffn_gate_exps.weight.shape[0]
    routing = route(x, block.ffn_gate_inp.weight, active)
    tokens = x.reshape(B * T, D)
    weights = routing.weights.reshape(-1)
    pairs = B * T * active
    all_experts, _ = block.ffn_gate_inp.weight.shape
    size = _tile_size(pairs, all_experts) if tile_size is None else tile_size
    own = routing.experts - part * np.int32(E)
    here = counted[..., None] & (own >= 0) & (own < E)
    groups = _group(jnp.where(here, own, np.int32(E)).reshape(-1), E, size)

    def add_tile(out: Array, i: Array) -> tuple[Array, None]:
        tile = _tile(groups, i, size)

        def compute(out: Array) -> Array:
            token = tile.pairs // active
            y = _expert(tokens[token], block, tile.expert, activations).astype(jnp.float32)
            # What a tile has beyond its tokens goes nowhere: index B * T is dropped.
            row = jnp.where(tile.filled, token, B * T)
            return out.at[row].add(weights[tile.pairs][:, None] * y, mode="drop")

        return lax.cond(tile.filled[0], compute, lambda out: out, out), None

    # Each expert's last tile may be partly empty; with one token a tile none is.
    most_tiles = min(pairs, pairs // size + E)
    out = varying(jnp.zeros((B * T, D), jnp.float32), x, counted, block, part)
    out, _ = lax.scan(add_tile, out, jnp.arange(most_tiles, dtype=jnp.int32))
    if together:
        out = lax.psum(out, together)
    return out.reshape(B, T, D).astype(x.dtype), routing


def _tile_size(pairs: int, experts: int) -> int:
    """Return the power of two at or above the mean number of tokens an expert, bounded."""
    mean = -(-pairs // experts)
    return min(LARGEST_TILE, 1 << (mean - 1).bit_length())


class _Groups(NamedTuple):
    """Pairs sorted by expert. A pair's token is pair // A; its weight stands at the same index."""

    order: Array  # int32[P]: pairs, those of expert 0 first, those of padding last
    counts: Array  # int32[E]: pairs of each expert
    ends: Array  # int32[E]: where each expert's pairs end in `order`
    tiles: Array  # int32[E]: tiles of each expert
    tile_ends: Array  # int32[E]: where each expert's tiles end


def _group(chosen: Int32[Array, " P"], E: int, size: int) -> _Groups:
    """Group pairs by the expert that they chose, E where it is none."""
    counts = jnp.zeros((E,), jnp.int32).at[chosen].add(np.int32(1), mode="drop")
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    tiles = -(-counts // np.int32(size))
    ends, tile_ends = (jnp.cumsum(n, dtype=jnp.int32) for n in (counts, tiles))
    return _Groups(order, counts, ends, tiles, tile_ends)


class _Tile(NamedTuple):
    expert: Array  # int32
    pairs: Array  # int32[size]
    filled: Array  # bool[size]


def _tile(groups: _Groups, i: Int32[Array, ""], size: int) -> _Tile:
    """Return the i-th tile, all tiles of expert 0 first; past the last one it is empty."""
    E = groups.counts.size
    expert = jnp.minimum(jnp.sum(groups.tile_ends <= i, dtype=jnp.int32), E - 1)
    first = groups.ends[expert] - groups.counts[expert]
    within = (i - (groups.tile_ends[expert] - groups.tiles[expert])) * size
    slots = first + within + np.arange(size, dtype=np.int32)
    filled = slots < groups.ends[expert]
    pairs = groups.order[jnp.minimum(slots, groups.order.size - 1)]
    return _Tile(expert, pairs, filled)


def _expert(
    x: Float32[Array, "n D"], block: MoEBlock, expert: Int32[Array, ""], activations: Activations
) -> Array:
    gate = matmul_expert(x, block.ffn_gate_exps.weight, expert, activations=activations)
    up = matmul_expert(x, block.ffn_up_exps.weight, expert, activations=activations)
    hidden = jax.nn.silu(gate) * up
    return matmul_expert(hidden, block.ffn_down_exps.weight, expert, activations=activations)
