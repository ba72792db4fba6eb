"""What `load(mesh=)` reads of a file, what it refuses, and the memory that it says it takes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qllama_jax as ql
from legacy_files import TYPES, legacy_file
from load_files import edited
from meshes import KINDS, SMALL, TOKENS, WIDE, assert_close, device_bytes, logits_of, make_mesh
from qllama_jax import memory
from qllama_jax.params import MoEBlock
from qllama_jax.shard_plan import plan_shards
from qllama_jax.shard_reader import read_part
from qllama_jax.sharding import Partitioning
from reference import Reference


@pytest.mark.parametrize("stem", ["ffn_down_exps", "attn_q", "ffn_gate_exps"])
def test_a_part_of_a_tensor_is_that_part_of_the_whole(tiny_llama, stem):
    path = tiny_llama("Q4_0", **SMALL, experts=3, experts_used=2)
    tensor = ql.read_gguf(path).tensors[f"blk.0.{stem}.weight"]
    whole = tensor.data.reshape(*tensor.shape[:0:-1], tensor.shape[0] // 32, 18)
    rng = np.random.default_rng(0)
    for _ in range(40):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in whole.shape[:-1]]
        index = tuple(slice(int(a), int(b)) for a, b in ends)
        part = read_part(tensor, tensor.shape[::-1], index)
        assert (part == whole[index].reshape(part.shape)).all()


@pytest.mark.parametrize("kind", ["GGML", "GGJT v1", "GGJT v2"])
def test_blocks_of_files_from_before_gguf_lie_on_a_mesh_as_on_a_device(tiny_llama, tmp_path, kind):
    options = {"layers": 1, "embed": 256, "ffn": 768, "heads": 8, "kv_heads": 8, "vocab": 384}
    source = tiny_llama("F32", **options)
    for name in TYPES[kind]:
        path = tmp_path / f"{name}.bin"
        path.write_bytes(legacy_file(source, kind, name).encode())
        one = ql.load(path, layout="file").params.blk[0]
        cut = ql.load(path, mesh=make_mesh((2, 4))).params.blk[0]
        for stem in ("attn_k", "ffn_down"):
            whole, parts = (getattr(block, stem).weight for block in (one, cut))
            assert parts.axes == ((("model",), ()) if stem == "attn_k" else ((), ("model",)))
            for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
                assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8), (4, 2)])
def test_bytes_of_a_device_told_from_the_tensor_table_are_those_that_it_holds(
    tiny_llama, kind, shape
):
    path = tiny_llama(**KINDS[kind] | {"fused_qkv": True})
    mesh = make_mesh(shape)
    model = ql.load(path, mesh=mesh)
    held = device_bytes(model.params)
    own = device_bytes(model.params.rope)
    plan = plan_shards(ql.read_gguf(path), model.config, Partitioning.of(mesh), "refuse")
    assert {held[device] - own[device] for device in held} == {plan.device_bytes}


def test_each_device_has_to_have_room_for_its_own_part(tiny_llama, monkeypatch):
    path = tiny_llama(**KINDS["dense"])
    free = 8 * 10**6
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    mesh = make_mesh((1, 8))
    with pytest.raises(ql.OutOfMemoryError) as info:
        ql.load(path, mesh=mesh)
    assert info.value.free == free // 8  # CPU devices share one memory
    free = 8 * (info.value.weights + info.value.cache + info.value.workspace)
    model = ql.load(path, mesh=mesh)
    assert info.value.cache == ql.init_cache(model.config, 1, 128, mesh=mesh).k[0].nbytes * 2 // 8
    positions = free // (2 * 8 * 32 * 4)  # that all devices together have room for
    assert 0 < positions < 2**20
    with pytest.raises(ql.OutOfMemoryError, match=f"longest max_length that fits is {positions}"):
        ql.init_cache(model.config, 1, positions + 8, mesh=mesh)


class TestWhatDoesNotDivide:
    def test_the_error_names_tensor_axis_sizes_and_the_largest_mesh(self, tiny_llama):
        path = tiny_llama("Q4_K", **WIDE | {"layers": 1})
        with pytest.raises(ValueError, match="is not divided") as info:
            ql.load(path, mesh=make_mesh((1, 8)))
        message = str(info.value)
        assert "'blk.0.attn_output.weight'" in message
        assert "'heads', 1024 inputs in 4 blocks of 256" in message
        assert "'model' of 8" in message
        assert "{'data': 1, 'model': 4}" in message
        ql.load(path, mesh=make_mesh((2, 4)))

    def test_it_is_replicated_where_that_is_asked_for(self, tiny_llama):
        path = tiny_llama("Q4_K", **WIDE | {"layers": 1})
        mesh = make_mesh((1, 8))
        with pytest.warns(UserWarning, match=r"attn_output.*4 blocks of 256.*and so are 1 others"):
            model = ql.load(path, mesh=mesh, uneven="replicate")
        assert model.params.blk[0].attn_output.weight.axes == ((), ())
        assert model.params.blk[0].attn_q.weight.axes == (("model",), ())
        tokens = TOKENS[:2, :5]
        logits, _ = logits_of(model, tokens, mesh)
        reference = Reference(path)
        assert_close(logits, np.stack([reference.logits(row) for row in tokens]))

    def test_experts_of_several_formats_are_cut_within(self, tiny_llama):
        formats = {"blk.0.ffn_up.1.weight": "Q5_0", "*": "Q8_0"}
        path = tiny_llama(formats, **SMALL, experts=4, experts_used=2, merged=False)
        mesh = make_mesh((2, 4))
        with pytest.raises(ValueError, match="experts that differ in format"):
            ql.load(path, mesh=mesh, rules={"experts": "model", "ffn": None})
        model = ql.load(path, mesh=mesh)
        logits, _ = logits_of(model, TOKENS[:2], mesh)
        reference = Reference(path)
        assert_close(logits, np.stack([reference.logits(row) for row in TOKENS[:2]]))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"rules": {"head": "model"}}, "no logical axis 'head'"),
            ({"rules": {"heads": "tp"}}, "'heads' goes over 'tp'"),
            ({"rules": {"batch": None}}, "mesh axis 'data' of 2 devices: no rule names it"),
        ],
    )
    def test_a_rule_for_what_is_not_there_is_refused(self, tiny_llama, options, words):
        with pytest.raises(ValueError, match=re.escape(words)):
            ql.load(tiny_llama(**KINDS["dense"]), mesh=make_mesh((2, 4)), **options)


def test_an_unknown_way_with_what_is_uneven_is_refused_by_name(tiny_llama):
    unchecked: Any = inspect.unwrap(ql.load)  # types are checked in tests alone
    with pytest.raises(ValueError, match=r"uneven='pad': expected one of \('refuse', 'replicate'"):
        unchecked(tiny_llama(**KINDS["dense"]), mesh=make_mesh((2, 4)), uneven="pad")


def test_a_number_that_is_not_finite_is_refused_in_the_part_where_it_is(tiny_llama, tmp_path):
    path = tiny_llama("Q8_0", **SMALL)
    tensor = ql.read_gguf(path).tensors["blk.0.ffn_down.weight"]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(Path(path).read_bytes())
    with damaged.open("r+b") as file:
        # Row 5, block 6 of 8: the last part but one.
        file.seek(tensor.offset + (5 * 8 + 6) * 34)
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(ql.GGUFError, match=r"ffn_down.*index \[5, 6\]"):
        ql.load(damaged, mesh=make_mesh((1, 8)))


def test_a_router_of_one_expert_written_as_a_vector_is_taken_on_a_mesh_too(tiny_llama, tmp_path):
    path = tiny_llama("Q4_0", **SMALL, experts=1, experts_used=1)
    name = "blk.0.ffn_gate_inp.weight"
    flat = edited(path, tmp_path / "a.gguf", tensors={name: np.ones(SMALL["embed"], np.float32)})
    block = ql.load(flat, mesh=make_mesh((1, 8))).params.blk[0]
    assert isinstance(block, MoEBlock)
    assert block.ffn_gate_inp.weight.shape == (1, SMALL["embed"])


@pytest.mark.parametrize(
    ("name", "size"),
    [("blk.0.ffn_gate.0.weight", 64), ("blk.0.attn_q.weight", 64), ("blk.0.ffn_up.weight", 96)],
)
def test_a_tensor_of_another_rank_is_refused_on_a_mesh_as_on_a_device(
    tiny_llama, tmp_path, name, size
):
    path = tiny_llama("Q4_0", **SMALL)
    bad = edited(path, tmp_path / "a.gguf", tensors={name: np.ones(size, np.float32)})
    messages = []
    for mesh in (None, make_mesh((1, 8))):
        with pytest.raises(ql.GGUFError) as caught:
            ql.load(bad, mesh=mesh)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert name in messages[0]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("qtype", ["Q4_0", lambda name: "Q8_0" if ".1." in name else "Q4_0"])
def test_progress_on_a_mesh_ends_with_all_bytes(tiny_llama, merged, qtype):
    path = tiny_llama(qtype, **SMALL, experts=2, experts_used=1, merged=merged)
    seen = []
    ql.load(path, mesh=make_mesh((1, 8)), progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in ql.read_gguf(path).tensors.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("keywords", "error", "says"),
    [
        ({"mesh": 8}, TypeError, "mesh=8: expected a jax.sharding.Mesh"),
        ({"rules": {"ffn": "model"}}, ValueError, "rules, but no mesh"),
        ({"mesh": (1, 8), "rules": {"ffn": ("model", "model")}}, ValueError, "each once"),
    ],
)
def test_a_mesh_or_a_rule_that_is_none_is_refused_by_name(tiny_llama, keywords, error, says):
    if isinstance(shape := keywords.get("mesh"), tuple):
        keywords = keywords | {"mesh": make_mesh(shape)}
    with pytest.raises(error, match=re.escape(says)):
        inspect.unwrap(ql.load)(tiny_llama("Q4_0", **SMALL), **keywords)
