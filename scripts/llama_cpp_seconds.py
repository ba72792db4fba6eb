"""Time llama.cpp on request: for scripts/compare_speed.py, in an environment with llama-cpp-python.

    python scripts/llama_cpp_seconds.py MODEL.gguf CONTEXT

Reads lines "prompt steps" and answers each with the seconds that a prompt of so many tokens and so
many greedy steps after it took.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

try:
    import llama_cpp  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit(f"{sys.executable} has no llama_cpp: pip install llama-cpp-python")


def main() -> None:
    """Answer until the input ends."""
    path, context = sys.argv[1], int(sys.argv[2])
    threads = os.cpu_count()
    model = llama_cpp.Llama(
        path,
        n_ctx=context,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, steps = map(int, line.split())
        model.reset()
        began = time.perf_counter()
        model.eval([300 + i for i in range(prompt)])
        for _ in range(steps):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())
            model.eval([token])
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
