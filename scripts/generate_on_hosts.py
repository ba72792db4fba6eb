"""Generate text with a model that lies over the devices of one host or of several.

    python scripts/generate_on_hosts.py MODEL.gguf "Once upon a time" [--mesh data=1,model=8]

The same command runs on every host, but for --process, its number. On a TPU slice, under Slurm and
in other clusters that JAX knows --cluster finds the others; elsewhere --coordinator is where the
first of --processes listens. Without any of these it is one host's devices. The first process
prints the text and draws bars; the others are silent.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys

import jax

import qllama_jax as ql
from qllama_jax.chat import show
from qllama_jax.progress_bars import bar


def main() -> None:
    """Join the other processes, load the parts of this one's devices, generate."""
    arguments = read_arguments()
    if arguments.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if arguments.cluster:
        jax.distributed.initialize()
    elif arguments.coordinator:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    sizes = read_mesh(arguments.mesh) or {"model": jax.device_count()}
    if math.prod(sizes.values()) != jax.device_count():
        raise SystemExit(f"--mesh {sizes}: there are {jax.device_count()} devices")
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    first = jax.process_index() == 0

    with bar("loading", is_bytes=True) if first else contextlib.nullcontext() as progress:
        try:
            model = ql.load(arguments.model, mesh=mesh, uneven=arguments.uneven, progress=progress)
        except ValueError as error:  # GGUFError is one
            raise SystemExit(str(error)) from None
    with bar("prompt") if first else contextlib.nullcontext() as progress:
        pieces = ql.stream(
            model,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            dtype=arguments.dtype,
            progress=progress,
        )
        if not first:
            for _ in pieces:  # every process computes; one prints
                pass
            return
        stats = show(pieces, []).stats
    assert stats is not None
    print(
        f"{dict(sizes)}: prompt {stats.prefill_tok_s:.1f} tok/s, generated"
        f" {stats.decode_tok_s:.1f} tok/s (compiling included)",
        file=sys.stderr,
    )


def read_mesh(text: str) -> dict[str, int]:
    """Return the sizes of a mesh's axes, from "data=2,model=4"."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: int(size) for name, size in pairs}
    except ValueError:
        raise SystemExit(f"--mesh {text}: expected axes and sizes, as in data=2,model=4") from None


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--mesh", default="", help="axes and sizes; default: model=all devices")
    parser.add_argument("--uneven", choices=("refuse", "replicate"), default="refuse")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    hosts = parser.add_argument_group("several hosts")
    hosts.add_argument("--cluster", action="store_true", help="JAX knows of the other hosts")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    hosts.add_argument("--processes", type=int, help="how many there are")
    hosts.add_argument("--process", type=int, help="which this is, from 0")
    hosts.add_argument("--cpu-devices", type=int, help="so many CPU devices, to try it out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
