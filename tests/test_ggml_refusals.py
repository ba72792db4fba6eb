"""Damaged files from before GGUF are refused, each by the check for it."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qllama_jax as ql
from blocks import BLOCK_SIZES
from legacy_files import (
    EMBED,
    KINDS,
    NUMBERS,
    TYPES,
    VOCAB,
    LegacyFile,
    Row,
    legacy_file,
    write_source,
)
from qllama_jax.errors import GGUFError
from qllama_jax.model_file import read_model_file
from refusals import message_of

refused = functools.partial(message_of, ql.load)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the files of this module hold."""
    return write_source(tmp_path_factory.mktemp("source") / "m.gguf")


@each_kind
def test_a_file_cut_at_or_before_any_boundary_is_refused_as_truncated(
    tmp_path: Path, source: Path, kind: str
):
    path = tmp_path / "m.bin"
    written = legacy_file(source, kind, "Q4_0")
    written.tokens, written.sizes["n_vocab"] = written.tokens[:20], 20
    whole = written.encode()
    ends = np.cumsum([len(raw) for _, raw in written.pieces()]).tolist()
    assert ends[-1] == len(whole)
    cuts = {end for piece in ends for end in (piece - 1, piece, piece + 1)} - {*range(4)}
    for cut in sorted(cut for cut in cuts if cut < len(whole)):
        path.write_bytes(whole[:cut])
        assert "truncated or corrupt" in refused(path), cut


Damage = Callable[[LegacyFile], Any]


def resized(**sizes: int) -> Damage:
    return lambda file: file.count.update(sizes)


def edited(name: str, /, **changes: Any) -> Damage:
    def edit(file: LegacyFile) -> None:
        at = file.rows.index(file.row(name))
        file.rows[at] = replace(file.rows[at], **changes)

    return edit


