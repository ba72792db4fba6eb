"""Measure what rounding keys and values costs, as compare_perplexity.py does for activations.

    python scripts/compare_caches.py MODEL.gguf TEXT [--tokens N]

KL(exact || other) a token, in chunks of 512: "exact" rounds neither activations nor the float32
cache, the others one of the two or both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql

CHUNK = 512
KINDS = [("float", "float16"), ("float", "bfloat16"), ("int8", "float32"), ("int8", "float16")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what rounding keys and values costs.")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    model = ql.load(arguments.model)
    ids = model.tokenizer.encode(arguments.text.read_text())[: arguments.tokens]
    chunks = [ids[i : i + CHUNK] for i in range(0, len(ids) - CHUNK + 1, CHUNK)]
    if not chunks:
        parser.error(f"{arguments.text}: {len(ids)} tokens, wanted {CHUNK} at least")
    forward = jax.jit(ql.forward, static_argnames=("config", "activations"))

    def log_p(chunk: list[int], activations: str, dtype: str) -> np.ndarray:
        tokens = jnp.asarray([chunk], jnp.int32)
        cache = ql.init_cache(model.config, 1, CHUNK, jnp.dtype(dtype))
        logits, _ = forward(
            model.params, tokens, cache, config=model.config, activations=activations
        )
        return np.asarray(jax.nn.log_softmax(logits[0]), np.float64)

    divergences: dict[tuple[str, str], list[float]] = {kind: [] for kind in KINDS}
    for chunk in chunks:
        exact = log_p(chunk, "float", "float32")
        for kind, found in divergences.items():
            found += (np.exp(exact) * (exact - log_p(chunk, *kind))).sum(axis=1).tolist()
    for (activations, dtype), found in divergences.items():
        error = np.std(found) / np.sqrt(len(found))
        print(f"{activations:6} activations, {dtype:8} cache: {np.mean(found):.2e} +- {error:.1e}")


if __name__ == "__main__":
    main()
