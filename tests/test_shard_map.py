"""The pure functions inside a `jax.shard_map` that checks what varies over the mesh, as it does."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qllama_jax as ql
from blocks import blocks_like
from cpu_weights import multiply, normal, weight
from meshes import SMALL
from qllama_jax.attention import STEP_KEY_BLOCK
from qllama_jax.matmul import matmul_expert
from qllama_jax.matmul.experts import SeparateExperts
from qllama_jax.quants import FORMATS

pytestmark = pytest.mark.usefixtures("on_a_cpu")

ROWS, TOKENS = 4, 6


@pytest.fixture(scope="module", params=[0, 2], ids=["dense", "mixture"])
def model(request, tiny_llama):
    experts = {"experts": request.param, "experts_used": 1} if request.param else {}
    return ql.load(tiny_llama("Q4_0", **experts, **SMALL))


@pytest.fixture
def mesh():
    devices = jax.devices("cpu")[:2]
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def prompts() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(3, 300, (ROWS, TOKENS)), jnp.int32)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_forward_by_rows(model, mesh, activations: Any):
    room = 3 * STEP_KEY_BLOCK  # attention goes through it in blocks

    def forward(params, tokens):
        cache = ql.init_cache(model.config, tokens.shape[0], room)
        logits, cache = ql.forward(
            params, tokens, cache, config=model.config, activations=activations
        )
        step, _ = ql.forward(
            params, tokens[:, -1:], cache, config=model.config, activations=activations
        )
        return jnp.concatenate([logits, step], axis=1)

    by_rows = jax.shard_map(forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    wanted = jax.jit(forward)(model.params, prompts())
    found = jax.jit(by_rows)(model.params, prompts())
    np.testing.assert_allclose(found, wanted, atol=1e-4)


GREEDY = ql.Sampling(temperature=0.0)
FILTERED = ql.Sampling(top_k=20, top_p=0.9, typical_p=0.9, min_p=0.01)


@pytest.mark.parametrize(
    ("sampling", "vary"),
    [(GREEDY, "prompts"), (FILTERED, "prompts"), (FILTERED, "keys")],
    ids=["greedy", "filtered", "keys-alone"],
)
def test_generate_by_rows(model, mesh, sampling, vary: str):
    def generate(params, tokens, keys):
        lengths = jnp.full(tokens.shape[:1], TOKENS, jnp.int32)
        return ql.generate_tokens(
            params,
            tokens,
            lengths,
            keys,
            config=model.config,
            sampling=sampling,
            max_new_tokens=5,
            stop_tokens=[],
            activations="float",
        ).tokens

    keys = jax.random.split(jax.random.key(0), ROWS)
    if vary == "prompts":
        tokens, tokens_spec = prompts(), P("data")
        whole = tokens
    else:  # each device draws other continuations of the same prompts
        tokens, tokens_spec = prompts()[: ROWS // 2], P()
        whole = jnp.concatenate([tokens, tokens])
    by_rows = jax.shard_map(
        generate, mesh=mesh, in_specs=(P(), tokens_spec, P("data")), out_specs=P("data")
    )
    wanted = jax.jit(generate)(model.params, whole, keys)
    np.testing.assert_array_equal(jax.jit(by_rows)(model.params, tokens, keys), wanted)


def test_the_gradient_to_embeddings_by_rows(model, mesh):
    def gradient(params, x):
        def loss(x):
            cache = ql.init_cache(model.config, x.shape[0], 16)
            hidden, _, _ = ql.hidden_states(
                params, None, cache, config=model.config, inputs_embeds=x
            )
            return jnp.sum(hidden**2)

        return jax.grad(loss)(x)

    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, model.config.embed_dim))
    by_rows = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    wanted = jax.jit(gradient)(model.params, x)
    np.testing.assert_allclose(jax.jit(by_rows)(model.params, x), wanted, atol=1e-4, rtol=1e-4)


def test_steps_that_differ_by_device_are_not_given_as_the_same(model, mesh):
    def steps(params, tokens):
        lengths = jnp.full(tokens.shape[:1], TOKENS, jnp.int32)
        cache = ql.init_cache(model.config, tokens.shape[0], 16)
        logits, cache = ql.prefill(params, tokens, lengths, cache, config=model.config)
        recent = ql.recent_tokens(tokens, lengths)
        keys = ql.row_keys(jax.random.key(0), tokens.shape[0])
        state, _ = ql.start_decoding(logits, cache, recent, keys, GREEDY, [])
        return ql.decode_many(params, state, GREEDY, [], 2, config=model.config, max_steps=2)[2]

    in_specs = (P(), P("data"))
    by_rows = jax.shard_map(
        lambda p, t: steps(p, t)[None], mesh=mesh, in_specs=in_specs, out_specs=P("data")
    )
    np.testing.assert_array_equal(jax.jit(by_rows)(model.params, prompts()), [2, 2])
    as_one = jax.shard_map(steps, mesh=mesh, in_specs=in_specs, out_specs=P())
    with pytest.raises(ValueError, match="data"):
        jax.jit(as_one)(model.params, prompts())


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("activations", ["float", "int8", "auto"])
def test_matmul_where_the_weight_alone_varies(mesh, rows: int, activations: Any):
    rng = np.random.default_rng(0)
    raw = blocks_like(rng.standard_normal((256, 512), dtype=np.float32), QType.Q4_0, rng)
    w = jax.tree.map(jnp.asarray, FORMATS[QType.Q4_0].from_bytes(raw))
    x = jnp.asarray(rng.standard_normal((rows, 512), dtype=np.float32))

    def product(x, w):
        return ql.matmul(x, w, activations=activations)

    by_columns = jax.shard_map(
        product, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(None, "data")
    )
    found = jax.jit(by_columns)(x, w)
    np.testing.assert_allclose(found, jax.jit(product)(x, w), atol=1e-3)

    def gradient(of):
        return jax.jit(jax.grad(lambda x: (of(x, w) ** 2).sum()))(x)

    np.testing.assert_allclose(gradient(by_columns), gradient(product), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["stacked", "separate"])
def test_an_expert_of_its_own_on_each_device(mesh, kind: str):
    rng = np.random.default_rng(0)
    raw = blocks_like(rng.standard_normal((2, 128, 256), dtype=np.float32), QType.Q4_0, rng)
    stacked = jax.tree.map(jnp.asarray, FORMATS[QType.Q4_0].from_bytes(raw))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2)]
    w = stacked if kind == "stacked" else SeparateExperts(tuple(each))
    x = jnp.asarray(rng.standard_normal((3, 256), dtype=np.float32))

    def of_own(x, w, expert):
        return matmul_expert(x, w, expert[0])[None]

    in_specs = (P(), P(), P("data"))
    of_each = jax.shard_map(of_own, mesh=mesh, in_specs=in_specs, out_specs=P("data"))

    def found(x):
        return of_each(x, w, jnp.arange(2, dtype=jnp.int32))

    def wanted(x):
        return jnp.stack([ql.matmul(x, one) for one in each])

    def gradient(product):
        return jax.jit(jax.grad(lambda x: (product(x) ** 2).sum()))(x)

    np.testing.assert_allclose(jax.jit(found)(x), jax.jit(wanted)(x), atol=1e-4)
    np.testing.assert_allclose(gradient(found), gradient(wanted), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_matmul_where_the_scales_of_a_packed_weight_alone_vary(mesh, rows: int, activations: Any):
    w, _ = weight("Q4_0", 256, 512)
    x = normal(rows, 512)
    factors = jnp.asarray([1, 2], w.scale.dtype)

    def of_own(x, w, factor):
        scaled = dataclasses.replace(w, scale=w.scale * factor[0])
        return ql.matmul(x, scaled, activations=activations)[None]

    of_each = jax.shard_map(of_own, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P("data"))
    one = multiply(x, w, activations)
    found = jax.jit(of_each)(jnp.asarray(x), w, factors)
    np.testing.assert_allclose(found, np.stack([one, 2 * one]), atol=1e-3)
