"""A file's tensor table and a mesh -> over which mesh axes a weight is cut, before it is read."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qllama_jax.config import ModelConfig
from qllama_jax.errors import quoted
from qllama_jax.sharding import WEIGHT_AXES, MeshAxes, Partitioning
from qllama_jax.tensor_file import GGUFFile, GGUFTensor
from qllama_jax.tensor_types import BLOCK_SIZES

# What becomes of a weight that the mesh does not divide.
Uneven = Literal["refuse", "replicate"]

_NAME = re.compile(r"(blk\.\d+\.)?(\w+)(?:\.(\d+))?\.weight")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_STACKS = ("ffn_gate_inp", *_EXPERTS)  # whose first axis is that of the experts


@dataclass(frozen=True)
class ShardPlan:
    """How a file's weights lie on a mesh."""

    partitioning: Partitioning
    cuts: dict[str, tuple[MeshAxes, ...]]  # of *lead, out, in, by the weights' names
    device_bytes: int  # of all weights, on one device


class _Weight(NamedTuple):
    """A weight of the model, which may be a part of a tensor, or several."""

    name: str
    counts: tuple[int, ...]  # what can be cut of *lead, out, in: of the last, blocks
    block: int  # values of a block
    nbytes: int
    together: str  # weights that are computed with together are cut alike


class _Failure(NamedTuple):
    weight: _Weight
    place: int  # of the axis in the weight's shape
    logical: str
    axes: MeshAxes


def plan_shards(
    file: GGUFFile, config: ModelConfig, partitioning: Partitioning, uneven: Uneven
) -> ShardPlan:
    """Return where every weight is cut.

    Raises:
        ValueError: a weight that the mesh does not divide, with `uneven` "refuse". "replicate"
            keeps it whole on every device and warns.
    """
    weights = list(_weights(file, config))
    failures = [failure for weight in weights for failure in _failures(weight, partitioning)]
    if failures and uneven == "refuse":
        raise ValueError(f"{file.path}: {_refusal(failures[0], weights, partitioning)}")
    if failures:
        names = {failure.weight.name for failure in failures}
        others = f"; and so are {len(names) - 1} others" if len(names) > 1 else ""
        reason = _reason(failures[0], partitioning)
        warnings.warn(f"{file.path}: not cut, so replicated: {reason}{others}", stacklevel=3)
    whole = {(failure.weight.together, failure.logical) for failure in failures}
    cuts = {
        weight.name: tuple(
            () if (weight.together, logical) in whole else axes
            for logical, axes in _wanted(weight.name, partitioning)
        )
        for weight in weights
    }
    device_bytes = sum(
        weight.nbytes // math.prod(map(partitioning.size, cuts[weight.name])) for weight in weights
    )
    for name, count in _vectors(file, config):
        over_out = cuts.get(name.replace(".bias", ".weight"), ((),))[-2:][0]
        device_bytes += 4 * count // (partitioning.size(over_out) if name.endswith("bias") else 1)
    return ShardPlan(partitioning, cuts, device_bytes)


def _weights(file: GGUFFile, config: ModelConfig) -> Iterator[_Weight]:
    """Yield the weights that the tensors hold; what is none of the model's is refused later."""
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        prefix, stem, expert = match[1] or "", match[2], match[3]
        if stem == "attn_qkv" and len(tensor.shape) == 2:
            for part, out in _fused(config):
                nbytes = tensor.nbytes * out // tensor.shape[1]
                yield _weight(f"{prefix}{part}.weight", tensor, (out,), nbytes)
        elif expert is not None:
            if expert == "0" and f"{stem}_exps" in WEIGHT_AXES:
                yield from _separate(file, prefix, stem, config.num_experts)
        elif stem in WEIGHT_AXES:
            out = tensor.shape[:0:-1]
            missing = len(WEIGHT_AXES[stem]) - len(tensor.shape)
            if missing == 1 and config.num_experts == 1 and stem in _STACKS:
                out = (1, *out)  # a stack of one, as ggml writes its shape
            elif missing:
                continue
            yield _weight(name, tensor, out, tensor.nbytes)


