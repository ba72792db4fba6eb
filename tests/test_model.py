"""forward is the float64 reference, and keeps its laws in every use.

Most laws use one small model of two layers, whose vocabulary (389) and feed-forward (96) are odd
sizes and whose two query heads share a key-value head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from matrix import SMALL, V
from qllama_jax import model as module
from reference import Past, Reference
from tiny import write_tiny_llama

# float32 against float64, max|a - b| / max|b| over the vocabulary of one position.
FLOAT32 = 1e-5
# The same computation in another order of sums.
ROUNDING = 2e-6

D, B, T, S = SMALL["embed"], 3, 8, 32

Array = np.ndarray
Hook = Callable[[str, Array], Array]


class Hooked(Reference):
    """The reference with a function at every named activation, like `tap`; and given embeddings."""

    hook: Hook = staticmethod(lambda _, x: x)
    embeddings: Array | None = None

    def _forward(self, tokens: Any, past: Past) -> Array:
        return self._norm("output_norm", self.stream(tokens, past))

    def stream(self, tokens: Any, past: Past | None = None) -> Array:
        """Residual stream [T, D] after the last block."""
        past = self._nothing() if past is None else past
        x = self._embed(np.asarray(tokens)) if self.embeddings is None else self.embeddings
        for i in range(self.num_layers):
            at = functools.partial(self._at, i)
            x = at("in", x)
            y = at("attn_norm", self._norm(f"blk.{i}.attn_norm", x))
            x = at("mid", x + at("attn_out", self._attention(i, y, past)))
            y = at("ffn_norm", self._norm(f"blk.{i}.ffn_norm", x))
            x = at("out", x + at("ffn_out", self._feed_forward(i, y)))
        return x

    def _at(self, i: int, site: str, x: Array) -> Array:
        return self.hook(f"blk.{i}.{site}", x)


class Small:
    """The small model, its reference, and jitted functions that all laws share."""

    def __init__(self, path: Path) -> None:
        model = ql.load(path)
        self.path, self.params, self.config = path, model.params, model.config
        self.tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
        wanted = Reference(path)
        self.wanted = np.stack([wanted.logits(row) for row in self.tokens])

    def cache(self, rows: int = B, room: int = S, dtype: Any = jnp.float32) -> ql.KVCache:
        return ql.init_cache(self.config, rows, room, dtype)

    def forward(
        self, tokens: Any, cache: ql.KVCache | None = None, lengths: Any = None
    ) -> tuple[Array, ql.KVCache]:
        tokens = jnp.asarray(tokens, jnp.int32)
        cache = self.cache(len(tokens)) if cache is None else cache
        lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
        logits, after = ql.forward(
            self.params, tokens, cache, config=self.config, lengths=jnp.asarray(lengths, jnp.int32)
        )
        return np.asarray(logits), after

    def logits_of(self, hidden: jax.Array) -> Array:
        return np.asarray(ql.unembed(self.params, hidden, config=self.config))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    return Small(write_tiny_llama(folder / "small.gguf", "Q8_0", **SMALL))


def errors(found: Any, wanted: Any) -> Array:
    """Relative error max|a - b| / max|b| of each position."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)


# forward = reference, for every row; for every kind of file in test_matrix.py


def test_every_row_of_a_batch_equals_the_reference(small: Small):
    logits, cache = small.forward(small.tokens)
    assert errors(logits, small.wanted).max() <= FLOAT32
    assert logits.dtype == np.float32
    assert cache.lengths.tolist() == [T] * B


# Prefill, decode, rows and padding


@pytest.mark.parametrize(
    "split", [(1,) * 8, (4, 4), (1, 4, 1, 1, 1), (4, 1, 1, 1, 1), (1, 1, 4, 1, 1)]
)
def test_any_split_into_calls_equals_one_call(small: Small, split: tuple[int, ...]):
    assert sum(split) == T
    cache, parts, at = small.cache(), [], 0
    for size in split:
        logits, cache = small.forward(small.tokens[:, at : at + size], cache)
        parts.append(logits)
        at += size
        assert cache.lengths.tolist() == [at] * B
    found = np.concatenate(parts, axis=1)
    whole, _ = small.forward(small.tokens)
    assert errors(found, whole).max() <= ROUNDING
    assert errors(found, small.wanted).max() <= FLOAT32


