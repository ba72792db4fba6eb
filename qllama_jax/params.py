"""The model's weights as pytrees whose paths are the tensor names of the file.

`blk.3.attn_q.weight` is `params.blk[3].attn_q.weight`. A weight matrix is a packed `Block` or a
plain array `[out, in]`; norms and biases are plain float32. The one leaf that is
not in the file is `rope`, a few hundred bytes derived at load.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int32

from qllama_jax.matmul.stacks import WeightStack
from qllama_jax.quants import Leaf
from qllama_jax.rope import RopeFrequencies
from qllama_jax.sharding import Partitioning


@struct.dataclass
class Linear:
    """x @ weight.T + bias, weight `[out, in]`; also the scale of a norm, weight `[D]`."""

    weight: Leaf
    bias: Leaf = None


@struct.dataclass
class DenseBlock:
    """One transformer block with a SwiGLU feed-forward layer."""

    attn_norm: Linear
    attn_q: Linear
    attn_k: Linear
    attn_v: Linear
    attn_output: Linear
    ffn_norm: Linear
    ffn_gate: Linear
    ffn_up: Linear
    ffn_down: Linear


@struct.dataclass
class MoEBlock:
    """One transformer block whose feed-forward layer is a mixture of E experts.

    The weights of the experts are stacked, `[E, out, in]`; `ffn_gate_inp` is the router, `[E, D]`.
    """

    attn_norm: Linear
    attn_q: Linear
    attn_k: Linear
    attn_v: Linear
    attn_output: Linear
    ffn_norm: Linear
    ffn_gate_inp: Linear
    ffn_gate_exps: Linear
    ffn_up_exps: Linear
    ffn_down_exps: Linear


@struct.dataclass
class StackedBlocks:
    """L blocks for a loop over layers: the weights are stacks, others `[L, ...]`.

    XLA's time to compile and the memory that it keeps grow with the layers of a module.
    """

    block: DenseBlock | MoEBlock  # of `WeightStack`s and arrays

    def __len__(self) -> int:
        """L, the number of layers."""
        return self.block.attn_norm.weight.shape[0]

    def __iter__(self) -> Iterator[DenseBlock | MoEBlock]:
        """Yield the block of each layer."""
        return (self[layer] for layer in range(len(self)))

    def __getitem__(self, layer: int | Int32[Array, ""]) -> DenseBlock | MoEBlock:
        """Return the block of a layer, 0..L-1, which may be traced; nothing is copied."""
        if not isinstance(layer, Tracer):
            layer = operator.index(layer)
            if not 0 <= layer < len(self):
                raise IndexError(f"layer {layer} of {len(self)}")
        layer = jnp.asarray(layer, jnp.int32)

        def pick(leaf: WeightStack | Array) -> Any:
            if isinstance(leaf, WeightStack):
                return leaf.at(layer)
            return lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

        return jax.tree.map(pick, self.block, is_leaf=lambda leaf: isinstance(leaf, WeightStack))


@struct.dataclass
class Params:
    """All weights. `output` is None where the file ties it to `token_embd`, which is kept once.

    `blk` is `StackedBlocks` where layers shall be worked on by a loop: see `Model.looped_params`.
    `partitioning`, static, says how they lie on a mesh; None on one device.
    """

    token_embd: Linear
    blk: tuple[DenseBlock | MoEBlock, ...] | StackedBlocks
    output_norm: Linear
    output: Linear | None
    rope: RopeFrequencies
    partitioning: Partitioning | None = struct.field(pytree_node=False, default=None)
