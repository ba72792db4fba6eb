"""Compare the perplexity of a text, and the distributions behind it, with llama.cpp's.

    python scripts/compare_perplexity.py MODEL.gguf TEXT [-c 512] [--chunks N]

By the recipe of llama.cpp's tools/perplexity. It comes as llama-cpp-python; where that is installed
beside another Python, name it with --llama-python. Its CPU kernels round activations to int8, as
"int8" does here; "int8x2" adds what the rounding leaves, rounded too; "auto" is "int8", or bfloat16
where the CPU multiplies that; "float" rounds nothing, so the divergence of the others from it,
KL(float || other) a token, is what their rounding costs.
--float64 adds the tests' float64 model, the judge of all, at ten seconds a chunk. Exit status 1
where a token id differs, a perplexity differs from llama.cpp's by more than 0.5 %, or a divergence
is above llama.cpp's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

import qllama_jax as ql

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reference import Float64, Reference

BAR = 0.005
EXACT, THEIRS = "qllama_jax, float", "llama.cpp"
#: Logits [N, V] of a chunk's tokens from the middle on, the last left out.
Logits = Callable[[np.ndarray], np.ndarray]


@dataclass
class Side:
    """One way to compute the logits, and what came of it: a mean a chunk."""

    name: str
    logits: Logits
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def add(self, log_p: Float64, exact: Float64, following: np.ndarray) -> None:
        """Take a chunk's log-probabilities [N, V]; `exact` are those to diverge from."""
        chosen = np.take_along_axis(log_p, following[:, None], axis=1)
        self.losses.append(-float(chosen.mean()))
        divergence = (np.exp(exact) * (exact - log_p)).sum(axis=1)
        self.divergences.append(float(divergence.mean()))
        self.agreements.append(float((log_p.argmax(axis=1) == exact.argmax(axis=1)).mean()))


def ours(model: ql.Model, activations: Any) -> Logits:
    """By `hidden_states` and `unembed`."""

    @functools.partial(jax.jit, static_argnames="config")
    def second_half(params: ql.Params, tokens: jax.Array, *, config: ql.ModelConfig) -> jax.Array:
        _, c = tokens.shape
        cache = ql.init_cache(config, 1, c)
        options: dict[str, Any] = {"config": config, "activations": activations}
        hidden, _, _ = ql.hidden_states(params, tokens, cache, **options)
        return ql.unembed(params, hidden[0, c // 2 : -1], **options)

    def logits(chunk: np.ndarray) -> np.ndarray:
        tokens = jnp.asarray(chunk[None], jnp.int32)
        return np.asarray(second_half(model.params, tokens, config=model.config))

    return logits


def float64(path: Path) -> Logits:
    """By the tests' model."""
    reference = Reference(path)
    return lambda chunk: reference.unembed(reference.hidden(chunk)[chunk.size // 2 : -1])


def arrays(stream: IO[bytes], shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Float32 arrays of a shape, one after the other, until the stream ends."""
    size = 4 * math.prod(shape)
    while len(found := stream.read(size)) == size:
        yield np.frombuffer(found, np.float32).reshape(shape)


def log_softmax(logits: np.ndarray) -> Float64:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


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
    c = args.context
    count = min(args.chunks, len(ids) // c)
    if count == 0:
        parser.error(f"{args.text} has {len(ids)} tokens, wanted at least {c}")
    chunks = np.reshape(ids[: count * c], (count, c))
    if model.tokenizer.add_bos:
        chunks[:, 0] = model.tokenizer.bos_id

    script = str(Path(__file__).with_name("llama_cpp_logits.py"))
    command = [args.llama_python, script, str(args.model), str(args.text)]
    command += ["-c", str(c), "--chunks", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            return process.wait() or 1
        header = json.loads(line)
        if header["tokens"] != ids:
            process.kill()
            pairs = enumerate(zip(ids, header["tokens"], strict=False))
            at = next((i for i, (a, b) in pairs if a != b), "the end of one")
            print(f"{len(ids)} ids, llama.cpp has {len(header['tokens'])}; they differ at {at}")
            return 1
        theirs = arrays(process.stdout, tuple(header["shape"]))
        sides = [Side(EXACT, ours(model, "float")), Side(THEIRS, lambda _: next(theirs))]
        sides += [Side(f"qllama_jax, {a}", ours(model, a)) for a in ("auto", "int8", "int8x2")]
        if args.float64:
            sides.append(Side("float64", float64(args.model)))
        for i, chunk in enumerate(chunks):
            found = [log_softmax(side.logits(chunk)) for side in sides]
            for side, log_p in zip(sides, found, strict=True):
                side.add(log_p, found[0], chunk[c // 2 + 1 :])
            print(f"chunk {i + 1} of {count}", end="\r", file=sys.stderr)
    scored = count * header["shape"][0]
    print(f"{args.model.name}: {len(ids)} tokens, the same ids; {chunks.size} in {count} chunks,")
    print(f"{scored} of them scored\n")
    return report(sides)


def report(sides: list[Side]) -> int:
    """Print the table; return 1 where a bar is not reached."""
    print("| | perplexity | against llama.cpp | KL from float | same likeliest token |")
    print("|---|---|---|---|---|")
    llama_cpp = next(side for side in sides if side.name == THEIRS)
    failed = False
    for side in sides:
        # Of the chunks' differences: text that is hard for one is as hard for the other.
        each = np.subtract(side.losses, llama_cpp.losses)
        relative = np.expm1(each.mean())
        print(
            f"| {side.name} | {np.exp(np.mean(side.losses)):.4f}"
            f" | {relative:+.3%} ± {error(each):.3%}"
            f" | {np.mean(side.divergences):.2e} ± {error(side.divergences):.1e}"
            f" | {np.mean(side.agreements):.2%} |"
        )
        is_worse = np.mean(side.divergences) > np.mean(llama_cpp.divergences)
        failed |= bool(abs(relative) > BAR or is_worse)
    return int(failed)


def error(values: Any) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


if __name__ == "__main__":
    sys.exit(main())
