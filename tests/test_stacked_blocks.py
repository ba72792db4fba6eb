"""A loop over layers, whose weights lie in stacks: the same model, out of the same memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from cpu_weights import normal, relative_error, weight
from matrix import TOKENS
from qllama_jax import session
from qllama_jax.matmul import cpu, matmul_expert
from qllama_jax.matmul.cpu import LAYOUTS
from qllama_jax.matmul.cpu.weight import lanes_of
from qllama_jax.params import StackedBlocks
from reference import Reference
from small_model import FLOAT32
from stacked_models import FILES, loader, looped

pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture(scope="module")
def load_model(tiny_llama):
    return loader(tiny_llama)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The types of `blk` that generations decode with."""
    blocks = []

    def decode(params: Any, *arguments: Any, **static: Any) -> Any:
        blocks.append(type(params.blk))
        return real(params, *arguments, **static)

    real = session._decode
    decode.lower = real.lower  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(session, "_decode", decode)
    return blocks


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes of the caches that generations make."""
    dtypes = []

    def make(*arguments: Any, **options: Any) -> ql.KVCache:
        cache = ql.init_cache(*arguments, **options)
        dtypes.extend(str(leaf.dtype) for leaf in jax.tree.leaves((cache.k, cache.v)))
        return cache

    monkeypatch.setattr(session, "init_cache", make)
    return dtypes


def pointers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["Q4_0", *(name for name in FILES if name not in LAYOUTS)])
def test_a_prompt_and_steps_after_it_give_the_float64_references_logits(load_model, name: str):
    path, model = load_model(name)
    wanted = Reference(path).logits(TOKENS[:8])
    cache = ql.init_cache(model.config, 2, 16, stacked=True)
    tokens = jnp.asarray([TOKENS[:6], [*TOKENS[:4], 7, 7]], jnp.int32)
    logits, cache = ql.forward(
        looped(model), tokens, cache, config=model.config, lengths=jnp.asarray([6, 4], jnp.int32)
    )
    assert relative_error(logits[0], wanted[:6]) < FLOAT32
    for step in range(2):
        tokens = jnp.asarray([[TOKENS[6 + step]], [TOKENS[4 + step]]], jnp.int32)
        logits, cache = ql.forward(looped(model), tokens, cache, config=model.config)
        assert relative_error(logits[0, 0], wanted[6 + step]) < FLOAT32
        assert relative_error(logits[1, 0], wanted[4 + step]) < FLOAT32
    assert cache.lengths.tolist() == [8, 6]


@pytest.mark.parametrize("name", ["Q4_0", "two formats", "experts"])
def test_a_generation_takes_the_loop_and_gives_the_float64_references_tokens(
    load_model, name: str, decoded: list[type]
):
    path, model = load_model(name, context_length=1024)
    # The room grows from 16 positions for the prompt to 128 and 256 while tokens are generated.
    prompt = TOKENS[:5]
    found = ql.generate(
        model, prompt, max_new_tokens=140, activations="int8x2", ignore_eos=True, dtype=jnp.float32
    )
    reference = Reference(path)
    logits = reference.logits([*prompt, *found.tokens])[4:-1]
    chosen = np.take_along_axis(logits, np.asarray(found.tokens)[:, None], axis=1)[:, 0]
    # The largest, or as large as the second int8 tells.
    assert (logits.max(axis=1) - chosen < 1e-3 * np.abs(logits).max()).all()
    assert set(decoded) == {StackedBlocks}


@pytest.mark.parametrize("name", ["Q4_0", "two formats"])
def test_positions_in_many_blocks_are_attended_to(load_model, name: str):
    path, model = load_model(name, context_length=1024)
    tokens = np.random.default_rng(0).integers(0, 384, 600)
    wanted = Reference(path).logits(tokens)
    cache = ql.init_cache(model.config, 1, 640, stacked=True)
    forward = functools.partial(ql.forward, looped(model), config=model.config)
    prompt, steps = jnp.asarray(tokens[None, :598], jnp.int32), tokens[598:]
    logits, cache = forward(prompt, cache)
    assert relative_error(logits[0, -1], wanted[597]) < FLOAT32
    for at, token in enumerate(steps):
        logits, cache = forward(jnp.full((1, 1), token, jnp.int32), cache)
        assert relative_error(logits[0, 0], wanted[598 + at]) < FLOAT32


@pytest.mark.parametrize(
    ("rows", "activations", "most"),
    [(3, "float", 1e-6), (1, "int8", 2e-2), (3, "int8x2", 2e-4), (40, "int8", 2e-2)],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_of_a_stack_is_multiplied_with(
    name: str, activations: Any, most: float, rows: int
):
    # Three that differ, though of one shape: weights of several sizes, from their second tile to
    # row 95.
    whole = [weight(name, out, 512) for out in (96, 112, 128)]
    lanes = lanes_of(name)
    weights = [w.slice_tiles(jnp.int32(1), 96 // lanes - 1) for w, _ in whole]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = normal(rows, 512)
    product = jax.jit(functools.partial(matmul_expert, activations=activations))
    for index, (_, values) in enumerate(whole):
        found = product(x, stack, jnp.int32(index))
        assert relative_error(found, x.astype(np.float64) @ values[lanes:96].T) < most


@pytest.mark.parametrize("name", FILES)
def test_stacks_are_the_memory_of_the_blocks(load_model, name: str):
    _, model = load_model(name)
    stacked = looped(model).blk
    assert isinstance(stacked, StackedBlocks)
    at: dict[int, int] = {}  # bytes up to the end, by where each array of a stack begins
    for leaf in jax.tree.leaves(stacked):
        at[leaf.unsafe_buffer_pointer()] = leaf.nbytes
    weights = [
        leaf
        for block in model.params.blk
        for leaf in jax.tree.leaves(block)
        if leaf.ndim > 2  # no vector, nor a router
    ]
    for leaf in weights:
        begin = leaf.unsafe_buffer_pointer()
        assert any(b <= begin and begin + leaf.nbytes <= b + n for b, n in at.items())
    assert len(set(map(id, weights))) == len(set(pointers(weights)))


@pytest.mark.parametrize("rows", [4, 5, 8, 9])
def test_as_many_rows_go_through_the_loop_as_kernels_take_in_one_piece(rows: int):
    assert cpu.reads_stacks(rows, "auto") == cpu.reads_stacks(rows, "int8") == (rows <= 8)
    assert cpu.reads_stacks(rows, "int8x2") == (rows <= 4)
    assert not cpu.reads_stacks(rows, "float")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "float16"),
        ({"activations": "int8"}, "float16"),
        ({"activations": "int8x2"}, "float32"),
        ({"activations": "float"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"cache_dtype": "float32"}, "float32"),
        ({"cache_dtype": "float16", "activations": "float"}, "float16"),
        ({"cache_dtype": jnp.bfloat16, "prompt": [[5]] * 9}, "bfloat16"),
        ({"prompt": [[5]] * 9}, "float32"),
    ],
)
def test_keys_and_values_are_rounded_where_activations_are_to_less_or_as_asked(
    load_model, caches: list[str], options: dict[str, Any], wanted: str
):
    _, model = load_model("Q4_0")
    ql.generate(model, **{"prompt": [5], "max_new_tokens": 2, "ignore_eos": True, **options})
    assert set(caches) == {wanted}


def test_more_rows_take_one_layer_after_another(load_model, decoded: list[type]):
    _, model = load_model("Q4_0")
    for rows, blocks in ((2, StackedBlocks), (9, tuple)):
        decoded.clear()
        ql.generate(model, [[5]] * rows, max_new_tokens=2, ignore_eos=True)
        assert set(decoded) == {blocks}


def test_pure_generation_out_of_a_stack_has_a_room_of_whole_tiles(load_model):
    _, model = load_model("Q4_0")
    prompt, count = jnp.asarray([[5, 6, 7]], jnp.int32), jnp.asarray([3], jnp.int32)
    options: dict[str, Any] = {"config": model.config, "stop_tokens": [], "max_new_tokens": 100}
    key, sampling = jax.random.key(0), ql.Sampling()
    found = ql.generate_tokens(looped(model), prompt, count, key, sampling=sampling, **options)
    assert found.cache.max_length == 128
    assert found.cache.lengths.tolist() == [102]


def test_params_that_are_looped_already_are_generated_with(load_model, decoded: list[type]):
    _, model = load_model("Q4_0")
    again = dataclasses.replace(model, params=looped(model))
    tokens = [
        ql.generate(m, [5, 6], max_new_tokens=3, ignore_eos=True).tokens for m in (again, model)
    ]
    assert tokens[0] == tokens[1]
    assert set(decoded) == {StackedBlocks}


def test_what_is_out_of_range_poisons_its_row_alone(load_model):
    path, model = load_model("Q4_0")
    forward = functools.partial(ql.forward, looped(model), config=model.config)
    start = ql.init_cache(model.config, 2, 4, stacked=True)
    _, filled = forward(jnp.asarray([TOKENS[:3], TOKENS[3:6]], jnp.int32), start)
    logits, after = forward(jnp.asarray([[TOKENS[6]], [-1]], jnp.int32), filled)
    assert np.isnan(logits[1]).all()
    wanted = Reference(path).logits([*TOKENS[:3], TOKENS[6]])[-1]
    assert relative_error(logits[0, 0], wanted) < FLOAT32
    assert after.lengths.tolist() == [4, 5]
    np.testing.assert_array_equal(after.k[:, 1], filled.k[:, 1])
    np.testing.assert_array_equal(after.v[:, 1], filled.v[:, 1])
    # The one is full now, the other stays poisoned in a larger room and is whole when set back.
    larger = ql.resize_cache(after, 8)
    assert larger.lengths.tolist() == [4, 9]
    mended = dataclasses.replace(larger, lengths=jnp.asarray([4, 3], jnp.int32))
    logits, _ = forward(jnp.asarray([[TOKENS[7]], [TOKENS[8]]], jnp.int32), mended)
    wanted = Reference(path).logits([*TOKENS[3:6], TOKENS[8]])[-1]
    assert relative_error(logits[1, 0], wanted) < FLOAT32
    logits, _ = forward(jnp.asarray([[5], [5]], jnp.int32), after)
    assert np.isnan(logits).all()


def test_other_params_have_no_stacks_of_the_old_ones(load_model):
    _, model = load_model("Q4_0")
    assert dataclasses.replace(model, chat_template="x").looped_params is not None
    other = dataclasses.replace(model.params, output_norm=model.params.token_embd)
    assert dataclasses.replace(model, params=other).looped_params is not None
    changed = jax.tree.map(lambda leaf: leaf, model.params)
    assert dataclasses.replace(model, params=changed).looped_params is None


@pytest.mark.parametrize(
    "options",
    [
        {"qtype": "F32"},
        {"qtype": "IQ4_XS"},
        {"qtype": "Q4_0", "fused_qkv": True},
        {"qtype": lambda name: "F32" if "blk.1.attn_q" in name else "Q4_0"},
        {"qtype": "Q4_0", "experts": 2, "experts_used": 1, "merged": False},
    ],
    ids=["plain", "file's blocks", "fused", "one plain", "experts apart"],
)
def test_blocks_without_stacks_are_generated_with_all_the_same(tiny_llama, options: dict[str, Any]):
    path = tiny_llama(layers=3, **options)
    model = ql.load(path)
    assert model.looped_params is None
    found = ql.generate(model, TOKENS[:5], max_new_tokens=4, activations="float", ignore_eos=True)
    assert found.tokens == Reference(path).greedy(TOKENS[:5], 4)


def test_what_does_not_fit_is_refused(load_model):
    _, model = load_model("Q4_0")
    tokens, config = jnp.zeros((1, 2), jnp.int32), model.config
    apart, together = (ql.init_cache(config, 1, 16, stacked=stacked) for stacked in (False, True))
    with pytest.raises(ValueError, match="layers' cache is one each"):
        ql.forward(looped(model), tokens, apart, config=config)
    with pytest.raises(ValueError, match="layers' cache is one array"):
        ql.forward(model.params, tokens, together, config=config)
    for name in ("k", "v"):
        x = getattr(together, name)
        for other in (x[:2], x[:, :, :, :1], x.reshape(*x.shape[:2], 2, *x.shape[3:5], -1)):
            wrong = dataclasses.replace(together, **{name: other})
            with pytest.raises(ValueError, match=r"need a cache of 3 layers of \(1, "):
                ql.forward(looped(model), tokens, wrong, config=config)
    with pytest.raises(ValueError, match="want blocks each"):
        ql.hidden_states(looped(model), tokens, together, config=config, capture=["blk.0.in"])
    with pytest.raises(TypeError, match="no stack"):
        matmul_expert(jnp.ones((1, 256)), model.params.blk[0].attn_q.weight, jnp.int32(0))
    with pytest.raises(IndexError, match="layer 3 of 3"):
        looped(model).blk[3]
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    with pytest.raises(ValueError, match="stacked"):
        ql.init_cache(config, 1, 16, mesh=mesh, stacked=True)


def test_routers_choices_are_told_by_layer(load_model):
    _, model = load_model("experts")
    tokens, config = jnp.asarray([TOKENS[:5]], jnp.int32), model.config
    call = functools.partial(ql.hidden_states, config=config)
    _, _, wanted = call(model.params, tokens, ql.init_cache(config, 1, 16))
    _, _, found = call(looped(model), tokens, ql.init_cache(config, 1, 16, stacked=True))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
