"""Compare the perplexity of a text with llama.cpp's, by the recipe of its tools/perplexity.

    python scripts/compare_perplexity.py MODEL.gguf TEXT [-c 512] [--chunks N]

llama.cpp comes as llama-cpp-python; where that is installed beside another Python, name it with
--llama-python. Its CPU kernels round activations to int8, as "int8" does here; "float" rounds
nothing. --float64 adds the tests' float64 model, the judge of both, at ten seconds a chunk. Exit
status 1 where a token id differs, or a perplexity from llama.cpp's by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

import qllama_jax as ql

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reference import Float64, Reference

BAR = 0.005


def our_losses(model: ql.Model, chunks: np.ndarray, activations: str) -> Float64:
    """Mean loss of each chunk, from the perplexities of all chunks so far."""
    results = ql.perplexity(
        model,
        chunks.reshape(-1).tolist(),
        context=chunks.shape[1],
        activations=activations,  # pyright: ignore[reportArgumentType]
    )
    sums = [np.log(result.value) * result.chunks for result in results]
    return np.diff(sums, prepend=0)


def float64_losses(path: Path, model: ql.Model, chunks: np.ndarray) -> Float64:
    """Mean loss of each chunk, by the tests' model."""
    reference = Reference(path)
    losses = []
    for chunk in chunks.copy():
        if model.tokenizer.add_bos:
            chunk[0] = model.tokenizer.bos_id
        middle = chunk.size // 2
        logits = reference.unembed(reference.hidden(chunk)[middle:-1])
        logits -= logits.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(logits, chunk[middle + 1 :, None], axis=1)[:, 0]
        losses.append(np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen))
    return np.array(losses)


def main() -> int:
    """Compute all and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=2**31, help="default: all")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    args = parser.parse_args()

    model = ql.load(args.model)
    # As the tool does: text that looks like a control token is text.
    ids = model.tokenizer.encode(args.text.read_bytes().decode(), parse_special=False)
    count = min(args.chunks, len(ids) // args.context)
    if count == 0:
        parser.error(f"{args.text} has {len(ids)} tokens, wanted at least {args.context}")
    chunks = np.reshape(ids[: count * args.context], (count, args.context))

    script = str(Path(__file__).with_name("llama_cpp_losses.py"))
    command = [args.llama_python, script, str(args.model), str(args.text)]
    command += ["-c", str(args.context), "--chunks", str(count)]
    found = subprocess.run(command, stdout=subprocess.PIPE)
    if found.returncode:
        return found.returncode
    report = json.loads(found.stdout)
    if report["tokens"] != ids:
        pairs = enumerate(zip(ids, report["tokens"], strict=False))
        at = next((i for i, (a, b) in pairs if a != b), "the end of one")
        print(f"{len(ids)} token ids, llama.cpp has {len(report['tokens'])}; they differ at {at}")
        return 1
    theirs = np.mean(report["losses"], axis=1)
    print(f"{args.model.name}: {len(ids)} tokens, the same ids; {chunks.size} in {count} chunks,")
    print(f"{np.size(report['losses'])} of them scored\n")
    print("| | perplexity | against llama.cpp | standard error of that |")
    print("|---|---|---|---|")
    row("llama.cpp", theirs, theirs)
    off = [
        row(f"qllama_jax, {activations}", our_losses(model, chunks, activations), theirs)
        for activations in ("float", "int8")
    ]
    if args.float64:
        row("float64", float64_losses(args.model, model, chunks), theirs)
    return 1 if max(map(abs, off)) > BAR else 0


def row(name: str, losses: Float64, theirs: Float64) -> float:
    """Print a row of the table and return the relative difference of the perplexities."""
    each = losses - theirs
    relative = np.expm1(each.mean())
    # Of the chunks' differences: text that is hard for one is as hard for the other.
    error = each.std(ddof=1) / math.sqrt(each.size) if each.size > 1 else math.nan
    print(f"| {name} | {np.exp(losses.mean()):.4f} | {relative:+.3%} | {error:.3%} |", flush=True)
    return float(relative)


if __name__ == "__main__":
    sys.exit(main())
