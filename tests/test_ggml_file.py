"""Files from before GGUF give the model, the tokens and the bytes that they hold, or an error."""

from __future__ import annotations

import inspect
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from blocks import BLOCK_SIZES, dequantize
from legacy_files import KINDS, NUMBERS, TYPES, LegacyFile, Row, legacy_file, write_equivalent
from qllama_jax.cli import main
from qllama_jax.errors import GGUFError
from qllama_jax.model_file import read_model_file
from reference import Reference
from tiny import write_tiny_llama

LAYERS, EMBED, FFN, HEADS, KV_HEADS, VOCAB = 2, 256, 256, 4, 2, 320
OPTIONS: dict[str, Any] = {
    "layers": LAYERS,
    "embed": EMBED,
    "ffn": FFN,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "vocab": VOCAB,
}
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
    """The model that the files of this module hold, as GGUF with F32 tensors."""
    return write_tiny_llama(tmp_path_factory.mktemp("source") / "m.gguf", "F32", **OPTIONS)


@pytest.fixture
def write(tmp_path: Path, source: Path) -> Callable[..., Path]:
    """Function: kind and type -> path."""

    def write(kind: str, name: str) -> Path:
        path = tmp_path / "m.bin"
        path.write_bytes(legacy_file(source, kind, name).encode())
        return path

    return write


# What is read.


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
        options: dict[str, Any] = OPTIONS | {"kv_heads": kv_heads, "layers": 1}
        gguf_path = write_tiny_llama(tmp_path / "s.gguf", "F32", **options)
        path.write_bytes(legacy_file(gguf_path, "GGJT v1", "Q4_2").encode())
        assert ql.load(path, gqa=4 // kv_heads).config.num_kv_heads == kv_heads


def test_a_file_that_changed_after_it_was_opened_is_not_read(write: Callable[..., Path]):
    path = write("GGJT v1", "Q4_0")
    tensor = read_model_file(path).tensors["token_embd.weight"]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(GGUFError, match="the file has changed since it was opened: size"):
        _ = tensor.data


# What is refused.


def refused(path: Path, **options: Any) -> str:
    """Message with which a file is refused, which begins with the file."""
    with pytest.raises(GGUFError) as caught:
        ql.load(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


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
