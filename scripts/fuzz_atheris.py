"""Fuzz the reader of GGUF files, guided by coverage, and compare with gguf-py what it accepts.

    pip install atheris    # into an environment with the package and its tests' requirements
    python scripts/fuzz_atheris.py -max_total_time=900

Arguments are libFuzzer's. An input that ends in anything but a result or GGUFError is written to
crash-*, as is one that takes two seconds of work, and the run ends there. Seeds are the small
files of the tests. The last lines count the inputs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingImports]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

with atheris.instrument_imports(include=["qllama_jax"]):  # pyright: ignore
    from qllama_jax.config import ModelConfig
    from qllama_jax.errors import GGUFError
    from qllama_jax.gguf_file import read_gguf
    from qllama_jax.tokenizer.vocabulary import read_vocabulary

from gguf_bytes import TinyGGUF, assert_same_metadata, assert_same_tensors, read_with_gguf_py
from mutations.guard import limited_time
from tiny import write_tiny_llama

LIMITS = ["-timeout=600", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1"]


def write_seeds(folder: Path) -> None:
    """Write the file of three tensors in both versions, and the headers of two models."""
    for version in (2, 3):
        (folder / f"v{version}").write_bytes(TinyGGUF(version=version).encode())
    for tokenizer in ("llama", "gpt2"):
        path = folder / tokenizer
        write_tiny_llama(path, layers=1, embed=32, ffn=32, vocab=288, tokenizer=tokenizer)
        os.truncate(path, next(iter(read_gguf(path).tensors.values())).offset)
        # Without its tensors it is whole: the table of tensors is counted at byte 8.
        raw = bytearray(path.read_bytes())
        raw[8:16] = bytes(8)
        path.write_bytes(raw[: raw.rindex(b"token_embd.weight") - 8])


def check(path: Path) -> None:
    """Read a file as `load` does, up to its tensors' values; raises where a promise is broken."""
    file = result(read_gguf, path, path)
    if file is None:
        return
    try:
        reader = read_with_gguf_py(path)
    except Exception:
        reader = None  # it may refuse more than we do
    if reader is not None:
        assert_same_metadata(file, reader)
        assert_same_tensors(file, [reader])
    for read in (ModelConfig.from_metadata, read_vocabulary):
        result(read, file.metadata, path)


def result(read: Callable[[Any], Any], source: Any, path: Path) -> Any:
    """What a reader gives, None where it refuses the file in the way that it may."""
    try:
        return read(source)
    except GGUFError as error:
        message = str(error)
    if not (message.startswith(f"{path}: ") and message.isprintable()):
        raise ValueError(message)
    return None


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        write_seeds(seeds)
        path = Path(folder) / "m.gguf"

        def one_input(data: bytes) -> None:
            path.unlink(missing_ok=True)  # gguf-py may still map the last one
            path.write_bytes(data)
            with limited_time():
                check(path)

        atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[1:], str(seeds)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
