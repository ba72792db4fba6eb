"""A loaded model is its file: every tensor at its name, bit for bit; and bad files are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import BLOCK_SIZES, dequantize, random_blocks
from gguf_bytes import read_with_gguf_py
from qllama_jax.matmul.cpu import CPUWeight
from qllama_jax.params import DenseBlock
from qllama_jax.quants import Block
from reference import Reference

FORMATS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0"),
)
TinyLlama = Callable[..., Path]
DOWN = "blk.1.ffn_down.weight"


def mixed(name: str) -> str:
    """A format for each matrix, so that four layers hold all of them."""
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    layer, matrix = name.split(".")[1:3] if name.startswith("blk.") else ("0", "ffn_down")
    return FORMATS[7 * int(layer) + matrices.index(matrix)]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in read_with_gguf_py(path).tensors}


def leaves_by_name(params: ql.Params) -> dict[str, Any]:
    """Every weight by its path in the pytree, written as a tensor's name."""
    found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, Block))
    named = {}
    for path, leaf in found:
        name = jax.tree_util.keystr(path)[1:].replace("[", ".").replace("]", "")
        if not name.startswith("rope."):
            named[name] = leaf
    return named


def edited(
    base: Path,
    out: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    drop: str | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a copy of a file with other keys, without a tensor, or with other (float32) tensors.

    A key whose value is None is left out.
    """
    reader = read_with_gguf_py(base)
    changed = dict(keys or {})
    architecture = changed.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(out, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changed.pop(key, field.contents())
        sub_type = field.types[-1] if len(field.types) > 1 else None
        if value is not None:
            writer.add_key_value(key, value, field.types[0], sub_type)
    assert not changed
    new = dict(tensors or {})
    for tensor in reader.tensors:
        if tensor.name in new:
            writer.add_tensor(tensor.name, new.pop(tensor.name))
        elif tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in new.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def patched(base: Path, out: Path, tensor: str, at: int, new: bytes) -> Path:
    """Write a copy of a file with some bytes of a tensor replaced."""
    raw = bytearray(base.read_bytes())
    offset = tensors_of(base)[tensor].data_offset + at
    raw[offset : offset + len(new)] = new
    out.write_bytes(raw)
    return out


def refused(path: Path, **options: Any) -> str:
    """Message with which a file is refused, which begins with the file."""
    with pytest.raises(ql.GGUFError) as caught:
        ql.load(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def place(path: Path, name: str) -> str:
    """How an error names a tensor that is there."""
    return f"tensor {name!r} (data at byte {tensors_of(path)[name].data_offset})"


# Every tensor at its name

FILES = {name: {"qtype": name, "layers": 1, "vocab": 259} for name in FORMATS} | {
    "mixed": {"qtype": mixed, "layers": 4},
    "biases": {"qtype": "Q8_0", "biases": True},
    "rope_freqs": {"qtype": "Q8_0", "rope_freqs": True},
    "tied": {"qtype": "Q8_0", "tied": True},
    "key_length": {"qtype": "Q8_0", "head_dim": 32},
}


@pytest.mark.parametrize("options", FILES.values(), ids=FILES)
def test_paths_of_params_are_the_tensor_names_and_hold_their_bytes(
    tiny_llama: TinyLlama, options: dict[str, Any]
):
    path = tiny_llama(**options)
    leaves, tensors = leaves_by_name(ql.load(path, layout="file").params), tensors_of(path)
    tensors.pop("rope_freqs.weight", None)
    assert set(leaves) == set(tensors)
    for name, tensor in tensors.items():
        leaf = leaves[name]
        assert leaf.shape == tuple(tensor.shape.tolist())[::-1], name
        if isinstance(leaf, Block):
            assert leaf.qtype == tensor.tensor_type, name
            assert leaf.to_bytes().tobytes() == tensor.data.tobytes(), name
        else:
            assert tensor.tensor_type == QType.F32, name
            assert leaf.dtype == np.float32, name
            np.testing.assert_array_equal(np.asarray(leaf), tensor.data, err_msg=name)


def test_four_layers_of_a_mixed_file_hold_all_28_formats(tiny_llama: TinyLlama):
    leaves = leaves_by_name(ql.load(tiny_llama(mixed, layers=4), layout="file").params).values()
    found = {leaf.qtype.name for leaf in leaves if isinstance(leaf, Block)}
    assert found == set(FORMATS) - {"F32"}
    assert len(FORMATS) == 28


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's packing")
@pytest.mark.parametrize("tied", [False, True])
def test_a_cpu_packs_what_is_multiplied_and_leaves_the_rest_as_in_the_file(
    tiny_llama: TinyLlama, tied: bool
):
    formats = {"*": "Q4_K", "blk.0.attn_q.weight": "IQ4_NL", "blk.0.attn_k.weight": "F32"}
    path = tiny_llama(formats, layers=1, vocab=259, tied=tied)
    params, tensors = ql.load(path).params, tensors_of(path)
    (block,) = params.blk
    assert isinstance(block, DenseBlock)
    packed = {"attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    for name in packed | {"attn_q", "attn_k"}:
        leaf = getattr(block, name).weight
        assert isinstance(leaf, CPUWeight) == (name in packed), name
        values = leaf if isinstance(leaf, jax.Array) else leaf.dequantize()
        tensor = tensors[f"blk.0.{name}.weight"]
        wanted = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(np.asarray(values), wanted, err_msg=name)
    # An embedding is looked up; only where it serves as output too is it multiplied.
    assert isinstance(params.token_embd.weight, CPUWeight) == tied
    assert (params.output is None) == tied


def test_an_unknown_layout_is_refused_by_name(tiny_llama: TinyLlama):
    unchecked: Any = inspect.unwrap(ql.load)  # types are checked in tests alone
    with pytest.raises(ValueError, match=r"layout='Auto': expected one of \('auto', 'file'\)"):
        unchecked(tiny_llama("Q8_0"), layout="Auto")


def test_float32_matrices_are_plain_arrays(tiny_llama: TinyLlama):
    params = ql.load(tiny_llama("F32")).params
    assert params.output is not None
    plain = [
        params.token_embd.weight,
        params.output.weight,
        leaves_by_name(params)["blk.1.ffn_up.weight"],
    ]
    assert [type(leaf) for leaf in plain] == [type(jax.numpy.zeros(1))] * 3
    assert [leaf.shape for leaf in plain] == [(384, 256), (384, 256), (512, 256)]


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q8_0"])
def test_vectors_in_other_formats_are_dequantized(tiny_llama: TinyLlama, qtype: str):
    norm, bias = "blk.0.attn_norm.weight", "blk.0.attn_q.bias"
    path = tiny_llama({"*": "Q4_0", norm: qtype, bias: qtype}, biases=True)
    leaves, tensors = leaves_by_name(ql.load(path).params), tensors_of(path)
    for name in (norm, bias):
        wanted = dequantize(tensors[name].data, QType[qtype]).reshape(-1)
        assert leaves[name].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaves[name]), wanted)


def test_an_absent_bias_is_none_and_a_present_one_is_used(tiny_llama: TinyLlama):
    without = ql.load(tiny_llama("Q8_0")).params.blk[0]
    assert isinstance(without, DenseBlock)
    assert [without.attn_q.bias, without.ffn_down.bias] == [None, None]
    model = ql.load(tiny_llama("Q8_0", biases=True))
    hidden = hidden_of(model, model.params)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        layer = getattr(model.params.blk[0], name)
        block = replace(model.params.blk[0], **{name: replace(layer, bias=0 * layer.bias)})
        dropped = replace(model.params, blk=(block, model.params.blk[1]))
        assert np.abs(hidden_of(model, dropped) - hidden).max() > 1e-3, name


def hidden_of(model: ql.Model, params: ql.Params) -> np.ndarray:
    cache = ql.init_cache(model.config, 1, 8)
    tokens = np.asarray([[5, 200, 77, 300]], np.int32)
    hidden, _, _ = jax.jit(ql.hidden_states, static_argnames="config")(
        params, tokens, cache, config=model.config
    )
    return np.asarray(hidden)


def test_rope_freqs_divide_the_frequencies(tiny_llama: TinyLlama):
    plain = ql.load(tiny_llama("F32")).params.rope
    scaled = ql.load(tiny_llama("F32", rope_freqs=True)).params.rope
    factors = np.geomspace(1, 8, 32, dtype=np.float32)
    ratio = np.asarray(plain.coarse, np.float64) / np.asarray(scaled.coarse, np.float64)
    np.testing.assert_allclose(ratio, factors, rtol=1e-4)  # a coarse step is 2^-32 turns


def test_a_tied_embedding_is_stored_once(tiny_llama: TinyLlama):
    tied = ql.load(tiny_llama("Q8_0", tied=True)).params
    untied = ql.load(tiny_llama("Q8_0")).params
    assert tied.output is None
    assert nbytes(untied) - nbytes(tied) == 384 * 256 // 32 * 34
    assert len(jax.tree.leaves(untied)) - len(jax.tree.leaves(tied)) == 2


def nbytes(params: ql.Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("qtype", FORMATS)
def test_leaves_are_as_large_as_the_files_tensors_and_256_bytes_of_rope(
    tiny_llama: TinyLlama, qtype: str
):
    path = tiny_llama(qtype=qtype, layers=1, vocab=259)
    in_file = sum(tensor.n_bytes for tensor in tensors_of(path).values())
    rope = 2 * 4 * 32 + 4  # 32 pairs, and the magnitude
    assert nbytes(ql.load(path, layout="file").params) == in_file + rope


def test_leaves_of_smollm2_are_at_most_2_percent_larger_than_its_tensors(smollm2_path: Path):
    in_file = sum(tensor.n_bytes for tensor in tensors_of(smollm2_path).values())
    assert in_file > 90e6
    assert nbytes(ql.load(smollm2_path).params) <= 1.02 * in_file


def test_progress_rises_to_all_bytes_in_one_step_a_tensor(tiny_llama: TinyLlama):
    path = tiny_llama(mixed)
    calls: list[tuple[int, int]] = []
    ql.load(path, progress=lambda done, total: calls.append((done, total)))
    sizes = [int(tensor.n_bytes) for tensor in tensors_of(path).values()]
    done = [d for d, _ in calls]
    assert {total for _, total in calls} == {sum(sizes)}
    assert done[-1] == sum(sizes)
    assert sorted(np.diff([0, *done])) == sorted(sizes)


def test_a_model_shows_sizes_and_not_weights(tiny_llama: TinyLlama):
    shown = repr(ql.load(tiny_llama("Q8_0", tied=True)))
    assert "MB of weights" in shown
    assert len(shown) < 500


def test_a_file_without_a_vocabulary_has_no_tokenizer(tiny_llama: TinyLlama, tmp_path: Path):
    base = tiny_llama("Q8_0", tokenizer=None, vocab=100)
    for name in ("none", "no_vocab", None):
        keys = {"tokenizer.ggml.model": name}
        model = ql.load(edited(base, tmp_path / f"{name}.gguf", keys=keys))
        assert not model.has_tokenizer, name
        assert model.config.vocab_size == 100
        with pytest.raises(ql.GGUFError, match=r"tokenizer\.ggml\.model"):
            _ = model.tokenizer
    assert ql.load(tiny_llama("Q8_0")).has_tokenizer


# Refusals

NEEDED = (
    "token_embd.weight",
    "output_norm.weight",
    *(f"blk.1.{name}.weight" for name in ("attn_norm", "attn_q", "attn_k", "attn_v")),
    *(f"blk.1.{name}.weight" for name in ("attn_output", "ffn_norm", "ffn_gate", "ffn_up")),
    DOWN,
)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_tensor_is_refused(tiny_llama: TinyLlama, tmp_path: Path, name: str):
    path = edited(tiny_llama("F32"), tmp_path / "a.gguf", drop=name)
    assert refused(path) == f"tensor {name!r} is missing"


@pytest.mark.parametrize("name", ["output.bias", "blk.2.attn_q.weight", "blk.0.attn_norm.bias"])
def test_a_leftover_tensor_is_refused(tiny_llama: TinyLlama, tmp_path: Path, name: str):
    new = {name: np.zeros((3, 32), np.float32)}
    path = edited(tiny_llama("F32"), tmp_path / "a.gguf", tensors=new)
    message = refused(path)
    assert message.startswith("1 tensors that no part")
    assert message.endswith(repr(name))


SHAPES = {
    "blk.1.attn_q.weight": ((256, 255), "[255, 256]", "[256, 256]"),
    "blk.1.attn_k.weight": ((256, 256), "[256, 256]", "[256, 128]"),
    "blk.1.ffn_gate.weight": ((256, 512), "[512, 256]", "[256, 512]"),  # turned round
    DOWN: ((256, 1, 512), "[512, 1, 256]", "[512, 256]"),
    "blk.1.attn_norm.weight": ((255,), "[255]", "[256]"),
    "output_norm.weight": ((1, 256), "[256, 1]", "[256]"),
    "output.weight": ((383, 256), "[256, 383]", "[256, 384]"),
    "blk.1.attn_v.bias": ((256,), "[256]", "[128]"),
    "rope_freqs.weight": ((64,), "[64]", "[32]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrongly_shaped_tensor_is_refused(tiny_llama: TinyLlama, tmp_path: Path, name: str):
    shape, found, wanted = SHAPES[name]
    new = {name: np.ones(shape, np.float32)}
    path = edited(tiny_llama("F32"), tmp_path / "a.gguf", tensors=new)
    assert refused(path) == f"{place(path, name)}: shape {found}, wanted {wanted}"


def test_rows_of_the_embedding_that_are_not_the_vocabulary_are_refused(
    tiny_llama: TinyLlama, tmp_path: Path
):
    new = {"token_embd.weight": np.zeros((383, 256), np.float32)}
    path = edited(tiny_llama("F32"), tmp_path / "a.gguf", tensors=new)
    message = refused(path)
    assert "tokenizer.ggml.tokens" in message
    assert "384 tokens, wanted 383, the rows of the token embedding" in message


# Byte offset in a block and number type of every scale, and of weights that are plain numbers.
SCALES = [
    *(("F32", 0, "<f4"), ("F16", 0, "<f2"), ("BF16", 0, "bf16")),
    *(("Q4_0", 0, "<f2"), ("Q4_1", 0, "<f2"), ("Q4_1", 2, "<f2"), ("Q5_0", 0, "<f2")),
    *(("Q5_1", 0, "<f2"), ("Q5_1", 2, "<f2"), ("Q8_0", 0, "<f2"), ("Q2_K", 80, "<f2")),
    *(("Q2_K", 82, "<f2"), ("Q3_K", 108, "<f2"), ("Q4_K", 0, "<f2"), ("Q4_K", 2, "<f2")),
    *(("Q5_K", 0, "<f2"), ("Q5_K", 2, "<f2"), ("Q6_K", 208, "<f2"), ("Q8_K", 0, "<f4")),
    *((qtype, 0, "<f2") for qtype in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")),
    *(("IQ4_NL", 0, "<f2"), ("IQ4_XS", 0, "<f2"), ("TQ1_0", 52, "<f2"), ("TQ2_0", 64, "<f2")),
    *(("Q1_0", 0, "<f2"), ("MXFP4", 0, "e8m0"), ("IQ1_M", 48, "nibbles")),
]


def number(value: float, kind: str) -> bytes:
    if kind == "bf16":
        return np.asarray(value, "<f4").tobytes()[2:]
    if kind == "e8m0":  # has no infinity
        return b"\xff"
    if kind == "nibbles":  # of four words, the top ones
        bits = int(np.asarray(value, "<f2").view("<u2"))
        return np.asarray([(bits >> 4 * i & 15) << 12 for i in range(4)], "<u2").tobytes()
    return np.asarray(value, kind).tobytes()


@pytest.mark.parametrize(("qtype", "at", "kind"), SCALES, ids=lambda value: str(value))
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf], ids=str)
def test_a_weight_or_scale_that_is_not_finite_is_refused_unless_checks_are_off(
    tiny_llama: TinyLlama, tmp_path: Path, qtype: str, at: int, kind: str, value: float
):
    base, name = tiny_llama(qtype=qtype, layers=1, vocab=259), "blk.0.ffn_down.weight"
    values, size = BLOCK_SIZES[QType[qtype]]
    block = 256 * 512 // values - 1  # the last
    path = patched(base, tmp_path / "a.gguf", name, block * size + at, number(value, kind))
    message = refused(path)
    assert message.startswith(f"{place(path, name)}: 1 of its ")
    assert f"[255, {512 // values - 1}]" in message
    assert qtype in message

    leaf = leaves_by_name(ql.load(path, check_tensors=False, layout="file").params)[name]
    raw = leaf.to_bytes() if isinstance(leaf, Block) else np.asarray(leaf)
    assert raw.tobytes() == tensors_of(path)[name].data.tobytes()


@pytest.mark.parametrize(
    "name", ["output_norm.weight", "blk.1.ffn_norm.weight", "blk.0.attn_q.bias"]
)
def test_a_vector_that_is_not_finite_is_refused_unless_checks_are_off(
    tiny_llama: TinyLlama, tmp_path: Path, name: str
):
    base = tiny_llama("Q8_0", biases=True)
    path = patched(base, tmp_path / "a.gguf", name, 4 * 17, number(np.nan, "<f4"))
    assert refused(path).startswith(f"{place(path, name)}: 1 of its 256 F32 ")
    leaf = np.asarray(
        leaves_by_name(ql.load(path, check_tensors=False, layout="file").params)[name]
    )
    assert np.flatnonzero(np.isnan(leaf)).tolist() == [17]


@pytest.mark.parametrize("qtype", FORMATS)
def test_any_finite_bits_are_accepted(tiny_llama: TinyLlama, tmp_path: Path, qtype: str):
    raw = random_blocks(QType[qtype], (256, 512), np.random.default_rng(0))
    name = "blk.0.ffn_down.weight"
    base = tiny_llama(qtype=qtype, layers=1, vocab=259)
    path = patched(base, tmp_path / "a.gguf", name, 0, raw.tobytes())
    leaf = leaves_by_name(ql.load(path, layout="file").params)[name]
    found = leaf.to_bytes() if isinstance(leaf, Block) else np.asarray(leaf)
    assert found.tobytes() == raw.tobytes()


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_frequency_factor_of_0_or_below_is_refused(
    tiny_llama: TinyLlama, tmp_path: Path, value: float
):
    base = tiny_llama("F32", rope_freqs=True)
    raw = number(value, "<f4")
    path = patched(base, tmp_path / "a.gguf", "rope_freqs.weight", 4 * 31, raw)
    for check_tensors in (True, False):
        message = refused(path, check_tensors=check_tensors)
        assert message.startswith(f"tensor 'rope_freqs.weight': found {value}, wanted")


def test_an_unsupported_type_is_refused_with_the_supported_ones(
    tiny_llama: TinyLlama, tmp_path: Path
):
    down = {DOWN: np.zeros((256, 512), np.int32)}
    path = edited(tiny_llama("Q8_0"), tmp_path / "a.gguf", tensors=down)
    message = refused(path)
    assert message.startswith(f"{place(path, DOWN)}: type I32 is not supported; supported are ")
    assert set(message.split("supported are ")[1].split(", ")) == set(FORMATS)


@pytest.mark.parametrize(("qtype", "field"), [("IQ1_M", "scales"), ("MXFP4", "e"), ("IQ4_XS", "d")])
def test_scales_that_are_no_float_field_are_looked_at_too(
    tiny_llama: TinyLlama, qtype: str, field: str
):
    path = tiny_llama({"*": "Q8_0", DOWN: qtype})
    ql.load(path)
    raw = bytearray(path.read_bytes())
    tensor = ql.read_gguf(path).tensors[DOWN]
    size, nbytes = BLOCK_SIZES[tensor.qtype]
    block = raw[tensor.offset + 5 * nbytes : tensor.offset + 6 * nbytes]
    if qtype == "IQ1_M":
        for at, nibble in zip((49, 51, 53, 55), (0, 0, 0xC, 0x7), strict=True):
            block[at] = (block[at] & 0x0F) | nibble << 4
    elif qtype == "MXFP4":
        block[0] = 255
    else:
        block[:2] = np.array([np.nan], "<f2").tobytes()
    raw[tensor.offset + 5 * nbytes : tensor.offset + 6 * nbytes] = block
    other = path.with_name(f"{qtype}.gguf")
    other.write_bytes(raw)
    row, column = divmod(5, 512 // size)
    assert f"1 of its {256 * 512 // size} {qtype} field {field!r} are NaN or infinite" in (
        message := refused(other)
    )
    assert f"the first at index [{row}, {column}]" in message
    ql.load(other, check_tensors=False)


@pytest.mark.parametrize("kind", ["long", "short"])
def test_longrope_without_its_factors_is_refused(tiny_llama: TinyLlama, tmp_path: Path, kind: str):
    keys = {"llama.rope.scaling.type": "longrope"}
    name = f"rope_factors_{kind}.weight"
    whole = tiny_llama(layers=1, longrope=True, metadata=keys)
    assert refused(edited(whole, tmp_path / "a.gguf", drop=name)) == (f"tensor {name!r} is missing")


@pytest.mark.parametrize(
    ("kind", "same"),
    [("yarn", 96), ("longrope", 95)],
    ids=["yarn: the model's own context", "longrope: the long factors"],
)
def test_an_original_context_of_0_means_what_it_means_to_llama_cpp(
    tiny_llama: TinyLlama, kind: str, same: int
):
    def path(original: int) -> Path:
        keys = {"type": kind, "factor": 4.0, "original_context_length": original}
        return tiny_llama(
            layers=1,
            longrope=kind == "longrope",
            context_length=96,
            metadata={f"llama.rope.scaling.{key}": value for key, value in keys.items()},
        )

    model = ql.load(path(0))
    jax.tree.map(np.testing.assert_array_equal, model.params.rope, ql.load(path(same)).params.rope)
    tokens = list(range(5, 45))
    logits, _ = ql.forward(
        model.params,
        jnp.asarray([tokens], jnp.int32),
        ql.init_cache(model.config, 1, 40),
        config=model.config,
    )
    wanted = Reference(path(0)).logits(tokens)
    np.testing.assert_allclose(logits[0], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("template", [5, b"{{ messages }}"])
def test_a_template_that_is_no_text_is_refused_at_load(tiny_llama: TinyLlama, template: Any):
    unchecked: Any = inspect.unwrap(ql.load)
    with pytest.raises(TypeError, match=r"chat_template: expected .* a str, found (int|bytes)"):
        unchecked(tiny_llama("Q8_0"), chat_template=template)


def test_longrope_factors_of_a_file_without_longrope_are_refused(tiny_llama: TinyLlama):
    message = refused(tiny_llama(layers=1, longrope=True))
    assert "2 tensors that no part of the architecture 'llama' uses: 'rope_factors_" in message


EXPERTS: dict[str, Any] = {"layers": 1, "experts": 4, "experts_used": 2}


def test_an_expert_that_is_missing_is_named(tiny_llama: TinyLlama, tmp_path: Path):
    name = "blk.0.ffn_up.2.weight"
    path = edited(tiny_llama("Q8_0", **EXPERTS, merged=False), tmp_path / "a.gguf", drop=name)
    assert refused(path) == f"tensor {name!r} is missing"
    name = "blk.0.ffn_up_exps.weight"
    path = edited(tiny_llama("Q8_0", **EXPERTS), tmp_path / "b.gguf", drop=name)
    assert refused(path) == f"tensor {name!r} is missing, and so is 'blk.0.ffn_up.0.weight'"


def test_one_expert_too_many_is_refused(tiny_llama: TinyLlama, tmp_path: Path):
    keys = {"llama.expert_count": 3}
    path = edited(tiny_llama("Q8_0", **EXPERTS), tmp_path / "a.gguf", keys=keys)
    router = "blk.0.ffn_gate_inp.weight"
    assert refused(path).startswith(f"{place(path, router)}: shape [256, 4], wanted")
    path = edited(
        tiny_llama("Q8_0", **EXPERTS, merged=False),
        tmp_path / "b.gguf",
        keys=keys,
        tensors={"blk.0.ffn_gate_inp.weight": np.zeros((3, 256), np.float32)},
    )
    assert "3 tensors that no part of the architecture 'llama' uses: 'blk.0.ffn_gate.3" in refused(
        path
    )


def test_experts_in_a_file_that_says_it_has_none_are_refused(tiny_llama: TinyLlama, tmp_path: Path):
    keys = {"llama.expert_count": None, "llama.expert_used_count": None}
    path = edited(tiny_llama("Q8_0", **EXPERTS), tmp_path / "a.gguf", keys=keys)
    assert refused(path) == "tensor 'blk.0.ffn_gate.weight' is missing"


def test_experts_without_a_number_used_are_refused(tiny_llama: TinyLlama, tmp_path: Path):
    keys = {"llama.expert_used_count": None}
    path = edited(tiny_llama("Q8_0", **EXPERTS), tmp_path / "a.gguf", keys=keys)
    assert "llama.expert_used_count" in refused(path)


def test_a_fused_projection_of_another_size_is_refused(tiny_llama: TinyLlama, tmp_path: Path):
    keys = {"llama.attention.head_count_kv": 4}
    path = edited(tiny_llama("Q8_0", layers=1, fused_qkv=True), tmp_path / "a.gguf", keys=keys)
    fused = place(path, "blk.0.attn_qkv.weight")
    assert refused(path) == f"{fused}: shape [256, 512], wanted [256, 768]"


def test_another_architecture_is_refused(tiny_llama: TinyLlama, tmp_path: Path):
    keys = {"general.architecture": "qwen2"}
    message = refused(edited(tiny_llama("Q8_0"), tmp_path / "a.gguf", keys=keys))
    assert "key 'general.architecture'" in message
    assert "found 'qwen2', wanted 'llama'" in message
