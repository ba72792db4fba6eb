"""What cannot be a model is refused at load, with the tensor and the reason."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import BLOCK_SIZES, random_blocks
from load_files import FORMATS, TinyLlama, edited, leaves_by_name, patched, tensors_of
from qllama_jax.quants import Block
from refusals import message_of

DOWN = "blk.1.ffn_down.weight"

refused = functools.partial(message_of, ql.load)


def place(path: Path, name: str) -> str:
    """How an error names a tensor that is there."""
    return f"tensor {name!r} (data at byte {tensors_of(path)[name].data_offset})"


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
