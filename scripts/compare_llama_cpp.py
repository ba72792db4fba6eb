"""Print the table of docs/matrix.md: each file of tests/matrix.py against float64 and llama.cpp.

    python scripts/compare_llama_cpp.py

llama.cpp's logits come from tests/goldens/matrix.json; it is not needed itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np

from llama_cpp_matrix import distances
from matrix import FORMATS, MATRIX, NOT_IN_LLAMA_CPP, SMALL, VARIANTS
from tiny import write_tiny_llama


def described(name: str) -> str:
    """What a file has that the others have not."""
    if name in FORMATS:
        return "every matrix in the format, embed 256"
    options = {key: value for key, value in VARIANTS[name].items() if key != "seed"}
    keys = {key.removeprefix("llama."): v for key, v in options.pop("metadata", {}).items()}
    if "kv_heads" in options:
        options["heads"] = SMALL["heads"]
    return ", ".join(f"{key} {value}" for key, value in (options | keys).items())


def short(x: float) -> str:
    """Two digits."""
    return f"{x:.1e}".replace("e-0", "e-") if x else "0"


def main() -> None:
    """Print the table."""
    print(
        "| file | variant | from float64 | from llama.cpp | its rounding | left, rounding alike |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in MATRIX.items():
            path = write_tiny_llama(Path(folder) / "tiny.gguf", **options)
            found = distances(path, name)
            row = [short(float(found.error.max()))]
            if found.distance is None or found.rounding is None or found.left is None:
                row += [NOT_IN_LLAMA_CPP[name], "", ""]
            else:
                row += [short(float(x.max())) for x in (found.distance, found.rounding)]
                row.append(short(float(np.median(found.left))))
            print(f"| {name} | {described(name)} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
