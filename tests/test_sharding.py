"""A model on a mesh of eight devices is the model on one: logits, tokens, bytes, collectives."""

from __future__ import annotations

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from jax.sharding import AxisType

import qllama_jax as ql
from matrix import FORMATS
from meshes import (
    KINDS,
    LENGTH,
    PROMPT,
    SHAPES,
    SMALL,
    TOKENS,
    WIDE,
    assert_close,
    device_bytes,
    logits_of,
    make_mesh,
)
from qllama_jax.matmul import matmul_expert
from qllama_jax.matmul.sharded import ShardedWeight
from reference import Reference

each_type = pytest.mark.parametrize(
    "types", [AxisType.Auto, AxisType.Explicit], ids=lambda types: types.name
)


def continued(reference, tokens):
    """The first PROMPT tokens of each row and what follows greedily, to as many as there were."""
    new = LENGTH - PROMPT
    return np.array([[*row[:PROMPT], *reference.greedy(row[:PROMPT], new)] for row in tokens])


def collectives(compiled):
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-[a-z]+"
    return collections.Counter(re.findall(rf"= \S+ ({names})(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_on_a_mesh_are_those_of_float64(tiny_llama, kind, shape):
    path = tiny_llama(**KINDS[kind])
    reference = Reference(path)
    mesh = make_mesh(shape)
    model = ql.load(path, mesh=mesh)
    tokens = continued(reference, TOKENS)
    logits, cache = logits_of(model, tokens, mesh)
    wanted = np.stack([reference.logits(row) for row in tokens])
    assert_close(logits, wanted)
    # Greedy tokens are those of the largest logits, each after the ones before it.
    assert (logits.argmax(-1)[:, PROMPT - 1 : -1] == tokens[:, PROMPT:]).all()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert max(device_bytes(model.params).values()) <= (1 / shape[1] + 0.05) * total
    held = device_bytes((cache.k, cache.v))
    assert set(held.values()) == {sum(x.nbytes for x in (*cache.k, *cache.v)) // 8}


#: Each format once as a column and once as a row of devices cuts it.
ROLES = ["attn_q", "attn_output", "ffn_gate", "ffn_down"]


@pytest.mark.parametrize("shift", [0, 1])
def test_every_format_is_cut_by_rows_and_by_blocks(tiny_llama, shift):
    def qtype(name):
        *layer, stem, _ = name.split(".")
        if stem not in ROLES:
            return "Q8_0"
        place = len(ROLES) * int(layer[1]) + ROLES.index(stem) + shift
        return FORMATS[place % len(FORMATS)]

    path = tiny_llama(qtype, layers=len(FORMATS) // len(ROLES), **WIDE)
    used = {ql.read_gguf(path).tensors[f"blk.0.{stem}.weight"].qtype for stem in ROLES}
    assert used == {QType[FORMATS[place + shift]] for place in range(4)}
    mesh = make_mesh((2, 4))
    model = ql.load(path, mesh=mesh)
    tokens = TOKENS[:2, :5]
    logits, _ = logits_of(model, tokens, mesh)
    reference = Reference(path)
    assert_close(logits, np.stack([reference.logits(row) for row in tokens]))


@each_type
@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_scores_need_no_other_code(tiny_llama, kind, types):
    path = tiny_llama(**KINDS[kind])
    reference = Reference(path)
    mesh = make_mesh((2, 4), types)
    model = ql.load(path, mesh=mesh)
    tokens = continued(reference, TOKENS[:2])
    options = {"max_new_tokens": LENGTH - PROMPT, "ignore_eos": True, "activations": "float"}
    with jax.set_mesh(mesh):  # which nothing needs, and nothing minds
        results = ql.generate(model, tokens[:, :PROMPT].tolist(), **options)
    assert [result.tokens for result in results] == tokens[:, PROMPT:].tolist()
    pieces = ql.stream(model, tokens[0, :PROMPT].tolist(), **options)
    assert [piece.token for piece in pieces] == tokens[0, PROMPT:].tolist()
    wanted = reference.logits(tokens[1])
    wanted = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
    found = ql.score(model, tokens[1].tolist()).logprobs
    np.testing.assert_allclose(found, wanted[np.arange(LENGTH - 1), tokens[1, 1:]], atol=3e-5)


@each_type
def test_generate_tokens_on_a_mesh_chooses_the_tokens_of_float64(tiny_llama, types):
    path = tiny_llama(**KINDS["dense"])
    tokens = continued(Reference(path), TOKENS[:4])
    mesh = make_mesh((4, 2), types)
    model = ql.load(path, mesh=mesh)
    generate = jax.jit(ql.generate_tokens, static_argnames=("config", "max_new_tokens"))
    out = generate(
        model.params,
        jnp.asarray(tokens[:, :PROMPT]),
        jnp.full((4,), PROMPT, jnp.int32),
        jax.random.key(0),
        config=model.config,
        sampling=ql.Sampling(),
        max_new_tokens=LENGTH - PROMPT,
        stop_tokens=jnp.zeros((0,), jnp.int32),
    )
    assert np.asarray(out.tokens).tolist() == tokens[:, PROMPT:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_parallel_step_adds_up_and_gathers_only_logits(tiny_llama, kind):
    mesh = make_mesh((1, 8))
    model = ql.load(tiny_llama(**KINDS[kind] | {"layers": 2}), mesh=mesh)
    cache = ql.init_cache(model.config, 1, 32, mesh=mesh)
    step = ql.forward.lower(model.params, jnp.zeros((1, 1), jnp.int32), cache, config=model.config)
    # A sum for the embedding, and two in each layer.
    assert collectives(step.compile()) == {"all-reduce": 1 + 2 * 2, "all-gather": 1}


@each_type
def test_rules_say_what_is_cut_over_which_axis(tiny_llama, types):
    path = tiny_llama(**KINDS["mixture"])
    reference = Reference(path)
    mesh = make_mesh((2, 4), types, names=("dp", "tp"))
    rules = {"batch": "dp", "experts": "tp", "heads": ("dp", "tp"), "kv_heads": None, "vocab": "dp"}
    model = ql.load(path, mesh=mesh, rules=rules)
    block: Any = model.params.blk[0]
    assert block.ffn_down_exps.weight.axes == (("tp",), (), ())
    assert block.attn_q.weight.axes == (("dp", "tp"), ())
    assert block.attn_k.weight.axes == ((), ())
    assert model.params.output is not None
    assert model.params.output.weight.axes == (("dp",), ())
    cache = ql.init_cache(model.config, 2, 8, mesh=model.params.partitioning)
    tokens = TOKENS[:2, :8]
    logits, _ = ql.forward(model.params, jnp.asarray(tokens), cache, config=model.config)
    assert_close(np.asarray(logits), np.stack([reference.logits(row) for row in tokens]))


def test_an_expert_of_a_stack_on_a_mesh_is_that_expert(tiny_llama):
    path = tiny_llama(**KINDS["mixture"])
    one: Any = ql.load(path, layout="file").params.blk[0]
    dense = np.asarray(one.ffn_down_exps.weight.dequantize(), np.float64)
    rules = {"experts": "data", "batch": None}  # its axis is cut, and so are the inputs
    cut: Any = ql.load(path, mesh=make_mesh((2, 4)), rules=rules).params.blk[0]
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    for expert in (0, 5):
        y = matmul_expert(jnp.asarray(x), cut.ffn_down_exps.weight, jnp.int32(expert))
        assert_close(np.asarray(y), x @ dense[expert].T)


@each_type
def test_inputs_may_be_cut_everywhere(tiny_llama, types):
    """With "embed" cut in place of the outputs, every product adds up, blocks and biases too."""
    path = tiny_llama("Q4_0", **SMALL | {"embed": 256}, fused_qkv=True, biases=True, tied=True)
    rules = {"embed": "model", "vocab": None, "heads": None, "kv_heads": None, "ffn": None}
    model = ql.load(path, mesh=make_mesh((2, 4), types), rules=rules)
    assert model.params.blk[0].attn_k.weight.axes == ((), ("model",))
    logits, _ = logits_of(model, TOKENS[:2])
    reference = Reference(path)
    assert_close(logits, np.stack([reference.logits(row) for row in TOKENS[:2]]))


@pytest.mark.parametrize("rows", [3, 8])
def test_a_cache_of_heads_that_do_not_divide_is_cut_by_rows(tiny_llama, rows):
    path = tiny_llama("Q8_0", **SMALL | {"kv_heads": 2}, fused_qkv=True, biases=True)
    mesh = make_mesh((2, 4))
    model = ql.load(path, mesh=mesh)
    logits, cache = logits_of(model, TOKENS[:rows], mesh)
    reference = Reference(path)
    assert_close(logits, np.stack([reference.logits(row) for row in TOKENS[:rows]]))
    parts = 8 if rows == 8 else 1
    assert max(device_bytes(cache.k).values()) == sum(k.nbytes for k in cache.k) // parts


def test_a_weight_on_a_mesh_tells_the_truth(tiny_llama):
    path = tiny_llama("Q4_K", **WIDE | {"layers": 1})
    whole = ql.load(path, layout="file").params
    mesh = make_mesh((2, 4))
    params = ql.load(path, mesh=mesh).params
    x = np.random.default_rng(0).standard_normal((2, 3, 1024)).astype(np.float32)
    for name in ("ffn_down", "ffn_gate"):
        one, cut = getattr(whole.blk[0], name).weight, getattr(params.blk[0], name).weight
        assert isinstance(cut, ShardedWeight)
        assert (cut.shape, cut.ndim, cut.nbytes) == (one.shape, one.ndim, one.nbytes)
        dense = np.asarray(one.dequantize())
        assert (np.asarray(cut.dequantize()) == dense).all()
        rows = jnp.array([[0, 200, 255], [7, 64, 63]])
        assert (np.asarray(cut.dequantize_rows(rows)) == dense[np.asarray(rows)]).all()
        y = np.asarray(ql.matmul(jnp.asarray(x[..., : one.shape[1]]), cut))
        assert_close(y, x[..., : one.shape[1]].astype(np.float64) @ dense.T.astype(np.float64))


def test_a_gradient_goes_through_a_mesh(tiny_llama):
    path = tiny_llama(**KINDS["dense"])
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)

    def gradient(model):
        def loss(x):
            cache = ql.init_cache(model.config, 2, 4, mesh=model.params.partitioning)
            hidden, _, _ = ql.hidden_states(
                model.params, None, cache, config=model.config, inputs_embeds=x
            )
            return jnp.sum(ql.unembed(model.params, hidden, config=model.config)[..., :7])

        return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(x)))

    wanted = gradient(ql.load(path, layout="file"))
    assert_close(gradient(ql.load(path, mesh=make_mesh((2, 4)))), wanted)
