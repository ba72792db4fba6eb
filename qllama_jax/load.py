"""A GGUF file -> a `Model`: what is asked for, whether it fits, and the reader that it takes."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import jax
from jax.sharding import Mesh

from qllama_jax.config import ModelConfig
from qllama_jax.memory import SMALLEST_CACHE, Needs, cache_bytes, check_fits, workspace_bytes
from qllama_jax.metadata import Metadata
from qllama_jax.model_file import read_model_file
from qllama_jax.params import Params, StackedBlocks
from qllama_jax.read_params import read_params
from qllama_jax.shard_plan import ShardPlan, Uneven, plan_shards
from qllama_jax.shard_reader import ShardReader
from qllama_jax.sharding import Partitioning, Rules
from qllama_jax.stacking import stack_blocks
from qllama_jax.tensor_file import GGUFFile
from qllama_jax.tensor_reader import Layout, Progress, TensorReader
from qllama_jax.tokenizer import Tokenizer
from qllama_jax.tokenizer.tokenizer import check_chat_template
from qllama_jax.weight_bytes import weight_bytes


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: `params` and `config` for the pure functions, `tokenizer` for text."""

    params: Params
    config: ModelConfig
    metadata: Metadata
    path: Path
    chat_template: str | None = None
    # Blocks and the same in stacks, see `looped_params`.
    _stacked: tuple[tuple, StackedBlocks] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # `dataclasses.replace(model, params=...)` shall neither multiply with the old weights nor
        # keep them in memory.
        if self._stacked is not None and self._stacked[0] is not self.params.blk:
            object.__setattr__(self, "_stacked", None)

    @property
    def looped_params(self) -> Params | None:
        """`params` with `StackedBlocks`, the same memory; None where blocks have no stacks."""
        if self._stacked is None:
            return None
        return dataclasses.replace(self.params, blk=self._stacked[1])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer, built when it is first asked for; GGUFError if it has none."""
        return Tokenizer.from_metadata(self.metadata, chat_template=self.chat_template)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has a vocabulary; without one the model takes and gives token ids."""
        return self.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    @property
    def mesh(self) -> Mesh | None:
        """The mesh over which the weights are cut."""
        partitioning = self.params.partitioning
        return None if partitioning is None else partitioning.mesh

    @cached_property
    def device_nbytes(self) -> int:
        """Bytes of the weights on one device; all of them where there is no mesh."""
        if self.mesh is None:
            return self.nbytes
        leaves = jax.tree.leaves(self.params)
        shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
        return sum(
            math.prod(shape) * leaf.dtype.itemsize
            for leaf, shape in zip(leaves, shapes, strict=True)
        )

    def __repr__(self) -> str:
        """Sizes, not arrays."""
        return f"Model({self.path.name!r}, {self.nbytes / 1e6:.1f} MB of weights, {self.config})"