def reshaped(name: str, *shape: int) -> Damage:
    """Data as much as the shape says."""

    def edit(file: LegacyFile) -> None:
        row = file.row(name)
        qtype = TYPES[file.kind][next(key for key, n in NUMBERS.items() if n == row.number)]
        block, nbytes = BLOCK_SIZES[qtype]
        data = bytes(int(np.prod(shape)) // block * nbytes)
        edited(name, shape=shape, data=data)(file)

    return edit


def token(i: int, raw: bytes, score: float = 0.0) -> Damage:
    def edit(file: LegacyFile) -> None:
        file.tokens[i] = raw, score

    return edit


def without(name: str) -> Damage:
    return lambda file: file.rows.remove(file.row(name))


def again(file: LegacyFile) -> None:
    file.rows.insert(3, file.row("tok_embeddings.weight"))


def reordered(file: LegacyFile) -> None:
    file.rows.reverse()
    file.rows.append(Row(b"extra.weight", (32,), 0, bytes(128)))


WQ, WK, W1 = (
    f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1")
)
NORM, OUTPUT = "norm.weight", "output.weight"
HUGE = 2**31

#: Name -> damage, and what the refusal says.
DAMAGED: dict[str, tuple[Damage, str]] = {
    "adapter": (lambda file: setattr(file, "magic", b"algg"), r"a LoRA adapter \(ggla\)"),
    "session": (lambda file: setattr(file, "magic", b"nsgg"), r"a saved llama\.cpp session"),
    "version 0": (lambda file: setattr(file, "version", HUGE), f"GGJT version {HUGE} at byte 4"),
    "version 4": (lambda file: setattr(file, "version", 4), "GGJT version 4 at byte 4 .* 1 or 2"),
    "no tokens": (resized(n_vocab=0), r"n_vocab at byte 8 is 0, wanted 3\.\."),
    "tokens 2^31": (resized(n_vocab=HUGE), "n_vocab at byte 8 is 2147483648, wanted"),
    "tokens 2^31-1": (resized(n_vocab=HUGE - 1), "tokens take at least 17179869176 bytes"),
    "embedding 0": (resized(n_embd=0), "n_embd at byte 12 is 0"),
    "embedding 2^31": (resized(n_embd=HUGE), "n_embd at byte 12 is 2147483648"),
    "heads 0": (resized(n_head=0), "n_head at byte 20 is 0"),
    "heads 2^31": (resized(n_head=HUGE), "n_head at byte 20 is 2147483648"),
    "heads 3": (resized(n_head=3), "n_embd is 256, wanted a multiple of the 3 heads"),
    "layers 0": (resized(n_layer=0), "n_layer at byte 24 is 0"),
    "layers 2^31": (resized(n_layer=HUGE), "n_layer at byte 24 is 2147483648"),
    "layers fewer": (resized(n_layer=1), r"'layers\.1\..*no tensor of a Llama with 1 layers"),
    "layers more": (resized(n_layer=3), r"after 21 of 30 tensors, 'layers\.2\..*is missing"),
    "rotated 0": (resized(n_rot=0), r"llama\.rope\.dimension_count' \(header offset 28\): found 0"),
    "rotated too many": (resized(n_rot=66), r"dimension_count' .* found 66, .* in 2\.\.64"),
    "token too long": (token(9, bytes(70_000)), "token 9 at byte .* has 70000 bytes, wanted"),
    "token not UTF-8": (token(290, b"\xff\xfe"), r"token 290 at byte .*xff.* is not UTF-8"),
    "byte after the bytes": (token(290, b"\xff"), r"token 290 at byte .* is not UTF-8"),
    "score": (token(290, b"q", float("nan")), r"scores': found nan at index 290"),
    "no dimensions": (edited(NORM, n_dims=0), "it has 0 dimensions, wanted 1 or 2"),
    "3 dimensions": (edited(WQ, n_dims=3), "it has 3 dimensions"),
    "2^31 dimensions": (edited(WQ, n_dims=HUGE), "it has 2147483648 dimensions"),
    "no name": (edited(WQ, length=0), "the name has 0 bytes"),
    "name of 2^31": (edited(WQ, length=HUGE), "the name has 2147483648 bytes"),
    "unknown name": (edited(WQ, name=b"\x1b[2J\xff.weight"), r"\(?tensor '\\x1b\[2J\\xff\.wei"),
    "twice": (again, r"'tok_embeddings\.weight' .*: it occurs twice; its data is at byte \d+, too"),
    "type 5": (edited(WQ, number=5), r"type 5 \(Q4_3\), wanted one of 0 \(F32\), .*Q4_0 \(GGJT v1"),
    "type K": (edited(WQ, number=12), "type 12, wanted one of"),
    "type 2^31": (edited(WQ, number=HUGE), "type 2147483648, wanted"),
    "dimension 0": (edited(WQ, shape=(256, 0)), r"shape \[256, 0\], wanted dimensions from 1"),
    "dimension 2^31": (edited(WQ, shape=(256, HUGE)), "data of .* ends at byte .* truncated"),
    "both 2^31": (edited(WQ, shape=(HUGE, HUGE)), "data of 2882303761517117440 bytes"),
    "half a block": (edited(WQ, shape=(272, 256)), r"row of 272 values .* Q4_0 \(GGJT v1\)'s 32"),
    "wrong shape": (
        reshaped(WQ, 256, 288),
        r"attn_q\.weight' \(data at byte \d+\): shape \[256, 288\], wanted",
    ),
    "wrong key rows": (reshaped(WK, 256, 96), "96 rows, wanted 64, the dimension of a head, times"),
    "too few key rows": (reshaped(WK, 256, 32), "32 rows, wanted 64"),
    "key heads no divisor": (reshaped(WK, 256, 192), "192 rows, .* a divisor of the 4 heads"),
    "key weights a vector": (reshaped(WK, 256), r"shape \[256\], wanted two dimensions"),
    "ffn weights a vector": (reshaped(W1, 256), r"shape \[256\], wanted two dimensions"),
    "norm a matrix": (reshaped(NORM, 256, 1), r"output_norm\.weight' .*: shape \[256, 1\], want"),
    "other vocabulary": (reshaped(OUTPUT, 256, 352), r"output\.weight' .*: shape \[256, 352\], w"),
    "part": (reshaped("tok_embeddings.weight", 128, VOCAB), "this file is one of 2 parts"),
    "no output": (without(OUTPUT), r"'output\.weight' is missing; it is truncated"),
    "no norm": (without("layers.1.ffn_norm.weight"), r"'layers\.1\.ffn_norm\.weight' is missing"),
    "one byte more": (lambda file: setattr(file, "end", b"\0"), "1 bytes follow the last one"),
    "one tensor more": (reordered, "bytes follow the last one, from byte"),
    "not finite": (
        edited(NORM, data=struct.pack("<f", float("inf")) * EMBED),
        r"output_norm\.weight' \(data at byte \d+\): 256 of its 256 F32 field 'w' are NaN",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_the_check_for_it(tmp_path: Path, source: Path, name: str):
    damage, wanted = DAMAGED[name]
    file = legacy_file(source, "GGJT v1", "Q4_0")
    damage(file)
    path = tmp_path / "m.bin"
    path.write_bytes(file.encode())
    assert re.search(wanted, refused(path))


@each_kind
def test_a_flipped_byte_in_a_header_is_refused_or_leaves_a_whole_file(
    tmp_path: Path, source: Path, kind: str
):
    file = legacy_file(source, kind, "Q8_0")
    whole, at, places = file.encode(), 0, []
    for what, raw in file.pieces():
        if not what.startswith("data of"):
            places += range(at, at + len(raw))
        at += len(raw)
    rng = np.random.default_rng(5)
    path = tmp_path / "m.bin"
    opened = 0
    for place in rng.choice(places, 150, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            tensors = read_model_file(path).tensors
        except GGUFError:
            continue
        opened += 1
        assert sum(tensor.nbytes for tensor in tensors.values()) < len(whole)
    assert 0 < opened < 150


@pytest.mark.parametrize(
    ("kind", "name"), [("GGJT v2", "Q4_2"), ("GGJT v3", "Q4_2"), ("GGMF v1", "Q6_K")]
)
def test_types_that_a_version_does_not_have_are_refused(
    tmp_path: Path, source: Path, kind: str, name: str
):
    file = legacy_file(source, kind, "Q8_0")
    edited(WQ, number=NUMBERS[name])(file)
    path = tmp_path / "m.bin"
    path.write_bytes(file.encode())
    assert f"type {NUMBERS[name]}" in refused(path)


def test_tensors_may_come_in_any_order(tmp_path: Path, source: Path):
    file = legacy_file(source, "GGJT v2", "Q4_1")
    path = tmp_path / "m.bin"
    path.write_bytes(file.encode())
    first = ql.load(path)
    file.rows.reverse()
    path.write_bytes(file.encode())
    second = ql.load(path)
    for a, b in zip(*(_leaves(model) for model in (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)


def _leaves(model: ql.Model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]


def test_scales_that_are_not_finite_are_refused_with_the_name_of_the_format(
    tmp_path: Path, source: Path
):
    file = legacy_file(source, "GGML", "Q8_0")
    row = file.row(W1)
    edited(W1, data=struct.pack("<f", float("nan")) + row.data[4:])(file)
    path = tmp_path / "m.bin"
    path.write_bytes(file.encode())
    wanted = r"ffn_gate\.weight' .*: 1 of its 2048 Q8_0 \(GGJT v2\) field 'd' are NaN or infinite"
    assert re.search(wanted, refused(path))
