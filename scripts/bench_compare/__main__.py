"""Compare speed and memory with llama.cpp's and candle's, in interleaved rounds on one machine.

    python scripts/bench_compare [--models NAME ...] [--rows ROW ...] [--rounds 3]

The first run makes an environment with the other engines under .venv/ and the files under .cache/,
11 GB. Then all rows take some 25 minutes. Each engine is a process of its own and one works at a
time. What was measured goes into docs/performance.json, row by row, in place of what was there of
the same row; from all of it come the tables and the plot of docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import IO

import machine
import models
import report
import rows
from engines import CANDLE, LLAMA_CPP, MISTRALRS, OURS, Engine, Worker, engines, make_environment
from results import Results

ROOT = Path(__file__).resolve().parents[2]
TURNS = {
    "decode": rows.decode,
    "int8x2": rows.residual,
    "batch": rows.batch,
    "prefill": rows.prefill,
    "long": rows.long_text,
}
FRESH = {"load": rows.load, "memory": rows.memory}
#: The rows of each model. Those that are not named have their decoding measured, in two rounds.
ROWS = {
    "1.1B Q4_0": (*TURNS, *FRESH),
    "1.1B Q4_K_M": ("decode", "int8x2", "prefill", "long", *FRESH),
    "1.1B Q8_0": ("decode",),
    "1.1B Q6_K": ("decode",),
    models.SMOLLM2: ("decode", "prefill", "load"),
}
#: Where the slower engines are measured too.
WITH_CANDLE = ("1.1B Q4_0", "1.1B Q4_K_M", models.SMOLLM2)


def main() -> None:
    """Measure, row by row."""
    parser = argparse.ArgumentParser(
        prog="bench_compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", nargs="*", default=models.NAMES, choices=models.NAMES)
    parser.add_argument("--rows", nargs="*", default=[*TURNS, *FRESH], choices=[*TURNS, *FRESH])
    parser.add_argument("--rounds", type=int, default=3)
    known = [OURS, LLAMA_CPP, CANDLE, MISTRALRS]
    parser.add_argument("--engines", nargs="*", default=known, choices=known)
    parser.add_argument("--llama-python", metavar="PYTHON", help="has llama-cpp-python")
    parser.add_argument("--candle-python", metavar="PYTHON", help="has rust-ai-serving-engine")
    parser.add_argument("--old-python", metavar="PYTHON", help="has qllama_jax and an older JAX")
    parser.add_argument("--files", type=Path, default=ROOT / ".cache" / "bench")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "performance.json")
    parser.add_argument("--report-only", action="store_true", help="tables and plot of the results")
    args = parser.parse_args()
    results = Results(args.results)
    if not args.report_only:
        measure(args, results)
    elif not results.rows:
        sys.exit(f"{args.results}: nothing has been measured")
    report.write(results)


def measure(args: argparse.Namespace, results: Results) -> None:
    """Add to the results what the arguments choose."""
    if args.llama_python is None or args.candle_python is None:
        others = make_environment(ROOT / ".venv" / "engines")
    else:
        others = ""
    available = engines(args.llama_python or others, args.candle_python or others, args.old_python)
    chosen = [engine for engine in available if engine.name.partition(",")[0] in args.engines]
    files = {name: models.find(name, args.files) for name in args.models}
    folder = args.files
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "engines.log").open("w") as log:
        results.of(machine.name(), versions(chosen, log))
        results.bandwidth = machine.memory_bandwidth()
        for name, model in files.items():
            results.about["models"][name] = {
                "file_bytes": model.file_bytes,
                "step_bytes": model.step_bytes,
            }
            wanted = [row for row in ROWS.get(name, ("decode",)) if row in args.rows]
            fast = [engine for engine in chosen if engine.name not in (CANDLE, MISTRALRS)]
            fresh = [engine for engine in chosen if engine.name in (OURS, LLAMA_CPP)]
            sides = chosen if name in WITH_CANDLE else fast
            rounds = args.rounds if name in ROWS else min(args.rounds, 2)
            tasks = [TURNS[row] for row in wanted if row in TURNS]
            parts = [rows.by_turns(model, sides, tasks, rounds, log)] if tasks else []
            parts += [FRESH[row](model, fresh, rounds, log) for row in wanted if row in FRESH]
            for part in parts:
                for engine, values in part:
                    for row, value in values.items():
                        results.add(name, row, engine, value)
                        show(name, row, engine, value)


def versions(chosen: list[Engine], log: IO[str]) -> dict[str, str]:
    """Ask each engine."""
    found = {}
    for engine in chosen:
        with rows.left_out_if_it_fails(engine), Worker(engine, log) as worker:
            found[engine.name] = worker.ask("versions")
    return found


def show(model: str, row: str, engine: str, value: float) -> None:
    """A line, for the one who waits."""
    print(f"{time.strftime('%H:%M:%S')} {model}, {row}, {engine}: {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
