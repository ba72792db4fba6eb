"""What `generate` and the pure functions are asked for is looked at before any work is done."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from generation_calls import PROMPTS
from qllama_jax.decoding_arguments import stop_ids
from qllama_jax.row_text import stop_strings
from qllama_jax.sampling_ranges import read_logit_bias
from qllama_jax.session_arguments import keys_of
from reference import Reference


def six_tokens(model, stop_tokens, **fields):
    """Six tokens after the first prompt, jitted."""
    static = ("config", "max_new_tokens", "activations")
    return jax.jit(ql.generate_tokens, static_argnames=static)(
        model.params,
        jnp.asarray([PROMPTS[0]]),
        jnp.asarray([len(PROMPTS[0])], jnp.int32),
        jax.random.key(0),
        config=model.config,
        sampling=ql.Sampling(**fields),
        max_new_tokens=6,
        stop_tokens=stop_tokens,
    )


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([[[1]]], {}, TypeError, "shape"),
        ([], {}, ValueError, "empty"),
        ([[1], []], {}, ValueError, "prompt 1: no tokens"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ([1], {"max_new_tokens": 2.5}, TypeError, "2.5"),
        ([1], {"max_new_tokens": True}, TypeError, "True"),
        ([1], {"seed": -1}, ValueError, "seed=-1"),
        ([1], {"seed": 2**32}, ValueError, "seed=4294967296"),
        ([1], {"seed": [1, 2]}, ValueError, "seed: 2 seeds for 1 rows"),
        ([[1], [2]], {"seed": [1]}, ValueError, "seed: 1 seeds for 2 rows"),
        ([[1], [2]], {"seed": [1, 2**32]}, ValueError, r"seed\[1\]=4294967296"),
        ([[1], [2]], {"seed": [1, True]}, TypeError, r"seed\[1\]=True"),
        ([1], {"seed": "1"}, TypeError, "seed"),
        ([1], {"seed": 1.0}, TypeError, "seed"),
        ([1], {"cache_dtype": "int8"}, ValueError, "cache_dtype='int8': expected float32, bf"),
        ([1], {"cache_dtype": "wide"}, ValueError, "cache_dtype=.wide."),
        ([1], {"top_logprobs": -1}, ValueError, "top_logprobs=-1: expected 0..384"),
        ([1], {"top_logprobs": 385}, ValueError, "top_logprobs=385"),
        ([1], {"top_logprobs": True}, TypeError, "top_logprobs=True"),
        ([1], {"banned_tokens": "ab"}, TypeError, "banned_tokens"),
        ([1], {"banned_tokens": range(384)}, ValueError, "none to choose"),
        ([1], {"logit_bias": {3: float("nan")}}, ValueError, "nan for token 3"),
        ([1], {"logit_bias": {3: 1e39}}, ValueError, "inf for token 3"),
        ([1], {"logit_bias": {3: "1"}}, TypeError, r"logit_bias\[3\]='1'"),
        ([1], {"logit_bias": {3: True}}, TypeError, r"logit_bias\[3\]=True"),
        ([1], {"logit_bias": 2.0}, ValueError, "found 2.0"),
        ([1], {"logit_bias": np.zeros(3), "banned_tokens": [1]}, ValueError, r"shape \(3,\)"),
        ([1], {"penalty_last_n": -2}, ValueError, "penalty_last_n=-2"),
        ([1], {"typical_p": 0}, ValueError, "typical_p=0"),
        ([1], {"repeat_penalty": 1e-46}, ValueError, "repeat_penalty"),
        ([1], {"temperature": 1e300}, ValueError, "temperature"),
        ([1], {"temperature": "warm"}, TypeError, "temperature='warm'"),
        ([1], {"top_k": np.asarray([1, 2])}, ValueError, "top_k.*1 rows"),
        ({"role": "x"}, {}, TypeError, "dict"),
        (b"hello", {}, TypeError, "prompt: .* found bytes"),
        ([b"hello"], {}, TypeError, "prompt 0: .* found bytes"),
        (np.array(5), {}, TypeError, r"prompt: .* found a number, array\(5\)"),
        ([[1, [2]]], {}, TypeError, "prompt 0: .* several lengths or depths"),
        ([1, [2]], {}, TypeError, "prompt: .* several lengths or depths"),
        ([[1], 2], {}, TypeError, "prompt 1: .* found int"),
        ([1, True], {}, TypeError, "prompt: .* bool"),
        (np.ones((2, 0), int), {}, ValueError, "prompt 0: no tokens"),
        ([1], {"seed": np.array([[1]])}, ValueError, r"seed: .* found shape \(1, 1\)"),
        ([1], {"seed": b"1"}, TypeError, "seed=b'1'"),
        ([1], {"seed": np.array(1.5)}, TypeError, "seed="),
        ([1], {"max_new_tokens": np.array([5])}, TypeError, "max_new_tokens"),
        (iter([1, 2]), {}, TypeError, "iterator"),
        (None, {}, TypeError, "NoneType"),
        ([1], {"temperature": -1}, ValueError, "temperature=-1"),
        ([1], {"top_p": 0.0}, ValueError, "top_p=0.0"),
        ([1], {"warmth": 1}, TypeError, "warmth"),
        ([1], {"stop": ""}, ValueError, "stop"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(model, prompt, options, error, message):
    with pytest.raises(error, match=message):
        ql.generate(model, prompt, **options)
    with pytest.raises((error, TypeError)):
        ql.stream(model, prompt, **options)


def test_none_is_no_stop_and_no_ban(model, path):
    options: dict[str, Any] = {"stop": None, "banned_tokens": None, "ignore_eos": True}
    result = ql.generate(model, PROMPTS[0], max_new_tokens=4, **options)
    assert result.tokens == Reference(path).greedy(PROMPTS[0], 4)


@pytest.mark.parametrize(("stop", "kind"), [(5, "int"), (b"ab", "bytes"), ([5], "int")])
def test_a_stop_that_is_no_text_is_refused_by_its_kind(stop, kind):
    unchecked: Any = inspect.unwrap(stop_strings)  # types are checked in tests alone
    with pytest.raises(TypeError, match=f"^stop: expected .*, found {kind}$"):
        unchecked(stop)


def test_a_ban_that_is_no_list_is_refused_by_its_kind():
    unchecked: Any = inspect.unwrap(read_logit_bias)
    with pytest.raises(TypeError, match=r"^banned_tokens: expected token ids, found int$"):
        unchecked(0.0, 5, 384, 1)


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray])
def test_seeds_of_any_kind_are_the_keys_of_the_rows_alone(kind):
    keys = keys_of(kind([1, 7]), 2)
    for key, seed in zip(keys, (1, 7), strict=True):
        expected = jax.random.fold_in(jax.random.key(seed), 0)
        assert jax.random.key_data(key).tolist() == jax.random.key_data(expected).tolist()
    number: Any = 7 if kind is list else kind(7)
    expected = jax.random.fold_in(jax.random.key(7), 0)
    assert jax.random.key_data(keys_of(number, 1)).tolist() == [
        jax.random.key_data(expected).tolist()
    ]


BAD_SAMPLING: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"temperature": -1.0}, "temperature=-1.0"),
    "nan": ({"temperature": float("nan")}, "temperature=nan"),
    "of a row": ({"top_p": np.asarray([0.5, np.nan], np.float32)}, "top_p="),
    "jax's": ({"repeat_penalty": jnp.asarray(0.0)}, "repeat_penalty="),
    "rows": ({"top_k": np.asarray([1, 2, 3])}, r"top_k: \(3,\) numbers for 2 rows"),
    "bias": ({"logit_bias": np.zeros(7, np.float32)}, r"logit_bias: .* found shape \(7,\)"),
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_the_pure_functions_refuse_concrete_parameters_out_of_range(model, name):
    fields, message = BAD_SAMPLING[name]
    sampling = ql.Sampling(**fields)
    cache = ql.init_cache(model.config, 2, 8)
    recent = jnp.full((2, 64), -1, jnp.int32)
    keys, none = ql.row_keys(jax.random.key(0), 2), jnp.zeros((0,), jnp.int32)
    with pytest.raises(ValueError, match=f"^{message}"):
        ql.start_decoding(jnp.zeros((2, 384)), cache, recent, keys, sampling, none)
    zeros = jnp.zeros((2,), jnp.int32)
    state = ql.DecodeState(cache, zeros, recent, keys, zeros, zeros)
    options: dict[str, Any] = {"config": model.config, "max_steps": 1}
    with pytest.raises(ValueError, match=f"^{message}"):
        ql.decode_many(model.params, state, sampling, none, 1, **options)


def test_a_traced_bias_of_another_shape_is_refused_by_its_name(model):
    with pytest.raises(ValueError, match=r"^logit_bias: .* \(1, 384\), found shape \(1, 7\)"):
        six_tokens(model, [], logit_bias=jnp.zeros((1, 7)))


def test_stop_tokens_may_be_a_list(model, path):
    tokens = Reference(path).greedy(PROMPTS[0], 6)
    end = tokens.index(tokens[3]) + 1
    for stop, length in (([383, tokens[3]], end), ([], 6)):
        out = six_tokens(model, stop)
        assert out.tokens[0, : int(out.lengths[0])].tolist() == tokens[:length]


@pytest.mark.parametrize("stop", [frozenset({5}), 5, [1.5], [[1]], [True], np.int32(5)], ids=str)
def test_stop_tokens_that_are_no_list_of_ids_are_refused(stop):
    with pytest.raises(TypeError, match=r"^stop_tokens: expected a list of ids or int32\[K\], fo"):
        stop_ids(stop, 384)


def test_a_history_of_other_rows_is_refused():
    unchecked: Any = inspect.unwrap(ql.recent_tokens)
    for shape in ((2, 5), (5,)):
        with pytest.raises(ValueError, match=r"history of shape .*: expected \(3, H\)"):
            unchecked(jnp.ones((3, 4), jnp.int32), jnp.full((3,), 4), jnp.zeros(shape, jnp.int32))


def test_a_prompt_without_tokens_is_refused_by_the_pure_function(model):
    with pytest.raises(ValueError, match="0 tokens a row"):
        ql.generate_tokens(
            model.params,
            jnp.zeros((1, 0), jnp.int32),
            jnp.zeros((1,), jnp.int32),
            jax.random.key(0),
            config=model.config,
            sampling=ql.Sampling(),
            max_new_tokens=1,
            stop_tokens=[],
        )