def load(
    path: str | os.PathLike[str],
    *,
    gqa: int | None = None,
    chat_template: str | None = None,
    check_tensors: bool = True,
    layout: Layout = "auto",
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    uneven: Uneven = "refuse",
) -> Model:
    """Load a Llama GGUF file; weights go to the default device or over a mesh, packed.

    GGML, GGMF and GGJT files, from before GGUF, are loaded alike.

    On a CPU equal weights of all layers share one piece of memory, which is free again when the
    last of them is gone: to keep some layers of a model alone, copy them.

    Args:
        path: the file, or any part of a split one; or its name on the Hugging Face hub, as
            "hf://owner/repo/file.gguf" or "owner/repo:Q4_K_M".
        gqa: query heads a key-value head, for files from before GGUF alone: their tensors tell it,
            and a number given here must agree.
        chat_template: a Jinja template to use in place of the file's.
        check_tensors: refuse NaN and infinity among the weights and the scales of blocks.
        layout: "auto" arranges the weights as the default backend multiplies them fastest; "file"
            keeps the blocks of the file, which every backend can multiply.
        progress: called with (bytes read, bytes in all) after each tensor; on a mesh a tensor
            counts as a whole, though a process reads its own devices' parts alone.
        mesh: the devices to cut the model over, with axes "data" and "model" (and "expert"), or
            others that `rules` name. The weights are then in the blocks of the file.
        rules: {logical axis: mesh axis, several or None}, in place of some of
            `sharding.DEFAULT_RULES`: "batch", "vocab", "heads", "kv_heads", "ffn", "experts" and
            "embed".
        uneven: what becomes of a weight that the mesh does not divide: "refuse" raises, "replicate"
            keeps it whole on every device and warns.

    Raises:
        GGUFError: the file is damaged, of another architecture, has a tensor too few, too many or
            of another shape than its metadata say, or a weight that is not finite.
        ValueError: `gqa` is given for a GGUF file; `layout` or `uneven` is none of the two; a rule
            names what is not there; the mesh does not divide a weight (the error names the largest
            mesh that does).
        TypeError: `gqa` is no integer, or `chat_template` no text.
        OutOfMemoryError: the weights, a cache of 128 positions and what computing takes do not fit
            the memory that is free; no weight has been read.
    """
    check_chat_template(chat_template)
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r}: expected one of {get_args(Layout)}")
    if uneven not in get_args(Uneven):
        raise ValueError(f"uneven={uneven!r}: expected one of {get_args(Uneven)}")
    if mesh is None and rules is not None:
        raise ValueError("load: rules, but no mesh for them")
    if not isinstance(mesh, Mesh | None):
        raise TypeError(f"mesh={mesh!r}: expected a jax.sharding.Mesh, as jax.make_mesh makes it")
    file = read_model_file(path, gqa=gqa)
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[1] if embedding is not None and len(embedding.shape) == 2 else None
    config = ModelConfig.from_metadata(file.metadata, vocab_size=rows)
    if mesh is None:
        _check_fits(file, config, layout)
        reader = TensorReader(file, check_tensors, progress, layout)
        params = read_params(reader, config)
        assert isinstance(params.blk, tuple)
        blocks = stack_blocks(params.blk, reader.stacks())
        stacked = None if blocks is None else (params.blk, blocks)
    else:
        plan = plan_shards(file, config, Partitioning.of(mesh, rules), uneven)
        _check_fits(file, config, layout, plan)
        params = read_params(ShardReader(file, check_tensors, progress, plan), config)
        params, stacked = dataclasses.replace(params, partitioning=plan.partitioning), None
    return Model(params, config, file.metadata, file.path, chat_template, stacked)


def _check_fits(
    file: GGUFFile, config: ModelConfig, layout: Layout, plan: ShardPlan | None = None
) -> None:
    largest = max((max(tensor.shape) for tensor in file.tensors.values()), default=0)
    c = config
    widths = c.embed_dim, c.ffn_dim, c.num_heads * c.head_dim, c.vocab_size
    if max(widths) > largest or c.num_layers > len(file.tensors):
        return  # no tensor is so large: that will be refused as what it is
    partitioning = None if plan is None else plan.partitioning
    # What is not packed, or lies on a mesh, is there twice for a time: as read and as blocks.
    twice = max((tensor.nbytes for tensor in file.tensors.values()), default=0)
    if plan is not None:
        twice //= plan.partitioning.mesh.size
    needs = Needs(
        weights=weight_bytes(file, layout) if plan is None else plan.device_bytes,
        cache=cache_bytes(config, 1, SMALLEST_CACHE, partitioning=partitioning),
        workspace=max(workspace_bytes(config, 1, SMALLEST_CACHE), twice),
    )
    what = f"{file.path}: a context of {SMALLEST_CACHE}"
    mesh = None if partitioning is None else partitioning.mesh
    check_fits(what, lambda _: needs, SMALLEST_CACHE, mesh=mesh)
