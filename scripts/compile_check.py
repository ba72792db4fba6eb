"""Compile a model for a machine that need not be there, and say what it takes and does on it.

    scripts/compile_check MODEL --target v5e:2x2 [--mesh 1x4] [--dtype bfloat16]
    scripts/compile_check llama-70b --format Q4_K_M --target v6e:2x2
    scripts/compile_check MODEL --target h100
    scripts/compile_check MODEL --target cpu:8

MODEL is a GGUF file, of which the header alone is read; the name of a size (llama-1.1b, llama-8b,
llama-70b, mixtral-8x7b); or a JSON file with the fields of `ModelConfig`. Printed are the bytes of
weights, KV cache and temporaries on a device, and for prefill, decoding step and generation what
devices tell each other, the TPU compiler's own estimate of cycles or the kernels of a GPU, and
whether a weight is ever dense as a whole. The compilers come with `pip install "jax[tpu]"` and
`pip install "jax[cuda13]"`; they need neither a TPU nor a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

# This process computes nothing, so whatever accelerator there is stays free.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import qllama_jax as ql
from compile_case import PROGRAMS, Case, dense_layer_bytes, local_bytes, lower, weight_sizes
from compile_targets import TARGETS, devices_of
from compiled_module import Module
from model_shapes import abstract_file, config_of
from qllama_jax.abstract_params import abstract_params
from qllama_jax.config import ModelConfig
from qllama_jax.shard_plan import plan_shards
from qllama_jax.sharding import Partitioning


def check(case: Case, program: str, save: Path | None) -> dict[str, Any]:
    """Compile one program and return what is to be told of it."""
    began = time.perf_counter()
    compiled = lower(case, program).compile()
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{program}.txt").write_text(text)
    module, memory = Module(text), compiled.memory_analysis()
    weights = weight_sizes(case, program)
    dense = [dims for dims in module.float_buffers() if math.prod(dims) in weights]
    return {
        "program": program,
        "compile_seconds": round(seconds, 1),
        # None: the libtpu of jax 0.10 does not count them, and tells 0. A TPU's include what is
        # fetched ahead into its vector memory; the largest buffer is one of main memory.
        "temp_bytes": memory.temp_size_in_bytes or None,
        "largest_buffer": module.largest_buffer(),
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": module.collectives(),
        "estimated_cycles": module.estimated_cycles(),
        "kernels": module.kernels(),
        "dense_weights": dense,
    }


def open_model(options: argparse.Namespace) -> tuple[Any, ModelConfig]:
    """Return the tensor table and the config of MODEL."""
    if options.model.endswith(".gguf"):
        file = ql.read_gguf(options.model)
        table = file.tensors.get("token_embd.weight")
        rows = None if table is None else table.shape[-1]
        return file, ModelConfig.from_metadata(file.metadata, vocab_size=rows)
    config = config_of(options.model)
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    return abstract_file(options.model, config, options.format), config


def make_case(options: argparse.Namespace) -> Case:
    """Place the model's shapes on the target's devices."""
    file, config = open_model(options)
    devices = devices_of(options.target)
    data, model = options.mesh or (1, len(devices))
    if data * model > len(devices):
        raise SystemExit(f"--mesh {data}x{model}: {options.target} has {len(devices)} devices")
    grid = np.asarray(devices[: data * model]).reshape(data, model)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    plan = plan_shards(file, config, Partitioning.of(mesh), options.uneven)
    return Case(
        abstract_params(file, config, plan),
        config,
        plan.partitioning,
        options.batch,
        options.prompt,
        options.context,
        options.new_tokens,
        jax.numpy.dtype(options.dtype),
    )


def megabytes(size: int) -> str:
    """Bytes, to be read."""
    return f"{size / 1e6:,.1f} MB"


def show(report: dict[str, Any]) -> None:
    """Print what one program takes and does."""
    told = ", ".join(f"{n} {kind}" for kind, n in report["collectives"].items()) or "none"
    dense = ", ".join(map(str, report["dense_weights"])) or "none"
    print(f"{report['program']} (compiled in {report['compile_seconds']} s)")
    temporaries = report["temp_bytes"]
    known = f"{megabytes(temporaries)} a device" if temporaries else "not told by this compiler"
    size, shape = report["largest_buffer"]
    print(f"  temporaries       {known}")
    print(f"  largest buffer    {megabytes(size)}, {shape}")
    print(f"  arguments         {megabytes(report['argument_bytes'])} a device, as laid out")
    print(f"  between devices   {told}")
    print(f"  dense weights     {dense}")
    if report["estimated_cycles"] is not None:
        print(f"  estimated cycles  {report['estimated_cycles']:,}")
    kernels = ", ".join(f"{n} {kind}" for kind, n in list(report["kernels"].items())[:8])
    print(f"  kernels           {kernels}")


def arguments() -> argparse.Namespace:
    """Parse the command line."""

    def mesh(text: str) -> tuple[int, int]:
        data, model = text.split("x")
        return int(data), int(model)

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--target", required=True, help=TARGETS)
    parser.add_argument("--format", default="Q4_K_M", help="of a MODEL that is no file")
    parser.add_argument("--layers", type=int, help="so many in place of all, of such a MODEL")
    parser.add_argument("--mesh", type=mesh, metavar="DATAxMODEL", help="default: 1 x all devices")
    parser.add_argument("--uneven", choices=("refuse", "replicate"), default="refuse")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=1024, help="positions of the cache")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the generation")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one line of JSON, last")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the modules there")
    options = parser.parse_args()
    options.programs = [name for name in options.programs.split(",") if name]
    if options.prompt > options.context:
        parser.error(f"--prompt {options.prompt} does not fit --context {options.context}")
    if unknown := set(options.programs) - set(PROGRAMS):
        parser.error(f"--programs: {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    return options


def main() -> None:
    """Print the report."""
    options = arguments()
    try:
        case = make_case(options)
    except ValueError as error:  # GGUFError is one
        raise SystemExit(f"{error}") from None
    mesh = "x".join(map(str, case.partitioning.mesh.devices.shape))
    found: dict[str, Any] = {
        "model": options.model,
        "target": options.target,
        "mesh": mesh,
        "jax": jax.__version__,
        "weights_bytes": local_bytes(case.params),
        "cache_bytes": local_bytes(case.cache),
        "dense_layer_bytes": dense_layer_bytes(case),
        "programs": {},
    }
    print(f"{options.model} on {options.target}, mesh {mesh}, jax {jax.__version__}")
    print(f"weights           {megabytes(found['weights_bytes'])} a device")
    print(f"cache             {megabytes(found['cache_bytes'])} a device, {case.context} positions")
    print(
        f"a layer, dense    {megabytes(found['dense_layer_bytes'])} a device, float32", flush=True
    )
    for program in options.programs:
        report = check(case, program, options.save)
        found["programs"][program] = report
        show(report)
        sys.stdout.flush()
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
