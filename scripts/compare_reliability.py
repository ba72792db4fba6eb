"""Print the table of docs/reliability.md: what readers of GGUF files make of the same bad files.

    python scripts/compare_reliability.py [--files N] [--llama-python PYTHON]

The files are those of tests/mutations. A reader may refuse a file, accept it, hang or crash; each
runs in a process of its own. llama.cpp is loaded by a Python that has llama-cpp-python.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from mutations import OPERATORS
from mutations.bases import formats, make_bases
from mutations.judge import make_mutant
from mutations.operators import Operator

WORKER = Path(__file__).resolve().parent / "reader_verdicts.py"
#: Reader -> what a file has to be refused for: file readers do not know models.
DUTIES = {
    "qllama_jax": ("open", "load", "tokenizer"),
    "llama.cpp": ("open", "load", "tokenizer"),
    "gguf-py": ("open",),
    "candle": ("open",),
}
COLUMNS = ["refused", "accepted", "sound, refused", "damaged, accepted", "with other tensors"]
COLUMNS += ["hung", "crashed"]


def without_bfloat16(name: str) -> str:
    """Format of a matrix, as `formats` has it but for BF16, which candle does not read."""
    return "F16" if formats(name) == "BF16" else formats(name)


class Worker:
    """A reader in a process, started again where a file ended it."""

    def __init__(self, reader: str, python: str) -> None:
        self.command = [python, str(WORKER), reader]
        self.process: Any = None

    def ask(self, path: Path) -> tuple[str, str]:
        """Verdict and detail: accepted and hash, refused and error, hung, crashed and signal."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if answer:
            return answer[0], answer[1]
        code = self.process.wait()
        self.process = None
        return ("hung", "") if code == -signal.SIGPROF else ("crashed", str(code))


def tally(operator: Operator, duties: tuple[str, ...], answer: tuple[str, str], sound: str) -> list:
    """Columns that an answer counts in. `sound` is the hash of the file that was damaged."""
    verdict, detail = answer
    columns = [verdict]
    if operator.verdict == "accept" and verdict != "accepted":
        columns.append("sound, refused")
    if operator.verdict in duties and verdict == "accepted":
        columns.append("damaged, accepted")
        if detail != sound:
            columns.append("with other tensors")
    return columns


def main() -> None:
    """Print a row for each reader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--list", action="store_true", help="the mutations behind the figures, too")
    args = parser.parse_args()
    pythons: dict[str, str] = dict.fromkeys(("qllama_jax", "gguf-py", "candle"), sys.executable)
    if args.llama_python:
        pythons["llama.cpp"] = args.llama_python
    workers = {name: Worker(name, python) for name, python in pythons.items()}
    counts: dict[str, Counter[str]] = {name: Counter() for name in workers}
    listed: dict[str, Counter[str]] = {name: Counter() for name in workers}
    with tempfile.TemporaryDirectory() as folder:
        sources, work = Path(folder) / "bases", Path(folder) / "mutants"
        sources.mkdir()
        work.mkdir()
        bases = make_bases(sources, formats=without_bfloat16)
        del bases["split"]  # candle and gguf-py read one file at a time
        sound: dict[tuple[str, str], str] = {}
        for base, files in bases.items():
            for part, draft in files.items():
                draft.write(sources / part)
            for name, worker in workers.items():
                verdict, detail = worker.ask(sources / min(files))
                if verdict != "accepted":
                    sys.exit(f"{name}: the sound file {base} was {verdict}, {detail}")
                sound[name, base] = detail
        left_out = {
            "bfloat16_not_finite",
            *(n for n, op in OPERATORS.items() if "split" in op.bases),
        }
        whole = [op for name, op in OPERATORS.items() if name not in left_out]
        for seed in range(-(-args.files // len(whole))):
            for operator in whole:
                tiny = [base for base in operator.bases if base != "real"]
                base = tiny[seed % len(tiny)]
                path, _ = make_mutant(operator, base, seed, bases, work)
                answers = {name: worker.ask(path) for name, worker in workers.items()}
                for name, answer in answers.items():
                    if answer[0] == "refused" and answers["qllama_jax"][0] == "accepted":
                        listed[name][f"accepted by qllama_jax, refused: {operator.name}"] += 1
                    for column in tally(operator, DUTIES[name], answer, sound[name, base]):
                        counts[name][column] += 1
                        listed[name][f"{column}: {operator.name}"] += 1
        shutil.rmtree(work)
    columns = COLUMNS
    print(f"| reader | files | {' | '.join(columns)} |\n|---|" + "---|" * (1 + len(columns)))
    for name, count in counts.items():
        cells = [str(count[column]) for column in columns]
        if name == "llama.cpp":  # it hands out no tensors
            cells[columns.index("with other tensors")] = ""
        files = sum(count[c] for c in ("refused", "accepted", "hung", "crashed"))
        print(f"| {name} | {files} | {' | '.join(cells)} |")
    if args.list:
        for name, found in listed.items():
            for what, times in sorted(found.items()):
                if what.split(":")[0] not in ("refused", "accepted"):
                    print(f"{name}: {what}: {times}")


if __name__ == "__main__":
    main()
