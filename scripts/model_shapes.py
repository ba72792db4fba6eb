"""Models without files: configs and tensor tables of well-known sizes, in llama.cpp's mixes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from qllama_jax.config import ModelConfig
from qllama_jax.metadata import Metadata
from qllama_jax.quants import FORMATS
from qllama_jax.tensor_file import GGUFFile, GGUFTensor, Source
from qllama_jax.tensor_types import BLOCK_SIZES

# Types of all matrices, and llama.cpp's mix.
MIXES = ("Q4_K_M", *(q.name for q in FORMATS if isinstance(q, GGMLQuantizationType)))
_COMMON = {"rope_scaling": None, "num_experts": 0, "num_experts_per_token": 0, "norm_eps": 1e-5}
_LLAMA_3 = {"vocab_size": 128_256, "context_length": 8192, "rope_theta": 500_000.0}

# Fields of `ModelConfig`; rope_dim is head_dim where it is not given.
SHAPES: dict[str, dict] = {
    "llama-1.1b": _COMMON
    | {"num_layers": 22, "embed_dim": 2048, "ffn_dim": 5632, "num_heads": 32, "num_kv_heads": 4}
    | {"head_dim": 64, "vocab_size": 32_000, "context_length": 2048, "rope_theta": 10_000.0},
    "llama-8b": _COMMON
    | _LLAMA_3
    | {"num_layers": 32, "embed_dim": 4096, "ffn_dim": 14_336, "num_heads": 32, "num_kv_heads": 8}
    | {"head_dim": 128},
    "llama-70b": _COMMON
    | _LLAMA_3
    | {"num_layers": 80, "embed_dim": 8192, "ffn_dim": 28_672, "num_heads": 64, "num_kv_heads": 8}
    | {"head_dim": 128},
    "mixtral-8x7b": _COMMON
    | {"num_layers": 32, "embed_dim": 4096, "ffn_dim": 14_336, "num_heads": 32, "num_kv_heads": 8}
    | {"head_dim": 128, "vocab_size": 32_000, "context_length": 32_768, "rope_theta": 1e6}
    | {"num_experts": 8, "num_experts_per_token": 2},
}


def config_of(model: str) -> ModelConfig:
    """Return the config of a name in SHAPES, or of a JSON file with such fields."""
    if model.endswith(".json"):
        fields = _COMMON | _read(Path(model))
    elif model in SHAPES:
        fields = SHAPES[model]
    else:
        raise SystemExit(f"{model}: no .gguf or .json file, and none of {', '.join(SHAPES)}")
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    found: dict[str, Any] = {"rope_dim": fields.get("head_dim")} | fields
    if wrong := names ^ found.keys():
        fault = ", ".join(sorted(wrong))
        raise SystemExit(f"{model}: fields missing or too many: {fault}; wanted {sorted(names)}")
    return ModelConfig(**found)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None


def abstract_file(name: str, config: ModelConfig, mix: str) -> GGUFFile:
    """Return the tensor table of a file of this config, each tensor in the type that `mix` says.

    `mix` is the name of a type for all matrices, with the output in Q6_K where that is more, or
    "Q4_K_M": both as llama.cpp's quantizer does it.
    """
    if mix not in MIXES:
        raise SystemExit(f"--format {mix}: expected one of {', '.join(MIXES)}")
    source = Source(f"{name} in {mix}", 0, 0, 0)
    tensors = {
        tensor: _tensor(tensor, shape, _type(tensor, len(shape), config, mix), source)
        for tensor, shape in _shapes(config)
    }
    return GGUFFile(Path(source.path), 3, Metadata({}), tensors)


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes, innermost axis first."""
    c = config
    D, F, H = c.embed_dim, c.ffn_dim, c.head_dim
    yield "token_embd.weight", (D, c.vocab_size)
    for i in range(c.num_layers):
        block = f"blk.{i}."
        yield block + "attn_norm.weight", (D,)
        yield block + "attn_q.weight", (D, c.num_heads * H)
        yield block + "attn_k.weight", (D, c.num_kv_heads * H)
        yield block + "attn_v.weight", (D, c.num_kv_heads * H)
        yield block + "attn_output.weight", (c.num_heads * H, D)
        yield block + "ffn_norm.weight", (D,)
        experts, suffix = ((c.num_experts,), "_exps") if c.num_experts else ((), "")
        if experts:
            yield block + "ffn_gate_inp.weight", (D, c.num_experts)
        yield f"{block}ffn_gate{suffix}.weight", (D, F, *experts)
        yield f"{block}ffn_up{suffix}.weight", (D, F, *experts)
        yield f"{block}ffn_down{suffix}.weight", (F, D, *experts)
    yield "output_norm.weight", (D,)
    yield "output.weight", (D, c.vocab_size)


def _type(name: str, ndim: int, config: ModelConfig, mix: str) -> GGMLQuantizationType:
    if ndim == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    base = GGMLQuantizationType["Q4_K" if mix == "Q4_K_M" else mix]
    q6 = GGMLQuantizationType.Q6_K
    if name == "output.weight":
        block, size = BLOCK_SIZES[base]
        return q6 if size / block < BLOCK_SIZES[q6][1] / BLOCK_SIZES[q6][0] else base
    return GGMLQuantizationType[q4_k_m(name, config.num_layers)] if mix == "Q4_K_M" else base


def q4_k_m(name: str, layers: int) -> str:
    """Return the type of a matrix in llama.cpp's mix Q4_K_M."""
    if name == "output.weight":
        return "Q6_K"
    if "attn_v" in name or "ffn_down" in name:  # which matter most: in half of the layers
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
        if "attn_v" in name and layers == 80:  # eight heads share it in a 70B model
            return "Q5_K"
    return "Q4_K"


def _tensor(
    name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType, source: Source
) -> GGUFTensor:
    block, size = BLOCK_SIZES[qtype]
    if shape[0] % block:
        raise SystemExit(
            f"{name}: rows of {shape[0]} values are no multiple of {qtype.name}'s {block}"
        )
    return GGUFTensor(name, shape, qtype, math.prod(shape) // block * size, 0, source)
