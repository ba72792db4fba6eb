"""Makes a mutant, reads it in all the ways there are, and holds the result against the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gguf
import jax
import numpy as np

import qllama_jax as ql
from gguf_bytes import assert_same_metadata, assert_same_tensors, read_with_gguf_py
from mutations.draft import Draft
from mutations.guard import SECONDS, limited
from mutations.operators import Base, Files, Operator
from qllama_jax.quants import Block
from qllama_jax.tensor_file import GGUFFile

STAGES = ("open", "load", "tokenizer")


@dataclass
class Reading:
    """How far reading came: the stage that refused, with its message, and what was opened."""

    refused_by: str | None = None
    message: str = ""
    file: GGUFFile | None = None
    model: ql.Model | None = None


def make_mutant(
    operator: Operator, base: Base, seed: int, bases: dict[Base, Files], folder: Path
) -> tuple[Path, Files | None]:
    """Write a mutant; the file to open, and the drafts where they are what was written."""
    rng = Random(f"{operator.name} {base} {seed}")
    files = {name: draft.copy() for name, draft in bases[base].items()}
    for old in folder.iterdir():
        old.unlink()  # gguf-py may still map the last one
    if operator.level == "bytes":
        raw = bytearray(files["m.gguf"].encode())
        operator.change(raw, rng)
        (folder / "m.gguf").write_bytes(raw)
        return folder / "m.gguf", None
    opened = None
    if operator.level == "split":
        opened = operator.change(files, rng)
    else:
        operator.change(files["m.gguf"], rng)
    for name, draft in files.items():
        draft.write(folder / name)
    return folder / (opened or min(bases[base])), files


def read(path: Path) -> Reading:
    """Open a file, read all tensors, load it and make its tokenizer, as far as it allows."""
    reading, stage = Reading(), "open"
    try:
        reading.file = ql.read_gguf(path)
        stage = "load"
        reading.model = ql.load(path, layout="file")
        stage = "tokenizer"
        if reading.model.has_tokenizer:
            _ = reading.model.tokenizer
    except ql.GGUFError as error:
        reading.refused_by, reading.message = stage, str(error)
    return reading


def judge(
    operator: Operator, base: Base, seed: int, bases: dict[Base, Files], folder: Path
) -> Reading:
    """Make and read a mutant; AssertionError where it is not what the operator declares."""
    path, files = make_mutant(operator, base, seed, bases, folder)
    sizes = [part.stat().st_size for part in folder.iterdir()]
    # A real vocabulary's tokens are 0.6 s of work, and took over 2 s of it on a machine that others
    # kept busy.
    with limited(sum(sizes), 3 * SECONDS if base == "real" else SECONDS):
        reading = read(path)
    if reading.refused_by is not None:
        assert operator.verdict != "accept", reading.message
        check_message(reading.message, folder, operator.place)
        latest = operator.verdict if operator.verdict in STAGES else STAGES[-1]
        assert STAGES.index(reading.refused_by) <= STAGES.index(latest), reading.message
    else:
        assert operator.verdict in ("accept", "either"), "it was accepted"
    if reading.file is not None and base != "real":  # gguf-py needs seconds for its tokens
        compare_with_gguf_py(reading.file, folder)
    if operator.verdict == "accept" and files is not None and reading.file is not None:
        assert_as_drafted(reading.file, files.values())
    if reading.model is not None and reading.file is not None:
        assert_loaded(reading.model, reading.file)
    return reading


def check_message(message: str, folder: Path, place: str) -> None:
    """An error is one printable line that begins with the file and names the place."""
    assert message.startswith(f"{folder}/"), message
    assert message.isprintable(), repr(message)
    assert len(message) < 1000 + 2 * len(str(folder)), message
    assert place in message, message


def compare_with_gguf_py(file: GGUFFile, folder: Path) -> None:
    """Metadata and tensors are gguf-py's, where it reads the file too."""
    parts = sorted(folder.iterdir())
    try:
        readers = [read_with_gguf_py(part) for part in parts]
        for reader in readers:
            decode_strings(reader)
    except Exception:
        return  # it refuses what we accept: no difference that anyone could see
    assert_same_metadata(file, readers[0])
    assert_same_tensors(file, readers)


def decode_strings(reader: gguf.GGUFReader) -> None:
    """Have gguf-py fail now where it would when a value is asked for."""
    for field in reader.fields.values():
        field.contents()


def assert_as_drafted(file: GGUFFile, drafts: Iterable[Draft]) -> None:
    """Every tensor has the shape, type and bytes that were written."""
    drafted = {t.name.decode(): t for draft in drafts for t in draft.tensors}
    assert set(file.tensors) == set(drafted)
    for name, tensor in file.tensors.items():
        wanted = drafted[name]
        assert (tensor.shape, int(tensor.qtype)) == (wanted.shape, wanted.qtype), name
        raw = tensor.data.tobytes()
        assert raw == wanted.data if not wanted.zeros else not any(raw[::4096]), name


def assert_loaded(model: ql.Model, file: GGUFFile) -> None:
    """Weights that are loaded as the file has them hold its tensors' bytes."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        model.params, is_leaf=lambda leaf: isinstance(leaf, Block)
    )
    named = {name_of(path): leaf for path, leaf in found}
    for name, tensor in file.tensors.items():
        leaf = named.get(name)
        if isinstance(leaf, Block):
            assert np.asarray(leaf.to_bytes()).tobytes() == tensor.data.tobytes(), name
        elif leaf is not None and tensor.qtype == gguf.GGMLQuantizationType.F32:
            assert np.asarray(leaf).tobytes() == tensor.data.tobytes(), name


def name_of(path: Any) -> str:
    """A path in the pytree of params as the name of a tensor."""
    return jax.tree_util.keystr(path)[1:].replace("[", ".").replace("]", "")
