"""Tokens a second of prefill and decode: what `qllama bench` measures."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qllama_jax.generate import generate
from qllama_jax.load import Model
from qllama_jax.matmul import Activations
from qllama_jax.session import Stats

RUNS = 3


def measure(
    model: Model,
    *,
    prompt_tokens: int,
    new_tokens: int,
    activations: Activations,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Generate greedily from random ids: a run that compiles, then RUNS more, and their medians.

    Raises:
        ContextOverflowError: prompt_tokens + new_tokens are more than the model's context.
    """
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.config.vocab_size, prompt_tokens, dtype=np.int32)

    def run() -> tuple[float, Stats]:
        began = time.perf_counter()
        result = generate(
            model,
            prompt,
            max_new_tokens=new_tokens,
            ignore_eos=True,
            activations=activations,
            dtype=dtype,
        )
        return time.perf_counter() - began, result.stats

    first, _ = run()
    runs = [run() for _ in range(RUNS)]
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "activations": activations,
        "dtype": jnp.dtype(dtype).name,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tok_s": statistics.median(stats.prefill_tok_s for _, stats in runs),
        "decode_tok_s": statistics.median(stats.decode_tok_s for _, stats in runs),
        "compile_s": max(0.0, first - statistics.median(seconds for seconds, _ in runs)),
        "peak_bytes": device_peak_bytes() or host_peak_bytes(),
        "host_peak_bytes": host_peak_bytes(),
        "weight_bytes": model.nbytes,
    }


def device_peak_bytes() -> int:
    """Most bytes that were in use on the first device; 0 where it does not tell, as the CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def host_peak_bytes() -> int:
    """Most bytes of memory that the process ever held."""
    import resource  # POSIX alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def table(report: dict[str, Any]) -> str:
    """Return the report of a benchmark for people to read."""
    rows = {
        "model": f"{report['model']}, {report['qtype']}",
        "device": f"{report['device']}, jax {report['jax']}, {report['activations']} activations",
        "prefill": f"{report['prefill_tok_s']:.1f} tok/s ({report['prompt_tokens']} tokens)",
        "decode": f"{report['decode_tok_s']:.1f} tok/s ({report['new_tokens']} tokens)",
        "load": f"{report['load_s']:.2f} s",
        "compile": f"{report['compile_s']:.2f} s",
        "weights": f"{report['weight_bytes'] / 1e6:.1f} MB",
        "peak memory": f"{report['peak_bytes'] / 1e6:.1f} MB",
    }
    return "\n".join(f"{label:<12} {text}" for label, text in rows.items())
