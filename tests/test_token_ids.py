"""No token id outside the vocabulary is used, clamped or wrapped: it is refused with its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.decoding_arguments import stop_ids
from qllama_jax.sampling_ranges import read_logit_bias

V = 97
OUTSIDE = [-1, V, 2**31, 2**32 + 5, -(2**31), 2**63 - 1]
NO_IDS: list[Any] = [5.0, True, np.True_, np.float32(5), "5", None, [5]]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> ql.Model:
    small: dict[str, Any] = {"layers": 1, "embed": 32, "ffn": 32, "heads": 2, "kv_heads": 1}
    return ql.load(tiny_llama("F32", vocab=V, tokenizer=None, **small))


#: Whatever takes a list of token ids, and how its errors call it.
LISTS: dict[str, tuple[str, Callable[[ql.Model, Any], Any]]] = {
    "generate": ("prompt", ql.generate),
    "a batch": ("prompt 1", lambda model, ids: ql.generate(model, [[1, 2], ids])),
    "stream": ("prompt", ql.stream),
    "score": ("prompt", ql.score),
    "perplexity": ("tokens", lambda model, ids: ql.perplexity(model, ids, context=4)),
    # Types are checked in tests alone: here is what is looked at without that.
    "stop tokens": ("stop_tokens", lambda model, ids: stop_ids(ids, model.config.vocab_size)),
    "banned tokens": (
        "banned_tokens",
        lambda model, ids: inspect.unwrap(read_logit_bias)(0.0, ids, V, 1),
    ),
}
each_list = pytest.mark.parametrize("name", LISTS)


@each_list
@pytest.mark.parametrize("kind", [list, np.asarray])
def test_an_id_outside_the_vocabulary_is_refused_with_the_id(
    model: ql.Model, name: str, kind: Callable[[list[int]], Any]
):
    called, function = LISTS[name]
    for bad in OUTSIDE:
        place = "" if name == "banned tokens" else " at index 2"
        wanted = rf"^{called}: token id {bad}{place} is outside the vocabulary 0\.\.96$"
        with pytest.raises(ValueError, match=wanted):
            function(model, kind([0, V - 1, bad]))


@each_list
def test_what_is_no_id_is_refused_by_its_kind(model: ql.Model, name: str):
    called, function = LISTS[name]
    for bad in NO_IDS:
        with pytest.raises(TypeError, match=f"^{called}: expected "):
            function(model, [5, bad])
    for array in (np.ones(3, np.float32), np.ones(3, bool), np.ones((2, 2, 2), int)):
        with pytest.raises(TypeError, match=rf"^{called}( 0)?: expected "):
            function(model, array)


@pytest.mark.parametrize("name", [name for name in LISTS if not name.endswith("tokens")])
def test_no_ids_are_no_prompt(model: ql.Model, name: str):
    called, function = LISTS[name]
    for none in ([], np.zeros(0, np.int32)):
        with pytest.raises(ValueError, match=f"^{called}: (empty|no tokens)$"):
            function(model, none)


@pytest.mark.parametrize("bad", [*OUTSIDE, *NO_IDS[:-1]], ids=str)
def test_so_are_the_keys_of_a_bias(model: ql.Model, bad: Any):
    error = ValueError if type(bad) is int else TypeError
    with pytest.raises(
        error, match=r"^logit_bias: .*(is outside the vocabulary 0\.\.96|token ids)"
    ):
        ql.generate(model, [1], logit_bias={3: 1.0, bad: 1.0})


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray, np.uint32, np.int64])
def test_stop_tokens_at_both_ends_of_the_vocabulary_are_kept(kind: Callable[[list[int]], Any]):
    found = stop_ids(kind([0, V - 1]), V)
    assert (found.tolist(), found.dtype) == ([0, V - 1], np.int32)
    assert jax.jit(lambda stop: stop_ids(stop, V))(np.asarray([0, V - 1])).tolist() == [0, V - 1]


def test_the_pure_functions_look_at_concrete_stop_tokens(model: ql.Model):
    tokens, one = jnp.ones((1, 4), jnp.int32), jnp.asarray([4], jnp.int32)
    key, cache = jax.random.key(0), ql.init_cache(model.config, 1, 8)
    recent, keys = jnp.full((1, 64), -1, jnp.int32), ql.row_keys(key, 1)
    state = ql.DecodeState(cache, one, recent, keys, one, one)
    options: dict[str, Any] = {"config": model.config, "stop_tokens": [0, V]}
    greedy = ql.Sampling()
    for call in (
        lambda: ql.generate_tokens(
            model.params, tokens, one, key, sampling=greedy, max_new_tokens=2, **options
        ),
        lambda: ql.start_decoding(jnp.zeros((1, V)), cache, recent, keys, greedy, [0, V]),
        lambda: ql.decode_many(model.params, state, greedy, steps=1, max_steps=1, **options),
    ):
        with pytest.raises(ValueError, match=r"^stop_tokens: token id 97 at index 1 is outside"):
            call()
