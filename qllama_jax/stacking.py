"""Blocks -> `StackedBlocks`, where the loader has put the weights of layers side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from qllama_jax.matmul.stacks import WeightStack
from qllama_jax.params import DenseBlock, Linear, MoEBlock, StackedBlocks


class FormatStack(NamedTuple):
    """Weights of one name and one format that lie one after the other, and their layers."""

    weights: Any  # a leaf `[n, out, in]`, or `[n E, out, in]` where each layer has E experts
    layers: list[int]  # n of them
    experts: int | None = None  # E


def stack_blocks(
    blocks: Sequence[DenseBlock | MoEBlock], stacks: Mapping[str, Sequence[FormatStack]]
) -> StackedBlocks | None:
    """Return the blocks as stacks, or None where a leaf has none.

    `stacks` are of weights that the blocks hold, by their names within a block ("attn_q.weight").
    """
    (kind, *others) = {type(block) for block in blocks}
    if others:
        return None
    fields = {}
    for field in dataclasses.fields(kind):
        name = field.name
        layers = [getattr(block, name) for block in blocks]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        small = 2 if name == "ffn_gate_inp" else 1
        weight = _stack(stacks.get(f"{name}.weight", ()), len(layers)) or _copied(weights, small)
        bias = _copied(biases, 1)
        if weight is None or (bias is None and biases != [None] * len(biases)):
            return None
        fields[name] = Linear(weight=weight, bias=bias)
    return StackedBlocks(kind(**fields))


def _stack(stacks: Sequence[FormatStack], num_layers: int) -> WeightStack | None:
    """Return stacks that have every layer, None where one has none."""
    places = {
        layer: (kind, index)
        for kind, stack in enumerate(stacks)
        for index, layer in enumerate(stack.layers)
    }
    if not stacks or places.keys() != set(range(num_layers)):
        return None
    kind, index = zip(*(places[layer] for layer in range(num_layers)), strict=True)
    return WeightStack(tuple(stack.weights for stack in stacks), stacks[0].experts, kind, index)


def _copied(leaves: list[Any], ndim: int) -> Array | None:
    """Return a copy of small arrays as one, None where they are something else."""
    if not all(isinstance(leaf, jax.Array) and leaf.ndim == ndim for leaf in leaves):
        return None
    return jax.device_put(np.stack([np.asarray(leaf) for leaf in leaves]))
