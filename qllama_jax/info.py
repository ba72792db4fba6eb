"""A model file's header -> the lines of `qllama info`. Reads no weights and starts no device."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qllama_jax.config import ModelConfig, RopeScaling
from qllama_jax.errors import quoted
from qllama_jax.tensor_file import GGUFFile

ROUTER = ".ffn_gate_inp.weight"  # how the names of tensors end that only a mixture has


def describe(file: GGUFFile) -> Iterator[str]:
    """Yield a line a fact: first what any model file has, then the model's sizes.

    Raises:
        GGUFError: the metadata describe no model that the package knows; the lines that can be
            told come before it.
    """
    tensors = file.tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    yield _line("file", f"{quoted(file.path.name)}, {file.kind}")
    yield from _strings(file, {"name": "general.name", "architecture": "general.architecture"})
    yield _line("parameters", f"{weights:,}")
    per_weight = f", {8 * nbytes / weights:.2f} bits a weight" if weights else ""
    yield _line("weights", f"{nbytes:,} bytes{per_weight}")
    formats = by_qtype(file)
    width = max([8, *map(len, formats)])
    for qtype, (count, size) in formats.items():
        yield _line("", f"{qtype:<{width}} {count:>5} tensors {size:>17,} bytes")
    yield from _strings(file, {"tokenizer": "tokenizer.ggml.model"})
    if file.container == "GGML":
        yield _line("", "scores by id: the file has none, and LLaMA's follow from the ids")
    yield _line("chat template", "yes" if file.metadata.get("tokenizer.chat_template") else "no")
    yield from _sizes(_config(file), any(name.endswith(ROUTER) for name in file.tensors))


def by_qtype(file: GGUFFile) -> dict[str, tuple[int, int]]:
    """Quantization type -> (tensors, bytes), most bytes first."""
    totals: dict[str, tuple[int, int]] = {}
    for tensor in file.tensors.values():
        count, size = totals.get(tensor.qtype.name, (0, 0))
        totals[tensor.qtype.name] = count + 1, size + tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def _config(file: GGUFFile) -> ModelConfig:
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[1] if embedding is not None and len(embedding.shape) == 2 else None
    return ModelConfig.from_metadata(file.metadata, vocab_size=rows)


def _sizes(config: ModelConfig, has_router: bool) -> Iterator[str]:
    heads = f"{config.num_heads}, {config.num_kv_heads} of keys and values, {config.head_dim} wide"
    rope = f"{config.rope_dim} dimensions, base {config.rope_theta:g}"
    yield _line("layers", f"{config.num_layers}")
    yield _line("embedding", f"{config.embed_dim}")
    yield _line("feed-forward", f"{config.ffn_dim}")
    yield _line("heads", heads)
    if config.num_experts > 1 or has_router:  # a dense file may say that it has one expert
        yield _line("experts", f"{config.num_experts}, {config.num_experts_per_token} a token")
    yield _line("rope", rope + _scaling(config.rope_scaling))
    yield _line("context", f"{config.context_length} tokens")
    yield _line("vocabulary", f"{config.vocab_size} tokens")


def _scaling(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return ""
    return f", {scaling.kind} by {scaling.factor:g} from {scaling.original_context_length}"


def _strings(file: GGUFFile, keys: dict[str, str]) -> Iterator[str]:
    """Lines for the keys that hold a string: whatever else they hold is not worth an error here."""
    for label, key in keys.items():
        if isinstance(value := file.metadata.get(key), str):
            yield _line(label, quoted(value))


def _line(label: str, text: str) -> str:
    return f"{label:<14} {text}"
