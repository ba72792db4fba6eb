"""A file that changes while it is loaded gives a right model or GGUFError, and ends no process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qllama_jax as ql
from tiny import write_tiny_llama

SMALL: dict[str, Any] = {"layers": 2, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2}
POINTS = 10


def truncate(path: Path, other: bytes) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path, other: bytes) -> None:
    with path.open("r+b") as file:
        file.write(other)


def replace(path: Path, other: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(other)
    new.replace(path)


CHANGES: list[Callable[[Path, bytes], None]] = [truncate, overwrite, replace]


def leaves(model: ql.Model) -> list[np.ndarray]:
    return list(map(np.asarray, jax.tree.leaves(model.params)))


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, one, other))


class Load:
    """A load in which something happens right after the system was asked what the file is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.at, self.happens = 0, -1, lambda: None
        status = os.fstat

        def fstat(descriptor: int) -> os.stat_result:
            found = status(descriptor)
            self.calls += 1
            if self.calls == self.at:
                self.happens()
            return found

        monkeypatch.setattr(os, "fstat", fstat)

    def run(self, path: Path, layout: Any, at: int = -1, happens: Any = None) -> list[np.ndarray]:
        self.calls, self.at, self.happens = 0, at, happens
        return leaves(ql.load(path, layout=layout))


@pytest.mark.parametrize("layout", ["auto", "file"])
@pytest.mark.parametrize("change", CHANGES)
def test_each_load_gives_the_old_model_or_the_new_one_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, layout: Any
):
    path = tmp_path / "m.gguf"
    old = write_tiny_llama(path, "Q4_0", **SMALL).read_bytes()
    new = write_tiny_llama(path, "Q4_0", seed=1, **SMALL).read_bytes()
    assert len(old) == len(new)
    models = {"new": leaves(ql.load(path, layout=layout))}
    load = Load(monkeypatch)
    path.write_bytes(old)
    models["old"] = load.run(path, layout)
    assert not equal(models["old"], models["new"])
    # One when the magic is read, two around the header, two around each tensor.
    tensors = ql.read_gguf(path).tensors
    calls = 3 + 2 * len(tensors)
    load.run(path, layout)
    assert load.calls == calls
    results = {}
    for at in np.linspace(1, calls, POINTS).round().astype(int).tolist():
        path.unlink()
        path.write_bytes(old)
        os.utime(path, (1, 1))  # written long ago
        try:
            found = load.run(path, layout, at, lambda: change(path, new))
        except ql.GGUFError:
            results[at] = "refused"
        else:
            results[at] = next((n for n, model in models.items() if equal(found, model)), "mixed")
    assert len(results) == POINTS
    # Changed after the magic was read: the header is the new file's. After the last look: too late.
    wanted = dict.fromkeys(results, "refused")
    wanted |= {1: "refused" if change is truncate else "new", calls: "old"}
    assert results == wanted


@pytest.mark.parametrize("change", CHANGES)
def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path, change: Any):
    path = write_tiny_llama(tmp_path / "m.gguf", "F32", **SMALL)
    other = write_tiny_llama(tmp_path / "other.gguf", "F32", seed=1, **SMALL).read_bytes()
    model = ql.load(path, layout="file")
    before = [np.array(leaf) for leaf in leaves(model)]
    change(path, other)
    assert equal(leaves(model), before)
