"""mistral.rs, which is built on candle too, as a worker of `bench_compare`."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import worker

try:
    import mistralrs  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit(f"{sys.executable} has no mistralrs: pip install mistralrs")

runners: list[Any] = []


def versions() -> str:
    """What the figures are of."""
    return f"mistralrs {importlib.metadata.version('mistralrs')}"


def load(path: str, vocabulary: int) -> float:
    """Seconds that it takes; the vocabulary is the file's."""
    del vocabulary
    file = Path(path)
    began = time.perf_counter()
    which = mistralrs.Which.GGUF(str(file.parent), file.name)
    # Without a cache of prompts: every one is to be read.
    runners[:] = [mistralrs.Runner(which=which, token_source="none", prefix_cache_n=0)]
    return time.perf_counter() - began


def seconds(prompt: int, steps: int) -> float:
    """Time of a text of so many letters, which gives the first token, and of steps after it."""
    request = mistralrs.CompletionRequest(
        prompt="a" * prompt,
        model="default",
        max_tokens=steps + 1,
        temperature=0.0,
        ignore_eos=True,
    )
    began = time.perf_counter()
    out = runners[0].send_completion_request(request)
    took = time.perf_counter() - began
    if out.usage.completion_tokens != steps + 1:
        raise RuntimeError(f"{out.usage.completion_tokens} tokens, wanted {steps + 1}")
    return took


if __name__ == "__main__":
    worker.serve({f.__name__: f for f in (versions, load, seconds)})
