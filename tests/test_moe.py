"""A mixture computes the experts that each token chose, and nothing else, however it is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.matmul import matmul_expert
from qllama_jax.matmul.experts import SeparateExperts
from qllama_jax.moe import moe_swiglu, route
from qllama_jax.params import MoEBlock
from qllama_jax.quants import F32, Block
from reference import Reference, silu, softmax

Array = np.ndarray
TinyLlama = Callable[..., Path]

D, E, A = 64, 4, 2
SMALL: dict[str, Any] = {"layers": 1, "embed": D, "ffn": 96, "heads": 4, "kv_heads": 2}
MIXTURE: dict[str, Any] = SMALL | {"experts": E, "experts_used": A}
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("moe") / "a.gguf", "Q8_0", **MIXTURE)


@pytest.fixture(scope="module")
def model(path: Path) -> ql.Model:
    """Experts stacked as in the file."""
    return ql.load(path, layout="file")


@pytest.fixture(scope="module")
def stacks(model: ql.Model) -> MoEBlock:
    (block,) = model.params.blk
    assert isinstance(block, MoEBlock)
    return block


@pytest.fixture(scope="module", params=["file", "auto"])
def block(path: Path, request: pytest.FixtureRequest) -> MoEBlock:
    (block,) = ql.load(path, layout=request.param).params.blk
    assert isinstance(block, MoEBlock)
    return block


def inputs(B: int, T: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, D)), jnp.float32)


def dense_sum(x: Any, block: MoEBlock, active: int) -> Array:
    """Every expert on every token, in float64, weighted by zero where it was not chosen."""

    def stack(weight: Any) -> Array:
        return np.asarray(weight.dequantize(), np.float64)

    x = np.asarray(x, np.float64)
    probabilities = softmax(x @ np.asarray(block.ffn_gate_inp.weight, np.float64).T)
    order = np.argsort(-probabilities, axis=-1, kind="stable")[..., :active]
    weights = np.zeros_like(probabilities)
    np.put_along_axis(weights, order, np.take_along_axis(probabilities, order, -1), -1)
    weights /= weights.sum(axis=-1, keepdims=True)
    gate = np.einsum("BTD,EFD->BTEF", x, stack(block.ffn_gate_exps.weight))
    up = np.einsum("BTD,EFD->BTEF", x, stack(block.ffn_up_exps.weight))
    down = np.einsum("BTEF,EDF->BTED", silu(gate) * up, stack(block.ffn_down_exps.weight))
    return np.einsum("BTED,BTE->BTD", down, weights)


def error(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("tile_size", [1, 2, 8, 64, None])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (2, 17)])
def test_grouped_tokens_of_any_tile_size_equal_the_dense_sum(
    block: MoEBlock, B: int, T: int, tile_size: int | None
):
    x = inputs(B, T)
    counted = jnp.ones((B, T), bool)
    y, _ = jax.jit(moe_swiglu, static_argnums=(3, 4), static_argnames="tile_size")(
        x, counted, block, A, "float", tile_size=tile_size
    )
    assert error(y, dense_sum(x, block, A)) < ROUNDING


@pytest.mark.parametrize("active", [1, 3, 4])
def test_any_number_of_active_experts_equals_the_dense_sum(block: MoEBlock, active: int):
    x = inputs(2, 5)
    y, routing = moe_swiglu(x, jnp.ones((2, 5), bool), block, active, "float")
    assert routing.experts.shape == (2, 5, active)
    assert error(y, dense_sum(x, block, active)) < ROUNDING


def test_tokens_that_all_choose_one_expert_are_all_computed(block: MoEBlock):
    x = jnp.broadcast_to(inputs(1, 1), (1, 40, D))
    y, routing = moe_swiglu(x, jnp.ones((1, 40), bool), block, A, "float", tile_size=8)
    assert len(np.unique(np.asarray(routing.experts))) == A
    assert error(y, dense_sum(x, block, A)) < ROUNDING


def test_padding_is_zero_and_changes_no_bit_of_the_rest(block: MoEBlock):
    x = inputs(2, 9)
    counted = jnp.arange(9)[None] < jnp.asarray([9, 4])[:, None]
    y, _ = moe_swiglu(x, counted, block, A, "float", tile_size=4)
    other, _ = moe_swiglu(
        jnp.where(counted[..., None], x, 7.0), counted, block, A, "float", tile_size=4
    )
    np.testing.assert_array_equal(y, other)
    np.testing.assert_array_equal(np.asarray(y)[1, 4:], 0)
    assert error(y[1, :4], dense_sum(x, block, A)[1, :4]) < ROUNDING


def test_routing_is_the_renormalised_softmax_and_ties_take_the_lower_index():
    router = jnp.asarray(np.eye(4, D, dtype=np.float32))
    x = jnp.zeros((1, 1, D)).at[0, 0, :4].set(jnp.asarray([0.0, 1.0, 0.0, 1.0]))
    routing = route(x, router, 3)
    assert np.asarray(routing.experts).tolist() == [[[1, 3, 0]]]
    e = np.e
    np.testing.assert_allclose(routing.weights[0, 0], np.array([e, e, 1]) / (2 * e + 1), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("expert", range(3))
def test_a_router_that_is_not_finite_leaves_no_weight_that_is(expert: int, value: float):
    router = np.eye(3, D, dtype=np.float32)
    router[expert, 0] = value
    x = jnp.ones((1, 1, D))
    routing = jax.jit(route, static_argnums=2)(x, jnp.asarray(router), 2)
    assert np.isnan(routing.weights).all()


def test_aux_holds_what_the_router_of_the_reference_chooses(
    tiny_llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
):
    path = tiny_llama("Q8_0", **MIXTURE | {"layers": 2})
    chosen: list[tuple[list[int], list[float]]] = []
    argsort = np.argsort

    def spy(negated: Array, **options: Any) -> Array:
        order = argsort(negated, **options)
        few = -negated[order[:A]]
        chosen.append((order[:A].tolist(), (few / few.sum()).tolist()))
        return order

    monkeypatch.setattr(np, "argsort", spy)
    tokens = list(range(5, 15))
    Reference(path).logits(tokens)
    monkeypatch.undo()
    loaded = ql.load(path)
    cache = ql.init_cache(loaded.config, 1, 16)
    _, _, aux = ql.hidden_states(
        loaded.params, jnp.asarray([tokens], jnp.int32), cache, config=loaded.config
    )
    assert set(aux) == {f"blk.{i}.{name}" for i in (0, 1) for name in ("experts", "expert_weights")}
    for i in (0, 1):
        experts, weights = zip(*chosen[10 * i : 10 * (i + 1)], strict=True)
        assert np.asarray(aux[f"blk.{i}.experts"])[0].tolist() == list(experts)
        np.testing.assert_allclose(aux[f"blk.{i}.expert_weights"][0], weights, rtol=1e-5)


def poisoned(model: ql.Model, expert: int) -> ql.Params:
    """Params whose given expert holds NaN in the scales of all its matrices."""
    (block,) = model.params.blk

    def spoil(layer: Any) -> Any:
        weight = layer.weight
        return layer.replace(weight=weight.replace(d=weight.d.at[expert].set(jnp.nan)))

    names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    spoiled = dataclasses.replace(block, **{n: spoil(getattr(block, n)) for n in names})
    return dataclasses.replace(model.params, blk=(spoiled,))


@pytest.mark.parametrize("T", [1, 12])
def test_a_nan_in_an_expert_that_no_token_chose_never_reaches_the_output(model: ql.Model, T: int):
    tokens = jnp.full((1, T), 7, jnp.int32)

    def run(params: ql.Params) -> tuple[Array, set[int]]:
        cache = ql.init_cache(model.config, 1, 16)
        hidden, _, aux = ql.hidden_states(params, tokens, cache, config=model.config)
        logits = ql.unembed(params, hidden, config=model.config)
        return np.asarray(logits), set(np.asarray(aux["blk.0.experts"]).ravel().tolist())

    clean, used = run(model.params)
    unused = set(range(E)) - used
    assert unused
    for expert in range(E):
        logits, _ = run(poisoned(model, expert))
        if expert in unused:
            np.testing.assert_array_equal(logits, clean)
        else:
            assert np.isnan(logits).any()


def test_the_gradient_to_the_input_equals_that_of_the_dense_sum(block: MoEBlock):
    x, direction = inputs(1, 3), np.asarray(inputs(1, 3, seed=1), np.float64)
    counted = jnp.ones((1, 3), bool)
    target = inputs(1, 3, seed=2)

    def loss(x: jax.Array) -> jax.Array:
        y, _ = moe_swiglu(x, counted, block, A, "float")
        return jnp.sum(y * target)

    found = np.sum(np.asarray(jax.grad(loss)(x), np.float64) * direction)
    step = 1e-6

    def wanted_loss(sign: int) -> float:
        moved = np.asarray(x, np.float64) + sign * step * direction
        return float(np.sum(dense_sum(moved, block, A) * np.asarray(target)))

    wanted = (wanted_loss(1) - wanted_loss(-1)) / (2 * step)
    assert abs(found - wanted) < 1e-5 * abs(wanted)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_every_expert_of_a_stack_multiplies_as_it_does_alone(stacks: MoEBlock, activations: Any):
    x = inputs(1, 5)[0]
    stack = stacks.ffn_gate_exps.weight
    assert isinstance(stack, Block)
    for e in range(E):
        alone = ql.matmul(
            x, jax.tree.map(lambda leaf, e=e: leaf[e], stack), activations=activations
        )
        found = matmul_expert(x, stack, jnp.int32(e), activations=activations)
        np.testing.assert_array_equal(found, alone)
        plain = stack.dequantize()
        wanted = np.asarray(x, np.float64) @ np.asarray(plain[e], np.float64).T
        np.testing.assert_allclose(
            matmul_expert(x, plain, jnp.int32(e)), wanted, rtol=1e-5, atol=1e-5
        )


def test_operands_that_do_not_fit_an_expert_are_refused(stacks: MoEBlock):
    stack = stacks.ffn_gate_exps.weight
    with pytest.raises(ValueError, match="differ in their last axis"):
        matmul_expert(jnp.zeros((1, D + 32)), stack, jnp.int32(0))
    with pytest.raises(TypeError, match="no matmul_expert is registered for weights of type nd"):
        matmul_expert(jnp.zeros((1, D)), np.zeros((E, 8, D)), jnp.int32(0))


@pytest.mark.parametrize("other", ["F32", "Q4_0"])
def test_experts_of_different_formats_equal_the_reference(tiny_llama: TinyLlama, other: str):
    odd = {"blk.0.ffn_down.1.weight": other, "blk.0.ffn_up.3.weight": other}
    path = tiny_llama({"*": "Q8_0", **odd}, **MIXTURE, merged=False)
    loaded = ql.load(path, layout="file")
    (block,) = loaded.params.blk
    assert isinstance(block, MoEBlock)
    down = block.ffn_down_exps.weight
    assert isinstance(down, SeparateExperts)
    assert down.shape == (E, D, 96)
    assert isinstance(block.ffn_gate_exps.weight, Block)
    tokens = list(range(20))
    logits, _ = ql.forward(
        loaded.params,
        jnp.asarray([tokens], jnp.int32),
        ql.init_cache(loaded.config, 1, 32),
        config=loaded.config,
    )
    assert error(logits[0], Reference(path).logits(tokens)) < 1e-5


def test_experts_apart_load_as_the_same_bytes_as_merged_ones(tiny_llama: TinyLlama):
    for qtype in ("Q4_0", "F32"):
        merged = ql.load(tiny_llama(qtype, **MIXTURE)).params
        apart = ql.load(tiny_llama(qtype, **MIXTURE, merged=False)).params
        assert jax.tree.structure(merged) == jax.tree.structure(apart)
        jax.tree.map(np.testing.assert_array_equal, merged, apart)
        assert not any(isinstance(x, F32) for x in jax.tree.leaves(merged))


def test_prefill_then_decode_equals_one_forward(model: ql.Model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 384, (2, 12)), jnp.int32)
    whole, _ = ql.forward(
        model.params, tokens, ql.init_cache(model.config, 2, 16), config=model.config
    )
    cache = ql.init_cache(model.config, 2, 16)
    parts = []
    for first, last in [(0, 7), (7, 8), (8, 9), (9, 12)]:
        logits, cache = ql.forward(model.params, tokens[:, first:last], cache, config=model.config)
        parts.append(logits)
    assert error(jnp.concatenate(parts, axis=1), whole) < ROUNDING


def test_no_expert_stack_is_copied_in_a_decoding_step(model: ql.Model):
    """The step's temporaries stay far below the bytes of one stack of experts."""
    options: dict[str, Any] = {"config": model.config, "activations": "float"}
    block = model.params.blk[0]
    assert isinstance(block, MoEBlock)
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (64, *[1] * (leaf.ndim - 1))), block)
    many = dataclasses.replace(
        block,
        ffn_gate_inp=many.ffn_gate_inp,
        ffn_gate_exps=many.ffn_gate_exps,
        ffn_up_exps=many.ffn_up_exps,
        ffn_down_exps=many.ffn_down_exps,
    )
    params = dataclasses.replace(model.params, blk=(many,))
    cache = ql.init_cache(model.config, 1, 16)
    step = jax.jit(ql.forward, static_argnames=("config", "activations"))
    compiled = step.lower(params, jnp.zeros((1, 1), jnp.int32), cache, **options).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    stack = many.ffn_up_exps.weight.nbytes
    assert stack > 1_500_000
    assert memory.temp_size_in_bytes < stack / 4