def _vectors(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield the names and lengths of norms and biases, float32 whatever they are in the file."""
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 1 and name.endswith("attn_qkv.bias"):
            for part, count in _fused(config):
                yield name.replace("attn_qkv", part), count
        elif len(tensor.shape) == 1:
            yield name, tensor.shape[0]


def _fused(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield the projections that one tensor may hold, and the rows of each."""
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    for part, count in zip(("attn_q", "attn_k", "attn_v"), heads, strict=True):
        yield part, count * config.head_dim


def _weight(name: str, tensor: GGUFTensor, out: tuple[int, ...], nbytes: int) -> _Weight:
    block, _ = BLOCK_SIZES[tensor.qtype]
    *block_name, stem, _ = name.split(".")
    together = f"{block_name} experts" if stem in _EXPERTS else name
    return _Weight(name, (*out, tensor.shape[0] // block), block, nbytes, together)


def _separate(file: GGUFFile, prefix: str, stem: str, experts: int) -> Iterator[_Weight]:
    """Yield the weight of experts that are a tensor each; of several formats, it has one part."""
    tensors = [file.tensors.get(f"{prefix}{stem}.{e}.weight") for e in range(experts)]
    found = [tensor for tensor in tensors if tensor is not None and len(tensor.shape) == 2]
    if not found:
        return
    # The largest blocks decide, where experts differ in format.
    largest = max(found, key=lambda tensor: BLOCK_SIZES[tensor.qtype][0])
    count = len(found) if len({tensor.qtype for tensor in found}) == 1 else 1
    name, nbytes = f"{prefix}{stem}_exps.weight", sum(tensor.nbytes for tensor in found)
    yield _weight(name, largest, (count, *largest.shape[:0:-1]), nbytes)


def _wanted(name: str, partitioning: Partitioning) -> Iterator[tuple[str | None, MeshAxes]]:
    """Yield each axis's logical name and mesh axes; the first that wants a mesh axis has it."""
    taken: set[str] = set()
    for logical in WEIGHT_AXES[name.split(".")[-2]]:
        axes = tuple(axis for axis in partitioning.axes(logical) if axis not in taken)
        taken |= set(axes)
        yield logical, axes


def _failures(weight: _Weight, partitioning: Partitioning) -> Iterator[_Failure]:
    for i, (logical, axes) in enumerate(_wanted(weight.name, partitioning)):
        if logical is not None and weight.counts[i] % partitioning.size(axes):
            yield _Failure(weight, i, logical, axes)


def _reason(failure: _Failure, partitioning: Partitioning) -> str:
    weight, place, logical, axes = failure
    count = weight.counts[place]
    if place == len(weight.counts) - 1:
        found = f"{count * weight.block} inputs in {count} blocks of {weight.block}"
    elif place == len(weight.counts) - 2:
        found = f"{count} outputs"
    else:
        found = f"{count} experts" if count > 1 else "experts that differ in format"
    over = " x ".join(f"{axis!r} of {partitioning.mesh.shape[axis]}" for axis in axes)
    what = f"tensor {quoted(weight.name)}: axis {logical!r}, {found}"
    return f"{what}, is not divided by mesh axis {over}"


def _refusal(failure: _Failure, weights: list[_Weight], partitioning: Partitioning) -> str:
    largest = ", ".join(f"{axis!r}: {size}" for axis, size in _largest(weights, partitioning))
    return (
        f"{_reason(failure, partitioning)}; the largest mesh within this one that divides all is"
        f" {{{largest}}}. uneven='replicate' keeps such weights whole on every device,"
        f" rules={{{failure.logical!r}: None}} all of that axis"
    )


def _largest(weights: list[_Weight], partitioning: Partitioning) -> list[tuple[str, int]]:
    """Return the largest mesh, of axes no longer than those there are, that cuts every weight."""
    needs = {
        (weight.counts[i], axes)
        for weight in weights
        for i, (_, axes) in enumerate(_wanted(weight.name, partitioning))
        if axes
    }
    names = partitioning.mesh.axis_names
    lengths = [range(partitioning.mesh.shape[axis], 0, -1) for axis in names]
    best: dict[str, int] = dict.fromkeys(names, 1)
    for sizes in itertools.product(*lengths):
        mesh = dict(zip(names, sizes, strict=True))
        if math.prod(sizes) > math.prod(best.values()) and all(
            count % math.prod(mesh[axis] for axis in axes) == 0 for count, axes in needs
        ):
            best = mesh
    return list(best.items())
