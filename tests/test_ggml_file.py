"""Files from before GGUF give the model, the tokens and the bytes that they hold."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from blocks import dequantize
from legacy_files import (
    EMBED,
    FFN,
    HEADS,
    KINDS,
    KV_HEADS,
    LAYERS,
    TYPES,
    VOCAB,
    legacy_file,
    write_equivalent,
    write_source,
)
from qllama_jax.cli import main
from qllama_jax.errors import GGUFError
from qllama_jax.model_file import read_model_file
from reference import Reference

CASES = [(kind, name) for kind, types in TYPES.items() for name in types]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_case = pytest.mark.parametrize(("kind", "name"), CASES)

TEXTS = (
    "",
    "hello world",
    " the  thing,\nand another - 'tis so!",
    "Ünïcödé → \u2047 日本語 🦙",
    "\x00\x01\t\x7f ~",
    "<s> </s> <unk> <0x41> [INST] \u2581",
    "a" * 50,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the files of this module hold."""
    return write_source(tmp_path_factory.mktemp("source") / "m.gguf")


@pytest.fixture
def write(tmp_path: Path, source: Path) -> Callable[..., Path]:
    """Function: kind and type -> path."""

    def write(kind: str, name: str) -> Path:
        path = tmp_path / "m.bin"
        path.write_bytes(legacy_file(source, kind, name).encode())
        return path

    return write


@each_case
def test_logits_are_the_float64_references_on_the_same_weights(
    write: Callable[..., Path], source: Path, tmp_path: Path, kind: str, name: str
):
    model = ql.load(write(kind, name))
    reference = Reference(write_equivalent(tmp_path / "same.gguf", source, kind, name))
    tokens = np.random.default_rng(3).integers(0, VOCAB, 24)
    cache = ql.init_cache(model.config, 1, 32)
    inputs = jnp.asarray(tokens[None], jnp.int32)
    logits, _ = ql.forward(model.params, inputs, cache, config=model.config)
    wanted = reference.logits(tokens)
    found = np.asarray(logits[0], np.float64)
    errors = np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)
    assert errors.max() <= 1e-5


@each_case
def test_tensors_have_the_bytes_and_types_of_the_file(
    write: Callable[..., Path], source: Path, kind: str, name: str
):
    written = legacy_file(source, kind, name)
    file = read_model_file(write(kind, name))
    assert file.kind == ("GGML" if kind == "GGML" else kind.replace(" v", " version "))
    assert len(file.tensors) == len(written.rows) == 3 + 9 * LAYERS
    for tensor, row in zip(file.tensors.values(), written.rows, strict=True):
        assert tensor.shape == row.shape
        assert tensor.data.tobytes() == row.data
        assert tensor.qtype == TYPES[kind]["F32" if len(row.shape) == 1 else name]
        if kind.startswith("GGJT"):
            assert tensor.offset % 32 == 0


@each_kind
def test_what_the_file_does_not_say_is_candles_and_the_rest_follows_from_it(
    write: Callable[..., Path], kind: str
):
    assert ql.load(write(kind, "Q4_0")).config == ql.ModelConfig(
        num_layers=LAYERS,
        embed_dim=EMBED,
        ffn_dim=FFN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=EMBED // HEADS,
        vocab_size=VOCAB,
        context_length=4096,
        rope_theta=10_000.0,
        rope_dim=EMBED // HEADS,
        norm_eps=1e-5,
        num_experts=0,
        num_experts_per_token=0,
        rope_scaling=None,
    )