def test_rows_of_different_lengths_go_on_from_where_each_ended(small: Small):
    first, second = np.asarray([3, 0, 4]), np.asarray([4, 1, 0])
    reference = Reference(small.path)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, V, (2, B, 4)).astype(np.int32)
    a, cache = small.forward(tokens[0], lengths=first)
    assert cache.lengths.tolist() == first.tolist()
    b, cache = small.forward(tokens[1], cache, lengths=second)
    assert cache.lengths.tolist() == (first + second).tolist()
    for row in range(B):
        one, two = first[row], second[row]
        wanted = reference.logits([*tokens[0, row, :one], *tokens[1, row, :two]])
        found = np.concatenate([a[row, :one], b[row, :two]])
        assert errors(found, wanted).max() <= FLOAT32


def test_a_row_in_a_batch_equals_that_row_alone(small: Small):
    together, _ = small.forward(small.tokens)
    for row in range(B):
        alone, _ = small.forward(small.tokens[row : row + 1])
        assert errors(together[row], alone[0]).max() <= ROUNDING


def test_what_padding_holds_changes_no_bit(small: Small):
    lengths = np.asarray([3, 8, 5])
    padding = np.arange(T)[None] >= lengths[:, None]
    results = []
    for content in (0, 7, -1, V, 2**31 - 1, -(2**31)):
        tokens = np.where(padding, content, small.tokens)
        logits, cache = small.forward(tokens, lengths=lengths)
        results.append((logits[~padding], *map(np.asarray, jax.tree.leaves(cache))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert errors(results[0][0], small.wanted[~padding]).max() <= FLOAT32


def test_a_token_changes_no_logit_before_it_and_every_one_after(small: Small):
    before, _ = small.forward(small.tokens)
    for j in (1, 4, 7):
        tokens = small.tokens.copy()
        tokens[:, j] = (tokens[:, j] + 1) % V
        after, _ = small.forward(tokens)
        np.testing.assert_array_equal(after[:, :j], before[:, :j])
        assert (np.abs(after[:, j:] - before[:, j:]).max(axis=-1) > 1e-4).all()


def test_the_same_call_gives_the_same_bits_and_leaves_its_cache_usable(small: Small):
    _, cache = small.forward(small.tokens[:, :4])
    kept = [np.array(leaf) for leaf in jax.tree.leaves(cache)]
    first, _ = small.forward(small.tokens[:, 4:], cache)
    second, _ = small.forward(small.tokens[:, 4:], cache)
    np.testing.assert_array_equal(first, second)
    for leaf, old in zip(jax.tree.leaves(cache), kept, strict=True):
        assert not leaf.is_deleted()
        np.testing.assert_array_equal(leaf, old)


def test_other_tokens_lengths_and_positions_trace_nothing_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
):
    traces = []
    real = module.rope_cos_sin
    monkeypatch.setattr(module, "rope_cos_sin", lambda *a: traces.append(1) or real(*a))
    tokens = np.full((B, 6), 5)
    _, cache = small.forward(tokens)
    assert len(traces) == 1
    for lengths in ([1, 6, 0], [2, 2, 2]):
        _, cache = small.forward(tokens + 1, cache, lengths)
    assert len(traces) == 1


def test_a_bfloat16_cache_changes_logits_by_at_most_1_percent(small: Small):
    logits, cache = small.forward(small.tokens, small.cache(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}
    error = errors(logits, small.wanted)
    assert error.max() <= 1e-2  # bfloat16 keeps 8 bits
    assert error.max() > 1e-4


def test_bfloat16_activations_change_logits_by_at_most_4_percent(small: Small):
    logits, cache = ql.forward(
        small.params,
        jnp.asarray(small.tokens),
        small.cache(dtype=jnp.bfloat16),
        config=small.config,
        dtype=jnp.bfloat16,
    )
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}
    error = errors(logits, small.wanted)
    assert error.max() <= 4e-2  # every residual keeps 8 bits
    assert error.max() > 2e-3


def test_all_activations_have_the_dtype_that_is_asked_for(small: Small):
    names = ql.sites(small.config)

    def captured(dtype: Any) -> set[Any]:
        hidden, _, aux = jax.eval_shape(
            functools.partial(ql.hidden_states, config=small.config, capture=names, dtype=dtype),
            small.params,
            jnp.asarray(small.tokens),
            small.cache(dtype=dtype),
        )
        return {hidden.dtype, *(aux[name].dtype for name in names)}

    assert captured(jnp.bfloat16) == {jnp.dtype(jnp.bfloat16)}
    assert captured(jnp.float32) == {jnp.dtype(jnp.float32)}


def test_a_dtype_that_is_none_of_the_two_is_refused(small: Small):
    with pytest.raises(ValueError, match=r"float16.*: expected float32 or bfloat16"):
        ql.forward(
            small.params,
            jnp.asarray(small.tokens),
            small.cache(),
            config=small.config,
            dtype=jnp.float16,
        )


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 2), ("cuda", 0), ("tpu", 0)])
def test_a_layer_is_kept_a_call_on_a_cpu_alone(small: Small, platform: str, calls: int):
    # XLA's GPU compiler fuses nothing in what it may not inline.
    arguments = small.params, jnp.asarray(small.tokens), small.cache()
    traced = jax.jit(functools.partial(ql.forward, config=small.config)).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    apart = [line for line in text.splitlines() if "inlineable" in line]
    assert sum("call @run_block(" in line for line in apart) == calls
    assert bool(apart) == bool(calls)


