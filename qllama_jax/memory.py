"""What a model and a context for it need, against what is free: refused before it is allocated."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qllama_jax.config import ModelConfig
from qllama_jax.errors import OutOfMemoryError
from qllama_jax.free_memory import free_bytes
from qllama_jax.sharding import Partitioning

SMALLEST_CACHE = 128  # positions that a generation starts with


class Needs(NamedTuple):
    """Bytes to allocate for a context; `loaded` ones, of weights, are there already."""

    weights: int = 0
    cache: int = 0
    workspace: int = 0
    loaded: int = 0

    @property
    def total(self) -> int:
        """Bytes to allocate, all together."""
        return self.weights + self.cache + self.workspace


def check_fits(
    what: str,
    needs: Callable[[int], Needs],
    context: int,
    noun: str = "context",
    mesh: Mesh | None = None,
) -> None:
    """Refuse a context, `needs(context)`, for which the default device has no room.

    On a mesh `needs` are those of each device. They must not fall as the context grows. Where
    nobody knows what is free, nothing is refused.

    Raises:
        OutOfMemoryError: `what`, what it needs, what is free and the longest context that fits.
    """
    wanted, free = needs(context), _free_bytes(mesh)
    if free is None or wanted.total <= free:
        return
    longest = bisect.bisect_right(range(1, context), free, key=lambda n: needs(n).total)
    parts = {
        "weights": wanted.weights,
        "KV cache": wanted.cache,
        "workspace": wanted.workspace,
    }
    listed = " + ".join(f"{name} {_megabytes(size)}" for name, size in parts.items() if size)
    beside = f", beside weights of {_megabytes(wanted.loaded)}" if wanted.loaded else ""
    fits = f"the longest {noun} that fits is {longest}" if longest else f"no {noun} fits"
    raise OutOfMemoryError(
        f"{what}: needs {listed} = {_megabytes(wanted.total)} of memory{beside};"
        f" {_megabytes(free)} are free; {fits}",
        weights=wanted.weights or wanted.loaded,
        cache=wanted.cache,
        workspace=wanted.workspace,
        free=free,
        longest_context=longest,
    )


def _free_bytes(mesh: Mesh | None) -> int | None:
    if mesh is None:
        return free_bytes(default_device())
    devices = mesh.local_devices
    free = free_bytes(devices[0])
    # Several devices that are CPUs share one memory.
    return free // len(devices) if free and devices[0].platform == "cpu" else free


def default_device() -> Any:
    """Return the device on which arrays are made."""
    return next(iter(jax.device_put(np.int32(0)).devices()))


def cache_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    itemsize: int = 4,
    partitioning: Partitioning | None = None,
) -> int:
    """Return the bytes of `init_cache`'s keys and values, of `itemsize` bytes a number.

    On a mesh those of one device.
    """
    a_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    parts = 1
    if partitioning is not None:
        over = partitioning.cache_axes(batch_size, config.num_heads, config.num_kv_heads)
        parts = partitioning.size((*over[0], *over[1]))
    return batch_size * max_length * a_position * itemsize // parts


def workspace_bytes(config: ModelConfig, batch_size: int, tokens: int) -> int:
    """Return a bound on what is allocated beside weights and cache: `tokens` a row at a time.

    In float32 arrays, as XLA takes them on a CPU: for a layer 2.6 of each of its widths, up to 64
    tokens 23, twice for the two layers that may be under way; for choosing a token 15 of the
    logits; and 64 MiB for tiles of dequantized weights, or for the integers' sums that a CPU stores
    of a few rows (`int8_kernel.WHOLE_SUMS`, of two products in each layer).
    """
    c, rows = config, batch_size * tokens
    width = c.embed_dim + (c.num_heads + c.num_kv_heads) * c.head_dim + c.ffn_dim
    layers = max(6 * rows, 48 * min(rows, 64)) * width
    return 4 * max(layers, 16 * batch_size * c.vocab_size) + 2**26


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
