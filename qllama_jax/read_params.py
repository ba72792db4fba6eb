"""Tensors by their names -> `Params`.

Field names are tensor names, so there is no table of names. The exceptions are four: a missing
`output.weight` means that the embedding serves as output too; experts of a tensor each are stacked;
`attn_qkv` is taken apart; and the factors of rotary frequencies go into those frequencies.
"""

from __future__ import annotations

import numpy as np

from qllama_jax.config import ModelConfig
from qllama_jax.errors import GGUFError, quoted
from qllama_jax.params import DenseBlock, Linear, MoEBlock, Params
from qllama_jax.rope import RopeFrequencies, rope_frequencies
from qllama_jax.tensor_reader import TensorReader


def read_params(tensors: TensorReader, config: ModelConfig) -> Params:
    """Take the model's weights out of the file, all of them: what nothing takes is refused."""
    V, D = config.vocab_size, config.embed_dim
    rope = _rope(tensors, config)
    tied = "output.weight" not in tensors
    embedding = tensors.matrix if tied else tensors.table
    params = Params(
        token_embd=Linear(weight=embedding("token_embd.weight", (V, D))),
        blk=tuple(_block(tensors, f"blk.{i}.", config) for i in range(config.num_layers)),
        output_norm=Linear(weight=tensors.place(tensors.vector("output_norm.weight", D))),
        output=None if tied else Linear(weight=tensors.matrix("output.weight", (V, D))),
        rope=tensors.place(rope),
    )
    tensors.check_nothing_left()
    return params


def _block(tensors: TensorReader, prefix: str, config: ModelConfig) -> DenseBlock | MoEBlock:
    D = config.embed_dim
    q, k, v = _query_key_value(tensors, prefix, config)
    attention = {
        "attn_norm": Linear(weight=tensors.place(tensors.vector(prefix + "attn_norm.weight", D))),
        "attn_q": q,
        "attn_k": k,
        "attn_v": v,
        "attn_output": _linear(
            tensors, prefix + "attn_output", D, config.num_heads * config.head_dim
        ),
        "ffn_norm": Linear(weight=tensors.place(tensors.vector(prefix + "ffn_norm.weight", D))),
    }
    F, E = config.ffn_dim, config.num_experts
    # A dense file may say that it has one expert; a router makes a mixture even of one.
    if E == 0 or (E == 1 and f"{prefix}ffn_gate_inp.weight" not in tensors):
        return DenseBlock(
            **attention,
            ffn_gate=_linear(tensors, prefix + "ffn_gate", F, D),
            ffn_up=_linear(tensors, prefix + "ffn_up", F, D),
            ffn_down=_linear(tensors, prefix + "ffn_down", D, F),
        )
    if config.num_experts_per_token == 0:
        metadata, key = tensors.file.metadata, "llama.expert_used_count"
        wanted = f"1, as there is a tensor {quoted(prefix + 'ffn_gate_inp.weight')}"
        raise metadata.error(key, "0" if key in metadata else "none", wanted)
    return MoEBlock(
        **attention,
        ffn_gate_inp=Linear(weight=tensors.matrix(prefix + "ffn_gate_inp.weight", (E, D))),
        ffn_gate_exps=_experts(tensors, prefix + "ffn_gate", (E, F, D)),
        ffn_up_exps=_experts(tensors, prefix + "ffn_up", (E, F, D)),
        ffn_down_exps=_experts(tensors, prefix + "ffn_down", (E, D, F)),
    )


def _linear(tensors: TensorReader, name: str, out: int, width: int) -> Linear:
    weight = tensors.matrix(f"{name}.weight", (out, width))
    bias = tensors.optional_vector(f"{name}.bias", out)
    return Linear(weight=weight, bias=tensors.place_bias(name, bias))


def _query_key_value(tensors: TensorReader, prefix: str, config: ModelConfig) -> list[Linear]:
    """Read the three projections, from a tensor each or from one that holds them in this order."""
    D, H = config.embed_dim, config.head_dim
    rows = [config.num_heads * H, config.num_kv_heads * H, config.num_kv_heads * H]
    names = [prefix + "attn_q", prefix + "attn_k", prefix + "attn_v"]
    fused = prefix + "attn_qkv"
    if f"{fused}.weight" not in tensors:
        return [_linear(tensors, name, out, D) for name, out in zip(names, rows, strict=True)]
    weights = tensors.matrices(f"{fused}.weight", rows, D)
    together = tensors.optional_vector(f"{fused}.bias", sum(rows))
    if together is not None:
        biases = np.split(together, np.cumsum(rows)[:-1])
    else:  # a fused weight may have separate biases
        biases = [
            tensors.optional_vector(f"{name}.bias", out)
            for name, out in zip(names, rows, strict=True)
        ]
    biases = [tensors.place_bias(name, b) for name, b in zip(names, biases, strict=True)]
    return [Linear(w, b) for w, b in zip(weights, biases, strict=True)]


def _experts(tensors: TensorReader, name: str, shape: tuple[int, int, int]) -> Linear:
    """Read the experts' weights `[E, out, in]`: one tensor, or in older files one an expert."""
    E, out, width = shape
    merged, first = f"{name}_exps.weight", f"{name}.0.weight"
    if merged in tensors:
        return Linear(weight=tensors.matrix(merged, shape))
    if first not in tensors:
        raise GGUFError(
            f"{tensors.file.path}: tensor {quoted(merged)} is missing, and so is {quoted(first)}"
        )
    names = [f"{name}.{e}.weight" for e in range(E)]
    return Linear(weight=tensors.stacked(names, (out, width)))


def _rope(tensors: TensorReader, config: ModelConfig) -> RopeFrequencies:
    """Rotary frequencies, divided by the factors that the file has for them."""
    pairs = config.rope_dim // 2
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        # As llama.cpp run at the file's whole context: one set of factors for all positions.
        long = _factors(tensors, "rope_factors_long.weight", pairs)
        short = _factors(tensors, "rope_factors_short.weight", pairs)
        factors = long if config.context_length > scaling.original_context_length else short
    elif "rope_freqs.weight" in tensors:
        factors = _factors(tensors, "rope_freqs.weight", pairs)
    else:
        factors = None
    try:
        return rope_frequencies(config, factors)
    except GGUFError as error:
        raise GGUFError(f"{tensors.file.path}: {error}") from None


def _factors(tensors: TensorReader, name: str, pairs: int) -> np.ndarray:
    factors = tensors.vector(name, pairs)
    if not (factors > 0).all():  # NaN is not
        raise GGUFError(
            f"{tensors.file.path}: tensor {quoted(name)}: found {factors.min()}, wanted numbers"
            " above 0, by which frequencies are divided"
        )
    return factors