@each_kind
def test_the_vocabulary_is_that_of_the_gguf_file(
    write: Callable[..., Path], source: Path, kind: str
):
    path = write(kind, "Q8_0")
    old, new = read_model_file(path).metadata, ql.read_gguf(source).metadata
    for key in ("tokens", "scores", "token_type"):
        assert list(old[f"tokenizer.ggml.{key}"]) == list(new[f"tokenizer.ggml.{key}"]), key
    ours, wanted = ql.Tokenizer.from_gguf(path), ql.Tokenizer.from_gguf(source)
    for text in TEXTS:
        ids = wanted.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == wanted.decode(ids)
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def test_scores_are_the_files_own_where_it_has_them_and_else_those_of_llama(source: Path):
    tokens = [(b"a", -3.5), *legacy_file(source, "GGMF v1", "Q4_0").tokens[1:]]
    tokens[300] = (b"zz", 7.25)
    found = {}
    for kind in KINDS:
        file = replace(legacy_file(source, kind, "Q4_0"), tokens=tokens)
        path = source.with_name("scores.bin")
        path.write_bytes(file.encode())
        found[kind] = read_model_file(path).metadata["tokenizer.ggml.scores"]
    assert found.pop("GGML").tolist() == [0.0] * 259 + [float(259 - i) for i in range(259, VOCAB)]
    for scores in found.values():
        assert (scores[0], scores[300]) == (-3.5, 7.25)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, name in CASES if kind == "GGJT v3" and name not in ("BF16", "Q8_K")]
    + [("GGJT v2", "Q5_0"), ("GGJT v2", "Q5_1"), ("GGJT v1", "F16"), ("GGMF v1", "F32")],
)
def test_candles_own_reader_finds_the_same(
    write: Callable[..., Path], source: Path, kind: str, name: str
):
    utils = pytest.importorskip("candle.utils")
    path = write(kind, name)
    tensors, sizes, vocabulary = utils.load_ggml(str(path))
    written = legacy_file(source, kind, name)
    file = read_model_file(path)
    assert {key: sizes[key] for key in ("n_vocab", "n_embd", "n_head", "n_layer", "n_rot")} == {
        key: written.sizes[key] for key in ("n_vocab", "n_embd", "n_head", "n_layer", "n_rot")
    }
    assert len(vocabulary) == VOCAB
    assert tensors.keys() == {row.name.decode() for row in written.rows}
    for row, tensor in zip(written.rows, file.tensors.values(), strict=True):
        theirs = np.asarray(tensors[row.name.decode()].dequantize().values(), np.float32)
        ours = dequantize(tensor.data, tensor.qtype)
        np.testing.assert_array_equal(theirs.reshape(ours.shape), ours)


@each_kind
def test_the_command_line_tells_kind_and_types_and_generates(
    write: Callable[..., Path], kind: str, capsys: pytest.CaptureFixture[str]
):
    path = str(write(kind, "Q4_0"))
    assert main(["info", path]) == 0
    out = capsys.readouterr().out
    qtype, shown = TYPES[kind]["Q4_0"], kind.replace(" v", " version ")
    assert re.search(rf"^file +'m\.bin', {shown}$", out, re.MULTILINE)
    assert re.search(rf"^ +{re.escape(qtype.name)} +16 tensors", out, re.MULTILINE)
    assert ("scores by id" in out) == (kind == "GGML")
    assert main(["generate", path, "hello", "-n", "3", "--no-compilation-cache"]) == 0


def test_grouped_queries_are_inferred_and_a_given_number_must_agree(
    tmp_path: Path, write: Callable[..., Path], source: Path
):
    path = write("GGJT v3", "Q8_0")
    assert ql.load(path, gqa=2).config.num_kv_heads == KV_HEADS
    for gqa in (0, 1, 4, -2):
        with pytest.raises(GGUFError, match=rf"128 rows are 2 .* so 2 of 4 .* but gqa={gqa}$"):
            ql.load(path, gqa=gqa)
    with pytest.raises(ValueError, match=r"gqa=2 .* GGUF file says it itself") as caught:
        ql.load(source, gqa=2)
    assert not isinstance(caught.value, GGUFError)
    unchecked: Any = inspect.unwrap(ql.read_model_file)  # types are checked in tests alone
    for no_integer in ("2", 2.0, True):
        for file in (path, source):
            with pytest.raises(TypeError, match=f"gqa={no_integer!r}: expected an integer"):
                unchecked(file, gqa=no_integer)
    for kv_heads in (1, 4):
        gguf_path = write_source(tmp_path / "s.gguf", kv_heads=kv_heads, layers=1)
        path.write_bytes(legacy_file(gguf_path, "GGJT v1", "Q4_2").encode())
        assert ql.load(path, gqa=4 // kv_heads).config.num_kv_heads == kv_heads


def test_a_file_that_changed_after_it_was_opened_is_not_read(write: Callable[..., Path]):
    path = write("GGJT v1", "Q4_0")
    tensor = read_model_file(path).tensors["token_embd.weight"]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(GGUFError, match="the file has changed since it was opened: size"):
        _ = tensor.data
