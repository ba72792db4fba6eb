"""Write tests/goldens/*.json: logits that llama.cpp computes for tiny models.

`reference.json` is of float32 models and proves the tests' own reference right; `matrix.json` is of
the files of tests/matrix.py that llama.cpp can run, most of them quantized. They change only when a
case is added. Needs llama-cpp-python besides what the tests need; all computations in it are in
float32 here, the key-value cache and attention without flash kernels, but for the products with
quantized weights, before which it rounds the activations.

    python scripts/make_reference_goldens.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import matrix
import tiny

GOLDENS = Path(tiny.__file__).parent / "goldens"

_SCALING = "llama.rope.scaling."
_YARN = {
    f"{_SCALING}type": "yarn",
    f"{_SCALING}factor": 4.0,
    f"{_SCALING}original_context_length": 128,
}

#: Options of `write_tiny_llama` for each model.
CASES: dict[str, dict[str, Any]] = {
    "grouped_query": {"kv_heads": 2},
    "multi_head": {"kv_heads": 4},
    "multi_query": {"kv_heads": 1},
    "tied": {"tied": True},
    "narrow_heads": {"head_dim": 32},
    "wide_heads": {"head_dim": 128},
    "biases": {"biases": True},
    "rope_base": {"metadata": {"llama.rope.freq_base": 500_000.0}},
    "rope_freqs": {"rope_freqs": True},
    "linear": {"metadata": {f"{_SCALING}type": "linear", f"{_SCALING}factor": 4.0}},
    "linear_by_its_old_key": {"metadata": {"llama.rope.scale_linear": 4.0}},
    "linear_attn_factor": {
        "metadata": {f"{_SCALING}factor": 2.0, f"{_SCALING}attn_factor": 1.25},
    },
    "no_scaling": {"metadata": {f"{_SCALING}type": "none", f"{_SCALING}factor": 4.0}},
    "yarn": {"metadata": _YARN},
    "yarn_attn_factor": {"metadata": {**_YARN, f"{_SCALING}attn_factor": 0.75}},
    "yarn_of_context_length": {
        "metadata": {**_YARN, f"{_SCALING}original_context_length": None},
    },
    "yarn_rope_freqs": {"rope_freqs": True, "metadata": _YARN},
    "yarn_that_shrinks": {"metadata": {**_YARN, f"{_SCALING}factor": 0.5}},
    "longrope_long": {
        "longrope": True,
        "metadata": {f"{_SCALING}type": "longrope", f"{_SCALING}original_context_length": 32},
    },
    "longrope_short": {
        "longrope": True,
        "metadata": {f"{_SCALING}type": "longrope", f"{_SCALING}attn_factor": 1.25},
    },
    "fused_qkv": {"fused_qkv": True, "seed": 1},
    "fused_qkv_biases": {"fused_qkv": True, "biases": True, "seed": 1},
    "experts": {"experts": 4, "experts_used": 2},
    "experts_all_used": {"experts": 3, "experts_used": 3},
    "experts_one_used": {"experts": 8, "experts_used": 1, "kv_heads": 4},
}

TOKENS = np.random.default_rng(0).integers(3, 384, 48).tolist()
POSITIONS = [0, 1, 17, 47]
IDS = [0, 1, 2, 77, 150, 222, 300, 383]
MATRIX_IDS = [0, 1, 2, 77, 150, 222, 300, 388]


def llama_cpp_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits float32 [T, V] after each token."""
    model = Llama(
        str(path),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(tokens)
    return model.scores[: len(tokens)].copy()


def write_reference() -> None:
    """Compute the float32 models."""
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CASES.items():
            path = tiny.write_tiny_llama(Path(folder) / "tiny.gguf", **options)
            logits = llama_cpp_logits(path, TOKENS)
            few = logits[np.ix_(POSITIONS, IDS)]
            # Eight digits are more than float32 has.
            cases[name] = {
                "options": options,
                "logits": [[float(f"{x:.8g}") for x in row] for row in few],
                "largest": logits[POSITIONS].argmax(axis=1).tolist(),
            }
            print(f"{name:24} {few[-1, :4]}")
    lines = [f'"{name}": {json.dumps(case)}' for name, case in cases.items()]  # one line a case
    (GOLDENS / "reference.json").write_text(
        f'{{"tokens": {TOKENS},\n"positions": {POSITIONS},\n"ids": {IDS},\n"cases": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


def write_matrix() -> None:
    """Compute the files of the matrix: a hash of the file, and little-endian float32 [T, ids]."""
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in matrix.MATRIX.items():
            if name in matrix.NOT_IN_LLAMA_CPP:
                continue
            path = tiny.write_tiny_llama(Path(folder) / "tiny.gguf", **options)
            few = llama_cpp_logits(path, matrix.TOKENS)[:, MATRIX_IDS]
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            logits = base64.b64encode(few.astype("<f4").tobytes()).decode()
            cases[name] = {"sha256": digest, "logits": logits}
            print(f"{name:24} {few[-1, :4]}")
    lines = [f'"{name}": {json.dumps(case)}' for name, case in cases.items()]
    body = ",\n".join(lines)
    (GOLDENS / "matrix.json").write_text(f'{{"ids": {MATRIX_IDS},\n"cases": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    write_reference()
    write_matrix()
