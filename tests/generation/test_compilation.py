"""What a generation compiles: few traces, and a step that writes to the cache in place."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from generation_calls import FAR, PROMPTS
from qllama_jax import decoding, layerwise, session
from qllama_jax.matmul import cpu

TRACED = layerwise._enter, layerwise._layer, layerwise._logits, session._start, session._decode


def trace_counts() -> tuple[int, ...]:
    # jax's own counter, which its type stubs leave out
    return tuple(getattr(f, "_cache_size")() for f in TRACED)  # noqa: B009


def test_sampling_parameters_and_steps_compile_nothing_again(model):
    for temperature, top_k in ((0.0, 0), (0.5, 3), (1, 40)):
        ql.generate(model, PROMPTS[0], max_new_tokens=9, temperature=temperature, top_k=top_k)
    sizes = trace_counts()
    ql.generate(model, PROMPTS[0], max_new_tokens=17, seed=5, temperature=2, top_p=0.5, min_p=0.2)
    ql.generate(model, PROMPTS[0], max_new_tokens=17, seed=[5], **FAR, penalty_last_n=9)
    assert trace_counts() == sizes


def test_biases_and_bans_compile_nothing_again_once_there_is_one(model):
    ql.generate(model, PROMPTS[0], max_new_tokens=9, banned_tokens=[3])
    sizes = trace_counts()
    cases: tuple[dict[str, Any], ...] = (
        {"banned_tokens": [5, 6, 7]},
        {"logit_bias": {1: 2.5, 300: -1e9}},
        {"logit_bias": np.linspace(-1, 1, 384), "banned_tokens": (9,), "temperature": 1.0},
        {"logit_bias": np.zeros((1, 384))},
    )
    for options in cases:
        ql.generate(model, PROMPTS[0], max_new_tokens=9, **options)
    assert trace_counts() == sizes


def test_a_session_decodes_with_the_options_of_its_processor(model, monkeypatch):
    """Only XLA tells which it was given: by the name of one that there is not."""
    monkeypatch.setattr(cpu, "compiler_options", lambda: {"xla_no_such_option": 1})
    found = importlib.util.find_spec("qllama_jax.session")
    assert found is not None
    assert found.loader is not None
    other = importlib.util.module_from_spec(found)
    found.loader.exec_module(other)
    monkeypatch.setattr(session, "_decode", other._decode)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        ql.generate(model, PROMPTS[0], max_new_tokens=2)


@pytest.mark.slow
def test_200_prompt_lengths_make_at_most_9_prefill_traces_and_one_decode_trace_a_cache(
    tiny_llama, monkeypatch
):
    model = ql.load(tiny_llama("F32", layers=1, context_length=4096, embed=32, ffn=64, vocab=384))
    traces = {"prefill": [], "decode": []}

    def layer(block, x, *arguments, **static):
        traces["prefill"].append(x.shape)
        return layerwise._run_layer(block, x, *arguments, **static)

    def decode(params, state, *arguments, **static):
        traces["decode"].append(state.cache.max_length)
        return decoding.decode_many(params, state, *arguments, **static)

    static = ("config", "max_steps", "activations", "top_logprobs", "dtype")
    monkeypatch.setattr(
        layerwise, "_layer", jax.jit(layer, static_argnames=("config", "activations"))
    )
    monkeypatch.setattr(session, "_decode", jax.jit(decode, static_argnames=static))
    rng = np.random.default_rng(0)
    lengths = np.concatenate([[1, 2048], rng.integers(1, 2049, 198)])
    for length in lengths:
        ql.generate(model, rng.integers(0, 384, length), max_new_tokens=3, ignore_eos=True)
    assert len(traces["prefill"]) <= 9
    assert len(traces["decode"]) == len(set(traces["decode"])) <= 6
    before = sum(map(len, traces.values()))
    for length in lengths[:40]:
        ql.generate(model, rng.integers(0, 384, length), max_new_tokens=3, ignore_eos=True)
    assert sum(map(len, traces.values())) == before


def test_a_decoding_step_writes_to_the_cache_in_place(path):
    model = ql.load(path)
    config, S = model.config, 272
    K, H = config.num_kv_heads, config.head_dim
    row = jnp.zeros((1,), jnp.int32)
    state = decoding.DecodeState(
        cache=ql.init_cache(config, 1, S),
        token=row,
        recent=jnp.zeros((1, 64), jnp.int32),
        keys=ql.row_keys(jax.random.key(0), 1),
        finish=row,
        generated=row,
    )
    decode = jax.jit(
        decoding.decode_many, static_argnames=("config", "max_steps"), donate_argnames="state"
    )
    arguments = model.params, state, ql.Sampling(), jnp.zeros((0,), jnp.int32), 3
    text = decode.lower(*arguments, config=config, max_steps=4).compile().as_text()
    assert text is not None
    shape = rf"f32\[1,{K},(?:{S},{H}|{H},{S})\]"
    assert len(re.findall(rf"dynamic[-_]update[-_]slice\S* = {shape}\S* fusion\(", text)) >= 2
    assert re.findall(rf"= {shape}\S* copy\(", text) == []
