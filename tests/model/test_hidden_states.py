"""Hidden states, sites, captures and taps are the reference's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax import model as module
from reference import Reference
from small_model import FLOAT32, ROUNDING, Array, B, D, Hooked, Small, T, errors, hidden_of


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
