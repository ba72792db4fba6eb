"""Compare the speed of generation with llama.cpp's, in interleaved rounds on one machine.

    python scripts/compare_speed.py MODEL.gguf --llama-python PYTHON [--rounds 5]

PYTHON is the interpreter of an environment with llama-cpp-python; both sides use all cores. A
decoding step is (time of 128 tokens - time of 64) / 64 through `ql.generate`; a prefill the time
to a prompt's first token. Prints a table: the medians, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

import qllama_jax as ql

SHORT = 16  # tokens of the prompt before the timed steps
Seconds = Callable[[int, int], float]


def ours(model: ql.Model) -> Seconds:
    """Return a function from tokens of prompt and new tokens to the seconds they take."""

    def seconds(prompt: int, steps: int) -> float:
        ids = [300 + i for i in range(prompt)]
        began = time.perf_counter()
        ql.generate(model, ids, max_new_tokens=steps + 1, ignore_eos=True)
        return time.perf_counter() - began

    return seconds


def llama_cpp(python: str, model: Path, context: int) -> Seconds:
    """The same by a worker in another environment."""
    worker = Path(__file__).with_name("llama_cpp_seconds.py")
    process = subprocess.Popen(
        [python, str(worker), str(model), str(context)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    if stdout.readline().strip() != "ready":
        sys.exit(f"{python} has no llama-cpp-python, or it cannot open {model}")

    def seconds(prompt: int, steps: int) -> float:
        stdin.write(f"{prompt} {steps}\n")
        stdin.flush()
        return float(stdout.readline())

    return seconds


def decode(seconds: Seconds) -> float:
    """Tokens a second of decoding, positions 80 to 144."""
    short, long = seconds(SHORT, 64), seconds(SHORT, 128)
    return 64 / (long - short)


def prefill(tokens: int) -> Callable[[Seconds], float]:
    """Tokens a second of a prompt."""
    return lambda seconds: tokens / seconds(tokens, 0)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512])
    options = parser.parse_args()
    began = time.perf_counter()
    model = ql.load(options.model)
    loaded = time.perf_counter() - began
    context = max([*options.prompts, SHORT + 128]) + 8
    sides = ours(model), llama_cpp(options.llama_python, options.model, context)
    began = time.perf_counter()
    sides[0](SHORT, 0)
    first = time.perf_counter() - began
    print(f"jax {jax.__version__}; load {loaded:.2f} s, first token {first:.2f} s\n")
    print("| tokens/s | qllama_jax | llama.cpp | ratio | lowest and highest |")
    print("|---|---|---|---|---|")
    tasks = {"decode": decode} | {f"prefill {n}": prefill(n) for n in options.prompts}
    for name, task in tasks.items():
        for side in sides:
            task(side)  # compiles, and fills the caches
        rounds = []
        for i in range(options.rounds):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            found = {side: task(sides[side]) for side in order}
            rounds.append((found[0], found[1]))
        a, b = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [x / y for x, y in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {name} | {a:.1f} | {b:.1f} | {statistics.median(ratios):.2f} | {spread} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
