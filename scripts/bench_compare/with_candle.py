"""candle as a worker of `bench_compare`, through rust-ai-serving-engine: its quantized_llama."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path

import worker

try:
    import rust_ai_serving_engine as engine  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit(f"{sys.executable} has no rust_ai_serving_engine: pip install rust-ai-serving-engine")

store = tempfile.TemporaryDirectory()


def versions() -> str:
    """What the figures are of."""
    return f"rust-ai-serving-engine {importlib.metadata.version('rust-ai-serving-engine')}"


def load(path: str, vocabulary: int) -> float:
    """Seconds that it takes, the hash of the file and a first token included."""
    tokenizer = Path(store.name) / "tokenizer.json"
    worker.write_word_tokenizer(tokenizer, vocabulary)
    began = time.perf_counter()
    engine.import_model(store.name, path, "model", architecture="llama")
    engine.attach_tokenizer(store.name, "model", str(tokenizer))
    seconds(1, 0)
    return time.perf_counter() - began


def seconds(prompt: int, steps: int) -> float:
    """Time of a prompt, which gives the first token, and of so many steps after it."""
    text = " ".join(f"t{300 + i}" for i in range(prompt))
    began = time.perf_counter()
    out = engine.generate_registered_gguf(
        store.name, "model", text, max_tokens=steps + 1, temperature=0.0, stop_tokens=[]
    )
    took = time.perf_counter() - began
    if len(out.split()) != steps + 1:
        raise RuntimeError(f"{len(out.split())} tokens, wanted {steps + 1}")
    return took


if __name__ == "__main__":
    worker.serve({f.__name__: f for f in (versions, load, seconds)})
