"""A tensor table and a mesh -> params of shapes instead of arrays: no byte of a weight is read.

They lower and compile as the weights themselves would, so that what a model takes on a machine is
known before there is the machine, or the file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float32

from qllama_jax.config import ModelConfig
from qllama_jax.params import Params
from qllama_jax.read_params import read_params
from qllama_jax.shard_plan import ShardPlan
from qllama_jax.shard_reader import ShardReader
from qllama_jax.tensor_file import GGUFFile


def abstract_params(file: GGUFFile, config: ModelConfig, plan: ShardPlan) -> Params:
    """Return what `load` would make of the file on the plan's mesh, of `jax.ShapeDtypeStruct`s.

    Raises GGUFError for tensors that are missing, too many, or of another shape than the config's.
    """
    params = read_params(_ShapeReader(file, False, None, plan), config)
    return dataclasses.replace(params, partitioning=plan.partitioning)


class _ShapeReader(ShardReader):
    """A `ShardReader` that reads nothing; norms, biases and factors of frequencies are ones."""

    def vector(self, name: str, size: int) -> Float32[np.ndarray, " size"]:
        """Ones."""
        self._claim(name, (size,))
        return np.ones(size, np.float32)

    def place(self, tree: Any) -> Any:
        """Shapes of arrays that are whole on every device."""
        sharding = self._plan.partitioning.sharding()
        return jax.tree.map(lambda x: _shape(x.shape, x.dtype, sharding), tree)

    def place_bias(self, name: str, bias: np.ndarray | None) -> Any:
        """The shape of a bias, cut as the layer's outputs are."""
        if bias is None:
            return None
        over_out, _ = self._plan.cuts[f"{name}.weight"]
        return _shape(bias.shape, bias.dtype, self._plan.partitioning.sharding(over_out))

    def _array(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, of_part: Any
    ) -> Any:
        return _shape(shape, dtype, sharding)


def _shape(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