# Hidden states, sites, captures and taps


def hidden_of(small: Small, **options: Any) -> tuple[jax.Array, ql.KVCache, dict[str, jax.Array]]:
    tokens = options.pop("tokens", small.tokens)
    return ql.hidden_states(
        small.params,
        None if tokens is None else jnp.asarray(tokens),
        options.pop("cache", small.cache()),
        config=small.config,
        **options,
    )


def test_forward_is_hidden_states_then_unembed_of_all_or_of_the_last(small: Small):
    logits, _ = small.forward(small.tokens)
    hidden, cache, captured = hidden_of(small)
    assert (hidden.shape, captured) == ((B, T, D), {})
    assert cache.lengths.tolist() == [T] * B
    assert errors(small.logits_of(hidden), logits).max() <= ROUNDING
    assert errors(small.logits_of(hidden[:, -1]), logits[:, -1]).max() <= ROUNDING
    assert errors(small.logits_of(hidden[1, 2]), logits[1, 2]).max() <= ROUNDING


def test_sites_are_seven_a_block_in_the_order_in_which_a_tap_sees_them(small: Small):
    seen: list[str] = []

    def tap(name: str, x: jax.Array) -> jax.Array:
        assert x.shape == (B, T, D)
        seen.append(name)
        return x

    hidden_of(small, tap=tap)
    kinds = ("in", "attn_norm", "attn_out", "mid", "ffn_norm", "ffn_out", "out")
    assert ql.sites(small.config) == tuple(f"blk.{i}.{kind}" for i in (0, 1) for kind in kinds)
    assert tuple(seen) == ql.sites(small.config)


def test_captures_equal_the_reference_at_every_site(small: Small):
    names = ql.sites(small.config)
    hidden, _, captured = hidden_of(small, capture=names)
    assert set(captured) == set(names)
    wanted: dict[str, list[Array]] = {name: [] for name in names}
    reference = Hooked(small.path)

    def keep(name: str, x: Array) -> Array:
        wanted[name].append(x)
        return x

    reference.hook = keep
    streams = np.stack([reference.stream(row) for row in small.tokens])
    assert errors(hidden, streams).max() <= FLOAT32
    for name in names:
        assert errors(captured[name], np.stack(wanted[name])).max() <= FLOAT32, name


