"""Compile x @ dequantize(w).T for a machine that need not be there, a weight of each format.

    python scripts/compile_products.py --target h100 [--rows 1 4] [--formats Q4_0 Q6_K]

A line a product: temporaries, the largest buffer in main memory, kernels, and a TPU compiler's
estimate of cycles. A dense weight of 4096 x 4096 would be 64 MiB of float32.
"""

from __future__ import annotations

import argparse
import os

# This process computes nothing, so whatever accelerator there is stays free.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

import qllama_jax as ql
from compile_targets import TARGETS, devices_of
from compiled_module import Module
from qllama_jax.quants import FORMATS, Block

MIB = 2**20


def abstract_weight(form: type[Block], out: int, width: int, where: Sharding) -> Block:
    """Shapes of a weight in blocks."""
    leading = (out, width // form.block_size)

    def shape(field: np.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *field.shape), field.base, sharding=where)

    return form(**{name: shape(form.layout[name]) for name in form.layout.names or ()})


def line(form: type[Block], rows: int, size: int, dtype: str, where: Sharding) -> str:
    """Compile one product and say what it takes."""
    w = abstract_weight(form, size, size, where)
    x = jax.ShapeDtypeStruct((rows, size), dtype, sharding=where)
    compiled = jax.jit(ql.matmul).lower(x, w).compile()
    module, memory = Module(compiled.as_text() or ""), compiled.memory_analysis()
    assert memory is not None
    largest, shape = module.largest_buffer()
    cells = [
        form.qtype.name,
        f"{rows}",
        f"{memory.temp_size_in_bytes / MIB:.2f}",
        f"{largest / MIB:.2f} {shape}",
        ", ".join(f"{n} {kind}" for kind, n in list(module.kernels().items())[:3]),
    ]
    if (cycles := module.estimated_cycles()) is not None:
        cells.append(f"{cycles / 1e3:,.0f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    names = [qtype.name for qtype in FORMATS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", required=True, help=TARGETS)
    parser.add_argument("--formats", nargs="*", default=names, choices=names)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    where = SingleDeviceSharding(devices_of(options.target)[0])
    head = ["format", "rows", "temporaries, MiB", "largest buffer, MiB", "kernels"]
    head += ["thousand cycles"] if options.target.startswith("v") else []
    print(f"jax {jax.__version__}, {options.target}, [{options.size}, {options.size}]")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head), flush=True)
    for qtype, form in FORMATS.items():
        if qtype.name in options.formats:
            for rows in options.rows:
                print(line(form, rows, options.size, options.dtype, where), flush=True)


if __name__ == "__main__":
    main()
