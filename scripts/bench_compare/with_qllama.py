"""qllama_jax as a worker of `bench_compare`: timed from outside, by `generate` and `stream`."""

from __future__ import annotations

import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import worker

import qllama_jax as ql

models: list[ql.Model] = []
empty: list[int] = []


def versions() -> str:
    """What the figures are of."""
    return f"jax {jax.__version__} on Python {platform.python_version()}"


def keep_compiled(folder: str) -> None:
    """Turn JAX's persistent compilation cache on, as the command line has it."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def begin() -> None:
    """Become an empty JAX process: one that has run one operation."""
    jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()
    empty[:] = [worker.memory_bytes("VmRSS")]


def load(path: str, context: int) -> float:
    """Seconds that it takes; `context` is known when a text is."""
    del context
    began = time.perf_counter()
    models[:] = [ql.load(path)]
    jax.block_until_ready(jax.tree.leaves(models[0].params))
    return time.perf_counter() - began


def _prompt(tokens: int, row: int = 0) -> list[int]:
    return [300 + row + i % 1000 for i in range(tokens)]


def seconds(prompt: int, steps: int, rows: int = 1, activations: Any = "auto") -> float:
    """Time of a prompt, which gives the first token, and of so many steps after it."""
    ids = [_prompt(prompt, row) for row in range(rows)]
    began = time.perf_counter()
    ql.generate(
        models[0],
        ids if rows > 1 else ids[0],
        max_new_tokens=steps + 1,
        ignore_eos=True,
        activations=activations,
    )
    return time.perf_counter() - began


def arrivals(prompt: int, steps: int) -> list[float]:
    """Seconds from the call to each token."""
    began = time.perf_counter()
    pieces = ql.stream(models[0], _prompt(prompt), max_new_tokens=steps + 1, ignore_eos=True)
    return [time.perf_counter() - began for _ in pieces]


def peak() -> int:
    """The most bytes that were resident, over those of `begin`."""
    return worker.memory_bytes("VmHWM") - empty[0]


if __name__ == "__main__":
    functions = (versions, keep_compiled, begin, load, seconds, arrivals, peak)
    worker.serve({f.__name__: f for f in functions})
