"""Time the CPU's kernels: a row, or some rows, times a weight of each format that it packs.

    python scripts/bench_matmul.py [--shape 4096 2048] [--rows 1] [--activations auto]
    python scripts/bench_matmul.py --formats Q4_0 Q6_K --rows 128

A call multiplies with copies of the weight in turn, 60 MB or more of them, so that they come from
memory and not from a cache; the time is the least of 15 calls. Packing is timed too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

import qllama_jax as ql
from qllama_jax.matmul.cpu import LAYOUTS, pack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from blocks import random_blocks

BYTES = 60e6
CALLS = 15


def least_seconds(call: Callable[[], Any]) -> float:
    """Time of the fastest of CALLS calls."""
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def row(name: str, shape: tuple[int, int], rows: int, activations: str) -> str:
    """A line of the table."""
    rng = np.random.default_rng(0)
    raw = random_blocks(GGMLQuantizationType[name], shape, rng)
    packing = least_seconds(lambda: pack(name, raw))
    one = pack(name, raw)
    weights = [jax.tree.map(jnp.array, one) for _ in range(max(2, round(BYTES / raw.nbytes)))]
    x = jnp.asarray(rng.standard_normal((rows, shape[1])), jnp.float32)

    @jax.jit
    def products(weights: list[Any], x: jax.Array) -> list[jax.Array]:
        found, z = [], x
        for w in weights:
            found.append(ql.matmul(z, w, activations=activations))  # pyright: ignore[reportArgumentType]
            z = x + 1e-9 * found[-1][:, :1]  # one after the other, as in a model
        return found

    jax.block_until_ready(products(weights, x))
    seconds = least_seconds(lambda: products(weights, x)) / len(weights)
    gigabytes, operations = one.nbytes / seconds / 1e9, 2 * rows * np.prod(shape) / seconds / 1e9
    return (
        f"| {name} | {seconds * 1e6:.0f} | {gigabytes:.1f} | {operations:.0f}"
        f" | {raw.nbytes / packing / 1e9:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 2048), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--formats", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--activations", default="auto")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {args.rows} x {args.shape[1]} times {tuple(args.shape)}\n")
    print("| format | us | GB/s | billion operations/s | packed, GB/s |")
    print("|---|---|---|---|---|")
    for name in args.formats:
        print(row(name, tuple(args.shape), args.rows, args.activations), flush=True)


if __name__ == "__main__":
    main()
