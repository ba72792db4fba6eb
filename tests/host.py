"""One of two processes of four CPU devices each, for test_hosts.py.

    python host.py PORT PROCESS FOLDER SIZE,NAME,SIZE,NAME=MODEL...

Loads each model on a mesh of these axes and leaves in FOLDER what came out: the logits of
TOKENS, the log-probabilities of its first row, and the bytes that the process has read meanwhile,
as Linux counts them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

import qllama_jax as ql

TOKENS = np.random.default_rng(0).integers(0, 384, (4, 9)).astype(np.int32)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def run(axes: str, path: str, out: Path) -> None:
    sizes, names = axes.split(",")[::2], axes.split(",")[1::2]
    mesh = jax.make_mesh(tuple(map(int, sizes)), tuple(names))
    before = bytes_read()
    model = ql.load(path, mesh=mesh)
    read = bytes_read() - before
    cache = ql.init_cache(model.config, len(TOKENS), TOKENS.shape[1], mesh=mesh)
    logits, _ = ql.forward(model.params, TOKENS, cache, config=model.config)
    scored = ql.score(model, TOKENS[0].tolist())
    np.savez(out, logits=np.asarray(logits), logprobs=scored.logprobs, read=read)


def main() -> None:
    port, process, folder, *models = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    for i, model in enumerate(models):
        axes, path = model.split("=")
        run(axes, path, Path(folder) / f"{i}.{process}.npz")


if __name__ == "__main__":
    main()
