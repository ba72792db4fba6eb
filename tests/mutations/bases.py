"""The sound files that mutations start from, as drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_bytes import typed_string
from mutations.draft import Draft, take_apart, typed
from mutations.operators import Base, Files
from tiny import QTypes, write_tiny_llama

#: A vocabulary of 289 makes the output end with padding.
SIZES: dict[str, Any] = {"embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 289}
PARTS = 3


def formats(name: str) -> str:
    """A format for each matrix: plain numbers, scales, scales with minima."""
    kinds = {"token_embd": "Q8_0", "attn_v": "BF16", "ffn_up": "F16", "ffn_down": "Q4_1"}
    return next((qtype for part, qtype in kinds.items() if part in name), "Q4_0")


def make_bases(
    folder: Path, real: Path | None = None, formats: QTypes = formats
) -> dict[Base, Files]:
    """Every base by name, as parts by name: one, but for a split file. `real` is SmolLM2's file."""
    dense = write_tiny_llama(folder / "dense.gguf", formats, **SIZES)
    experts = {"experts": 4, "experts_used": 2, "tokenizer": "gpt2"}
    mixture = write_tiny_llama(folder / "mixture.gguf", formats, **experts, **SIZES)
    bases: dict[Base, Files] = {
        "llama": {"m.gguf": take_apart(dense)},
        "mixtral": {"m.gguf": take_apart(mixture)},
        "split": split(take_apart(dense)),
    }
    if real is not None:
        bases["real"] = {"m.gguf": take_apart(real, keep_data=False)}
    return bases


def split(whole: Draft) -> Files:
    """Parts with a third of the tensors each; the first has the keys."""
    step = -(-len(whole.tensors) // PARTS)
    files: Files = {}
    for i in range(PARTS):
        keys = whole.keys if i == 0 else [(b"general.architecture", typed_string("llama"))]
        part = Draft(list(keys), whole.tensors[i * step : (i + 1) * step])
        part.set("split.no", typed("u16", i))
        part.set("split.count", typed("u16", PARTS))
        part.set("split.tensors.count", typed("i32", len(whole.tensors)))
        files[f"m-{i + 1:05d}-of-{PARTS:05d}.gguf"] = part
    return files
