"""Time a decoding step of a mixture with 8 experts and with 32: two work either way.

    python scripts/bench_experts.py [--rounds 10] [--tokens 64]

Both models are of one size but for the number of experts, have random weights, and run by turns in
this process, the first of a round the second of the next. Exit status 1 where the medians differ by
more than 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import qllama_jax as ql

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import write_tiny_llama

FEW, MANY = 8, 32
BAR = 1.15
PROMPT = [1, 17, 33, 49, 65, 81, 97, 113]


def seconds_a_step(model: ql.Model, tokens: int) -> float:
    """Time of a step: `tokens` more tokens cost this many times it."""
    times = []
    # Prefill chooses the first token, so what the second call has more is steps alone.
    for count in (1, 1 + tokens):
        began = time.perf_counter()
        result = ql.generate(model, PROMPT, max_new_tokens=count, ignore_eos=True)
        times.append(time.perf_counter() - began)
        assert len(result.tokens) == count
    return (times[1] - times[0]) / tokens


def load(folder: Path, experts: int) -> ql.Model:
    """Make a model: 2 layers of Mixtral's shape at half of its width, 0.9 GB with 32 experts.

    What a step reads, 57 MB, is more than a cache holds: at a quarter of the width and 4 layers,
    8 experts stay in one of 32 MB in part, as 32 do not, and the ratio is 1.16 for that alone.
    """
    path = write_tiny_llama(
        folder / f"{experts}.gguf",
        "Q4_0",
        layers=2,
        embed=2048,
        ffn=4096,
        heads=16,
        kv_heads=4,
        experts=experts,
        experts_used=2,
    )
    print(f"{experts} experts: {path.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
    return ql.load(path)


def main() -> int:
    """Print each round and the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64, help="steps that are timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {experts: load(Path(folder), experts) for experts in (FEW, MANY)}
    for model in models.values():
        seconds_a_step(model, args.tokens)  # compiles

    print(f"| round | {FEW} experts, ms a step | {MANY} experts, ms a step | ratio |")
    print("|---|---|---|---|")
    rounds: dict[int, list[float]] = {FEW: [], MANY: []}
    for i in range(args.rounds):
        for experts in (FEW, MANY) if i % 2 == 0 else (MANY, FEW):
            rounds[experts].append(1000 * seconds_a_step(models[experts], args.tokens))
        few, many = rounds[FEW][-1], rounds[MANY][-1]
        print(f"| {i + 1} | {few:.2f} | {many:.2f} | {many / few:.3f} |")
    few, many = (statistics.median(rounds[experts]) for experts in (FEW, MANY))
    print(f"| median | {few:.2f} | {many:.2f} | {many / few:.3f} |")
    return 1 if many / few > BAR else 0


if __name__ == "__main__":
    sys.exit(main())
