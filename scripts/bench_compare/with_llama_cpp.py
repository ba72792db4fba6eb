"""llama.cpp as a worker of `bench_compare`: llama-cpp-python's low level, greedy."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import worker

try:
    import llama_cpp  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit(f"{sys.executable} has no llama_cpp: pip install llama-cpp-python")

models: list[Any] = []
empty: list[int] = []


def versions() -> str:
    """What the figures are of."""
    return f"llama-cpp-python {llama_cpp.__version__}"


def begin() -> None:
    """Note the memory of a process that has done nothing."""
    empty[:] = [worker.memory_bytes("VmRSS")]


def load(path: str, context: int) -> float:
    """Seconds that it takes."""
    threads = os.cpu_count()
    began = time.perf_counter()
    models[:] = [
        llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    ]
    return time.perf_counter() - began


def arrivals(prompt: int, steps: int) -> list[float]:
    """Seconds from the call to each token."""
    (model,) = models
    model.reset()
    times = []
    began = time.perf_counter()
    fed = [300 + i % 1000 for i in range(prompt)]
    while len(times) <= steps:
        model.eval(fed)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        fed = [int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())]
        times.append(time.perf_counter() - began)
    return times


def seconds(prompt: int, steps: int) -> float:
    """Time of a prompt, which gives the first token, and of so many steps after it."""
    return arrivals(prompt, steps)[-1]


def peak() -> int:
    """The most bytes that were resident, the file's pages among them, over those of `begin`."""
    return worker.memory_bytes("VmHWM") - empty[0]


if __name__ == "__main__":
    worker.serve({f.__name__: f for f in (versions, begin, load, seconds, arrivals, peak)})
