"""A loaded model is its file: every tensor at its name, bit for bit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import qllama_jax as ql
from blocks import dequantize
from load_files import FORMATS, TinyLlama, edited, leaves_by_name, tensors_of
from qllama_jax.matmul.cpu import CPUWeight
from qllama_jax.params import DenseBlock
from qllama_jax.quants import Block
from reference import Reference


def mixed(name: str) -> str:
    """A format for each matrix, so that four layers hold all of them."""
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    layer, matrix = name.split(".")[1:3] if name.startswith("blk.") else ("0", "ffn_down")
    return FORMATS[7 * int(layer) + matrices.index(matrix)]


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
