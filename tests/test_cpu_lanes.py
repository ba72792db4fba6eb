"""How many rows a tile of a CPU's packing has depends on the processor; results do not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cpu_weights import multiply, normal, relative_error, weight
from qllama_jax.matmul.cpu import LAYOUTS
from qllama_jax.matmul.cpu import weight as cpu_weight
from qllama_jax.matmul.cpu.weight import lanes_of

pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture(params=[16, 32])
def lanes(request, monkeypatch) -> Iterator[int]:
    monkeypatch.setattr(cpu_weight, "WORD_LANES", request.param)
    weight.cache_clear()
    yield request.param
    weight.cache_clear()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_in_tiles_of_any_lanes_is_the_files(name: str, lanes: int):
    w, dense = weight(name, 100, 512)  # its last tile is filled up
    of_words = bool(LAYOUTS[name].words)
    assert w.words.shape[-1] == lanes_of(name) == (lanes if of_words else 16)
    assert w.padded == (128 if of_words and lanes == 32 else 112)
    np.testing.assert_array_equal(w.dequantize(), dense)
    np.testing.assert_array_equal(w.dequantize_rows(jnp.array([0, 33, 99])), dense[[0, 33, 99]])


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("rows", [1, 4, 24, 130])
@pytest.mark.parametrize(
    ("activations", "bound", "out"),
    # Half of 200 rows, which are seven tiles of 32, is none of whole tiles.
    [("float", 1e-6, 200), ("int8", 6e-3, 100)],
    ids=["float", "int8"],
)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0"])
def test_products_with_tiles_of_any_lanes(
    name: str, activations: str, bound: float, out: int, rows: int
):
    w, dense = weight(name, out, 512)
    x = normal(rows, 512)
    found = multiply(x, w, activations)
    assert relative_error(found, x.astype(np.float64) @ dense.T) <= bound


@pytest.mark.parametrize(("family", "lanes"), [(25, 16), (26, 32)])
def test_tiles_of_words_have_as_many_rows_as_a_processors_vectors_have_lanes(
    family: int, lanes: int, tmp_path: Path
):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nflags\t\t: fpu avx512f\n"
    )
    # In a process of its own, where the file is read instead of the system's.
    script = f"""
import pathlib
usual = pathlib.Path.open
def read(path, *arguments, **options):
    other = pathlib.Path({str(cpuinfo)!r}) if str(path) == "/proc/cpuinfo" else path
    return usual(other, *arguments, **options)
pathlib.Path.open = read
from qllama_jax.matmul.cpu.weight import lanes_of
print(lanes_of("Q4_0"), lanes_of("Q8_0"))
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [str(lanes), "16"]