def test_captures_add_up_along_the_residual_stream(small: Small):
    hidden, _, x = hidden_of(small, capture=ql.sites(small.config))
    for i in (0, 1):
        block = f"blk.{i}."
        mid = np.asarray(x[block + "in"]) + np.asarray(x[block + "attn_out"])
        np.testing.assert_array_equal(x[block + "mid"], mid)
        out = mid + np.asarray(x[block + "ffn_out"])
        np.testing.assert_array_equal(x[block + "out"], out)
    np.testing.assert_array_equal(x["blk.0.out"], x["blk.1.in"])
    np.testing.assert_array_equal(x["blk.1.out"], hidden)
    np.testing.assert_array_equal(
        x["blk.0.in"], module.embed(small.params, jnp.asarray(small.tokens))
    )


def test_a_capture_is_the_activation_after_its_tap(small: Small):
    name = "blk.1.attn_out"
    _, _, captured = hidden_of(small, capture=[name], tap=lambda n, x: x * 0 if n == name else x)
    assert list(captured) == [name]
    np.testing.assert_array_equal(captured[name], np.zeros((B, T, D)))


def test_a_tap_that_changes_nothing_leaves_every_bit_but_for_fusion(small: Small):
    plain, cache, _ = hidden_of(small)
    tapped, tapped_cache, _ = hidden_of(small, tap=lambda _, x: x)
    assert errors(tapped, plain).max() <= ROUNDING
    for a, b in zip(jax.tree.leaves(tapped_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * 10)


def test_blocks_whose_outputs_are_zeroed_leave_the_embedding(small: Small):
    def silence(name: str, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if name.endswith(("attn_out", "ffn_out")) else x

    hidden, _, _ = hidden_of(small, tap=silence)
    embedding = module.embed(small.params, jnp.asarray(small.tokens))
    np.testing.assert_array_equal(hidden, embedding)


def test_a_vector_added_at_any_site_acts_as_in_the_reference(small: Small):
    vector = np.random.default_rng(3).standard_normal(D)
    tokens = small.tokens[:1]

    @functools.partial(jax.jit, static_argnames="site")
    def steered(site: str) -> jax.Array:
        def tap(name: str, x: jax.Array) -> jax.Array:
            steer = jnp.asarray(vector, jnp.float32)
            return x + steer[None, None] if name == site else x

        return hidden_of(small, tokens=tokens, cache=small.cache(1), tap=tap)[0]

    plain = np.asarray(hidden_of(small, tokens=tokens, cache=small.cache(1))[0])
    for site in ("in", "attn_norm", "attn_out", "mid", "ffn_norm", "ffn_out", "out"):
        name = f"blk.0.{site}"
        reference = Hooked(small.path)
        reference.hook = lambda n, x, name=name: x + vector if n == name else x
        found = np.asarray(steered(name))
        assert errors(found[0], reference.stream(tokens[0])).max() <= FLOAT32, name
        assert errors(found[0], plain[0]).min() > 1e-2, name


def test_an_unknown_site_is_refused(small: Small):
    for name in ("blk.2.out", "blk.0.nothing", "output"):
        with pytest.raises(
            ValueError, match=f"no site '{name}'; there are blk.0 to blk.1 with in, "
        ):
            hidden_of(small, capture=["blk.0.out", name])


def test_embeddings_of_the_tokens_as_inputs_equal_the_tokens(small: Small):
    embedding = module.embed(small.params, jnp.asarray(small.tokens))
    reference = Reference(small.path)
    np.testing.assert_array_equal(
        embedding, np.stack([reference._embed(row) for row in small.tokens])
    )
    plain, cache, _ = hidden_of(small)
    for tokens in (None, np.zeros_like(small.tokens)):  # tokens beside embeddings are not looked at
        given, given_cache, _ = hidden_of(small, tokens=tokens, inputs_embeds=embedding)
        np.testing.assert_array_equal(given, plain)
        for a, b in zip(jax.tree.leaves(given_cache), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(a, b)


# Gradients: float32 against central differences of the reference in float64

PREFIX, SUFFIX = 3, 4
GRADIENT = 2e-5  # relative to the largest component


class Differentiated:
    """A loss of the small model and of its reference after a prefix: a weighted sum of logits."""

    def __init__(self, small: Small, prefix: int) -> None:
        rng = np.random.default_rng(5)
        self.small, self.prefix = small, small.tokens[0, :prefix]
        self.embeddings = 0.2 * rng.standard_normal((SUFFIX, D))
        self.cotangent = rng.standard_normal((SUFFIX, V))
        self.reference = Hooked(small.path)
        self.past = self.reference._nothing()
        if prefix:
            self.reference.stream(self.prefix, self.past)

    def wanted(self, embeddings: Array) -> float:
        self.reference.embeddings = embeddings
        hidden = self.reference._forward(None, list(self.past))
        return float((self.reference.unembed(hidden) * self.cotangent).sum())

    def found(self, embeddings: jax.Array, steer: jax.Array, cache: ql.KVCache) -> jax.Array:
        hidden, _, _ = ql.hidden_states(
            self.small.params,
            None,
            cache,
            config=self.small.config,
            inputs_embeds=embeddings[None],
            tap=lambda name, x: x + steer[None, None] if name == "blk.0.attn_out" else x,
        )
        logits = ql.unembed(self.small.params, hidden, config=self.small.config)
        return jnp.sum(logits[0] * jnp.asarray(self.cotangent, jnp.float32))

    def gradients(self) -> tuple[Array, Array]:
        """Of the embeddings, and of a steering vector."""
        cache = self.small.cache(1)
        if len(self.prefix):
            _, cache = self.small.forward(self.prefix[None], cache)
        embeddings, steer = jnp.asarray(self.embeddings, jnp.float32), jnp.zeros(D)
        both = jax.jit(jax.grad(self.found, argnums=(0, 1)))(embeddings, steer, cache)
        return np.asarray(both[0]), np.asarray(both[1])


def central_differences(f: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    gradient = np.zeros(x.size)
    for i in range(x.size):
        shift = np.zeros(x.size)
        shift[i] = step
        shift = shift.reshape(x.shape)
        gradient[i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient.reshape(x.shape)


@pytest.fixture(scope="module", params=[0, PREFIX], ids=["no_prefix", "cached_prefix"])
def differentiated(small: Small, request: pytest.FixtureRequest) -> Differentiated:
    return Differentiated(small, request.param)


def test_gradients_equal_differences_of_the_float64_reference(differentiated: Differentiated):
    case = differentiated
    by_embeddings, by_steer = case.gradients()
    wanted = central_differences(case.wanted, case.embeddings)
    assert np.abs(wanted).max() > 0.1
    assert np.abs(by_embeddings - wanted).max() / np.abs(wanted).max() <= GRADIENT

    def steered(vector: Array) -> float:
        hook = case.reference.hook
        case.reference.hook = lambda n, x: x + vector if n == "blk.0.attn_out" else x
        result = case.wanted(case.embeddings)
        case.reference.hook = hook
        return result

    wanted = central_differences(steered, np.zeros(D))
    assert np.abs(wanted).max() > 0.1
    assert np.abs(by_steer - wanted).max() / np.abs(wanted).max() <= GRADIENT


def test_a_gradient_keeps_no_scores_of_attention(tiny_llama: Any):
    T, heads = 512, 4

    def temp_bytes(layers: int) -> int:
        model = ql.load(tiny_llama(layers=layers, context_length=T), layout="file")

        def loss(embeddings: jax.Array) -> jax.Array:
            cache = ql.init_cache(model.config, 1, T)
            hidden, _, _ = ql.hidden_states(
                model.params, None, cache, config=model.config, inputs_embeds=embeddings
            )
            return (hidden**2).mean()

        embeddings = jax.ShapeDtypeStruct((1, T, model.config.embed_dim), jnp.float32)
        analysis = jax.jit(jax.grad(loss)).lower(embeddings).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Of some arrays of scores, [heads, T, T], that a layer computes; kept, they were five.
    assert temp_bytes(4) - temp_bytes(2) < 2 * 2.5 * (4 * heads * T * T)


# jit, vmap, scan


def test_forward_nests_in_jit(small: Small):
    @jax.jit
    def nested(tokens: jax.Array, cache: ql.KVCache) -> jax.Array:
        logits, _ = ql.forward(small.params, tokens, cache, config=small.config)
        return logits * 2

    found = nested(jnp.asarray(small.tokens), small.cache())
    assert errors(found, 2 * small.wanted).max() <= FLOAT32


def test_vmap_over_rows_equals_the_batch(small: Small):
    lengths = np.asarray([8, 3, 5], np.int32)

    def one(row: jax.Array, length: jax.Array, cache: ql.KVCache) -> tuple[jax.Array, ql.KVCache]:
        return ql.forward(small.params, row[None], cache, config=small.config, lengths=length[None])

    caches = jax.tree.map(lambda x: jnp.stack([x] * B), small.cache(1))
    logits, caches = jax.vmap(one)(jnp.asarray(small.tokens), jnp.asarray(lengths), caches)
    batch, cache = small.forward(small.tokens, lengths=lengths)
    assert caches.lengths[:, 0].tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        assert errors(logits[row, 0, :length], batch[row, :length]).max() <= ROUNDING
    for a, b in zip((*caches.k, *caches.v), (*cache.k, *cache.v), strict=True):
        np.testing.assert_allclose(a[:, 0], b, rtol=0, atol=1e-5)


def test_a_scan_over_tokens_equals_one_call(small: Small):
    def step(cache: ql.KVCache, token: jax.Array) -> tuple[ql.KVCache, jax.Array]:
        logits, cache = ql.forward(small.params, token[:, None], cache, config=small.config)
        return cache, logits[:, 0]

    cache, logits = jax.lax.scan(step, small.cache(), jnp.asarray(small.tokens.T))
    assert cache.lengths.tolist() == [T] * B
    assert errors(jnp.swapaxes(logits, 0, 1), small.wanted).max() <= FLOAT32


# Poison


def assert_only_row_is_poisoned(
    row: int, found: tuple[Array, ql.KVCache], healthy: tuple[Array, ql.KVCache], before: ql.KVCache
) -> None:
    """Its logits are NaN and its cache is as before; the others' bits are those of `healthy`."""
    logits, cache = found
    others = [other for other in range(B) if other != row]
    assert np.isnan(logits[row]).all()
    np.testing.assert_array_equal(logits[others], healthy[0][others])
    lengths, wanted = np.asarray(cache.lengths), np.asarray(healthy[1].lengths)
    assert lengths[row] > cache.max_length
    assert lengths[others].tolist() == wanted[others].tolist()
    for new, old in zip((*cache.k, *cache.v), (*before.k, *before.v), strict=True):
        np.testing.assert_array_equal(new[row], old[row])
    for new, other in zip((*cache.k, *cache.v), (*healthy[1].k, *healthy[1].v), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[others], np.asarray(other)[others])


@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("at", [0, 3])
def test_an_id_outside_the_vocabulary_poisons_its_row_alone_for_good(
    small: Small, bad: int, at: int
):
    _, before = small.forward(small.tokens[:, :4])
    tokens = small.tokens[:, 4:].copy()
    healthy = small.forward(tokens, before)
    tokens[1, at] = bad
    found = small.forward(tokens, before)
    assert_only_row_is_poisoned(1, found, healthy, before)
    # And in the next call, whatever it holds.
    again, healthy_again = (small.forward(small.tokens[:, :4], x[1]) for x in (found, healthy))
    assert_only_row_is_poisoned(1, again, healthy_again, before)


def test_the_largest_and_smallest_ids_are_no_poison(small: Small):
    tokens = np.asarray([[0, V - 1, 0, V - 1]])
    logits, _ = small.forward(tokens)
    assert errors(logits[0], Reference(small.path).logits(tokens[0])).max() <= FLOAT32


def test_a_position_past_the_end_poisons_its_row_alone_for_good(small: Small):
    room = 10
    _, before = small.forward(small.tokens, small.cache(room=room), [8, 7, 2])
    tokens = small.tokens[:, :3]
    healthy = small.forward(tokens, before, [2, 3, 3])
    assert healthy[1].lengths.tolist() == [10, 10, 5]
    assert np.isfinite(healthy[0][0, :2]).all()
    assert np.isfinite(healthy[0][1:]).all()
    found = small.forward(tokens, before, [3, 3, 3])
    assert_only_row_is_poisoned(0, found, healthy, before)
    lengths = [0, 0, 3]  # nothing of its own: still poisoned
    again, healthy_again = (small.forward(tokens, x[1], lengths) for x in (found, healthy))
    assert_only_row_is_poisoned(0, again, healthy_again, before)


@pytest.mark.parametrize("length", [-1, T + 1, 2**31 - 1, -(2**31)])
def test_a_length_outside_0_to_T_poisons_its_row_alone(small: Small, length: int):
    before = small.cache()
    healthy = small.forward(small.tokens, before, [5, 8, 8])
    found = small.forward(small.tokens, before, [5, 8, length])
    assert_only_row_is_poisoned(2, found, healthy, before)


def test_a_poisoned_row_is_whole_again_when_its_length_is_set_back(small: Small):
    wanted, before = small.forward(small.tokens[:, :4])
    bad = small.tokens[:, 4:].copy()
    bad[1, 0] = -1
    _, poisoned = small.forward(bad, before)
    healed = replace(poisoned, lengths=jnp.asarray([4, 4, 4], jnp.int32))
    logits, _ = small.forward(small.tokens[:, 4:], healed)
    assert errors(logits, small.wanted[:, 4:]).max() <= FLOAT32
    assert errors(wanted, small.wanted[:, :4]).max() <= FLOAT32


@pytest.mark.parametrize(("filled", "more"), [(0, 100), (0, 120), (100, 20), (119, 1)])
def test_padding_that_reaches_past_the_end_is_right_where_the_tokens_fit(
    small: Small, filled: int, more: int
):
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, V, (1, filled + 128)).astype(np.int32)
    results = []
    for room in (120, 256):
        cache = small.cache(1, room)
        if filled:
            _, cache = small.forward(tokens[:, :128], cache, [filled])
        logits, cache = small.forward(tokens[:, filled:], cache, [more])
        assert cache.lengths.tolist() == [filled + more]
        keys = np.asarray(cache.k[1])[..., : filled + more]
        values = np.asarray(cache.v[1])[:, :, : filled + more]
        results.append((logits[0, :more], keys[0], values[0]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * np.abs(b).max())


# Shapes that do not fit


def test_shapes_that_do_not_fit_are_refused(small: Small):
    tokens = jnp.asarray(small.tokens)
    forward = functools.partial(ql.forward, small.params, config=small.config)
    with pytest.raises(ValueError, match="3 rows of tokens need a cache of 2 layers of"):
        forward(tokens, small.cache(2))
    with pytest.raises(ValueError, match="8 tokens a row do not fit a cache of 7 positions"):
        forward(tokens, small.cache(room=7))
    with pytest.raises(ValueError, match="0 tokens a row, expected at least 1"):
        forward(tokens[:, :0], small.cache())
    with pytest.raises(ValueError, match="neither tokens nor inputs_embeds"):
        hidden_of(small, tokens=None)
    with pytest.raises(
        ValueError, match=r"inputs_embeds of shape \(3, 8, 63\), wanted \(3, 8, 64\)"
    ):
        hidden_of(small, inputs_embeds=jnp.zeros((B, T, D - 1)))
    cache = small.cache()
    for k in (cache.k[:1], (*cache.k, cache.k[0]), tuple(x[:, :1] for x in cache.k)):
        with pytest.raises(
            ValueError, match=r"need a cache of 2 layers of \(3, 2, 16, 32\), found"
        ):
            forward(tokens, replace(cache, k=k))


# What a profile shows


def test_lowered_text_names_the_spans_of_the_model(small: Small):
    lowered = ql.forward.lower(
        small.params, jnp.asarray(small.tokens), small.cache(), config=small.config
    )
    text = lowered.as_text(debug_info=True)
    for span in ("attn/", "attn/rope/", "mlp/", "output/"):
        assert f'"{span}' in text or f"/{span}" in text, span
