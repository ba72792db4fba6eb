"""Tiny GGUF files for tests: small Llama and Mixtral models with every option a file can have.

Everything is deterministic. The weights of a tensor depend on its name, its shape and the seed
alone, so that files which differ in format, in tying or in how experts are stored hold the same
model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QType
from gguf import GGUFValueType
from numpy.typing import NDArray

from blocks import blocks_like, random_blocks
from vocabularies import add_tokenizer

__all__ = ["random_blocks", "write_tiny_llama"]

#: One format for all matrices; or name -> format, "*" for those not named; or a function of name.
QTypes = QType | str | Mapping[str, QType | str] | Callable[[str], QType | str]


def write_tiny_llama(
    path: str | Path,
    qtype: QTypes = QType.F32,
    *,
    layers: int = 2,
    embed: int = 256,
    ffn: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 384,
    tied: bool = False,
    experts: int = 0,
    experts_used: int = 0,
    merged: bool = True,
    rope_freqs: bool = False,
    biases: bool = False,
    fused_qkv: bool = False,
    longrope: bool = False,
    context_length: int = 512,
    tokenizer: str | None = "llama",
    metadata: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a model of architecture "llama" to `path` and return it.

    Vectors and the router are F32 whatever `qtype` says, unless a mapping names them. K-quants need
    `embed` and `ffn` in multiples of 256. `fused_qkv` joins the tensors of attn_q, attn_k and
    attn_v, which must have one format. `longrope` adds factors for short and for long contexts.
    `head_dim` writes key_length and value_length too.
    `tokenizer` is "llama" (SentencePiece with byte tokens), "gpt2" (byte-level BPE) or None.
    `metadata` adds or replaces keys: int as uint32, float as float32, None drops the key, a pair
    (value, GGUFValueType) says the type.
    """
    path = Path(path)
    keys: dict[str, Any] = {
        "llama.vocab_size": vocab,
        "llama.context_length": context_length,
        "llama.embedding_length": embed,
        "llama.block_count": layers,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.dimension_count": head_dim or embed // heads,
    }
    if head_dim:
        keys |= {"llama.attention.key_length": head_dim, "llama.attention.value_length": head_dim}
    if experts:
        keys |= {"llama.expert_count": experts, "llama.expert_used_count": experts_used}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (keys | dict(metadata or {})).items():
        add_key(writer, key, value)
    add_tokenizer(writer, tokenizer, vocab)

    width = head_dim or embed // heads
    layer = layer_shapes(embed, ffn, heads * width, kv_heads * width, experts, biases)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, embed)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    shapes["output_norm.weight"] = (embed,)
    if not tied:
        shapes["output.weight"] = (vocab, embed)
    for name, shape in shapes.items():
        weights = random_weights(name, shape, seed)
        if fused_qkv and ("attn_k." in name or "attn_v." in name):
            continue
        if fused_qkv and "attn_q." in name:
            parts = [name.replace("attn_q", part) for part in ("attn_k", "attn_v")]
            others = [random_weights(part, shapes[part], seed) for part in parts]
            joined = np.concatenate([weights, *others])
            add_tensor(writer, name.replace("attn_q", "attn_qkv"), joined, qtype)
        elif name.endswith("_exps.weight") and not merged:
            for e in range(experts):
                one = name.replace("_exps.weight", f".{e}.weight")
                add_tensor(writer, one, weights[e], qtype)
        else:
            add_tensor(writer, name, weights, qtype)
    if rope_freqs:
        # Like Llama 3.1's: fast pairs as they are, slow ones stretched up to 8 times.
        factors = np.geomspace(1, 8, width // 2, dtype=np.float32)
        add_tensor(writer, "rope_freqs.weight", factors, qtype)
    if longrope:
        for kind, most in (("long", 16), ("short", 2)):
            factors = np.geomspace(1, most, width // 2, dtype=np.float32)
            add_tensor(writer, f"rope_factors_{kind}.weight", factors, qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layer_shapes(
    embed: int, ffn: int, query: int, key: int, experts: int, biases: bool
) -> dict[str, tuple[int, ...]]:
    """Shape [out, in] of every tensor of a layer, experts merged; names without "blk.{i}."."""
    matrices = {
        "attn_q": (query, embed),
        "attn_k": (key, embed),
        "attn_v": (key, embed),
        "attn_output": (embed, query),
    }
    feed_forward = {"ffn_gate": (ffn, embed), "ffn_up": (ffn, embed), "ffn_down": (embed, ffn)}
    if not experts:
        matrices |= feed_forward
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (embed,), "ffn_norm.weight": (embed,)}
    shapes |= {f"{name}.weight": shape for name, shape in matrices.items()}
    if biases:
        shapes |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    if experts:
        shapes["ffn_gate_inp.weight"] = (experts, embed)
        shapes |= {f"{name}_exps.weight": (experts, *s) for name, s in feed_forward.items()}
    return shapes


def random_weights(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Normal weights of a scale at which activations neither vanish nor explode."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    weights = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("_norm.weight"):
        return 1 + 0.1 * weights
    if name.endswith(".bias"):
        return 0.1 * weights
    if name == "token_embd.weight":
        return 0.2 * weights  # also an output matrix where tied
    scale = 2.0 if "ffn_gate_inp" in name or name == "output.weight" else 1.0
    return weights * np.float32(scale / np.sqrt(shape[-1]))


def add_tensor(
    writer: gguf.GGUFWriter, name: str, weights: NDArray[np.float32], qtypes: QTypes
) -> None:
    """Add one tensor, quantized as `qtypes` says for its name."""
    qtype = qtype_of(name, weights.ndim, qtypes)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    raw = blocks_like(weights, qtype, rng)
    writer.add_tensor(name, raw, raw_dtype=qtype)


def qtype_of(name: str, ndim: int, qtypes: QTypes) -> QType:
    """Format of a tensor: what names it; else F32 for a vector or the router; else the rule."""
    if isinstance(qtypes, Mapping) and name in qtypes:
        chosen = qtypes[name]
    elif ndim == 1 or "ffn_gate_inp" in name:
        chosen = QType.F32
    elif isinstance(qtypes, Mapping):
        chosen = qtypes["*"]
    else:
        chosen = qtypes if isinstance(qtypes, QType | str) else qtypes(name)
    return QType[chosen] if isinstance(chosen, str) else chosen


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata key; see `write_tiny_llama` for the types."""
    if value is None:
        return
    if isinstance(value, tuple):
        value, kind = value
    elif isinstance(value, int) and not isinstance(value, bool):
        kind = GGUFValueType.UINT32
    else:
        kind = GGUFValueType.get_type(value)
    writer.add_key_value(key, value, kind)
