"""scripts/compile_products: a product of each format, compiled for devices that are not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from qllama_jax.quants import FORMATS

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compile_products.py"
SIZE = 4096
DENSE = SIZE * SIZE * 4 / 2**20  # MiB


def products(*arguments: str) -> list[list[str]]:
    """The cells of each line of the table."""
    command = [sys.executable, str(SCRIPT), "--size", str(SIZE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax_cuda13_plugin is missing"
)
def test_a_gpu_makes_no_weight_dense_for_few_rows():
    found = products("--target", "h100", "--rows", "1", "4", "8")
    assert [line[0] for line in found] == [name.name for name in FORMATS for _ in range(3)]
    for name, rows, temporaries, largest, *_ in found:
        # The integers of a weight, a byte each, are a quarter of it; jax 0.11 holds them twice.
        assert float(largest.split()[0]) <= DENSE / 4, (name, rows)
        assert float(temporaries) < DENSE / 2 + 1, (name, rows)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing")
def test_a_tpu_keeps_a_product_of_blocks_out_of_its_main_memory():
    formats = ["Q4_0", "IQ4_XS", "IQ3_S"]  # one that is one tile, and two of tables
    found = products("--target", "v5e:2x2", "--rows", "1", "--formats", *formats)
    assert sorted(line[0] for line in found) == sorted(formats)
    for name, _, temporaries, largest, _, cycles in found:
        assert float(largest.split()[0]) <= DENSE / 16, name
        assert float(temporaries) <= DENSE / 2, name
        assert int(cycles.replace(",", "")) > 0
