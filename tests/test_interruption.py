"""Ctrl-C stops a generation at the next layer or beside a compilation, and the model goes on."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax import layerwise, session
from qllama_jax.compiling import Program, compile_ahead

PROMPT = np.arange(1, 101, dtype=np.int32)


@pytest.fixture(scope="module")
def model(tiny_llama: Any) -> ql.Model:
    path: Path = tiny_llama("Q4_0", layers=4, context_length=4096)
    return ql.load(path, layout="file")


@pytest.fixture(autouse=True)
def interrupts_raise() -> Iterator[None]:
    """Python's own handler: a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tokens(model: ql.Model, **options: Any) -> list[int]:
    return ql.generate(model, PROMPT, max_new_tokens=5, ignore_eos=True, **options).tokens


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_no_layer_runs_after_an_interrupt_and_the_model_goes_on_as_before(
    model: ql.Model, monkeypatch: pytest.MonkeyPatch, at: int
):
    monkeypatch.setattr(session, "PREFILL_CHUNK", 64)  # two chunks of four layers
    wanted = tokens(model)
    layers = []

    def layer(*arguments: Any, **static: Any) -> Any:
        layers.append(static)
        if len(layers) == at:
            signal.raise_signal(signal.SIGINT)
        return run(*arguments, **static)

    run = layerwise._layer
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "_layer", layer)
        with pytest.raises(KeyboardInterrupt):
            tokens(model)
    assert len(layers) == at
    assert tokens(model) == wanted


@pytest.mark.parametrize("at", [1, 2])
def test_no_dispatch_runs_after_an_interrupt_while_decoding(
    model: ql.Model, monkeypatch: pytest.MonkeyPatch, at: int
):
    wanted = tokens(model)
    dispatches = []

    def decode(*arguments: Any, **static: Any) -> Any:
        dispatches.append(static)
        if len(dispatches) == at:
            signal.raise_signal(signal.SIGINT)
        return run(*arguments, **static)

    run = session._decode
    pieces = ql.stream(model, PROMPT, max_new_tokens=5, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(session, "_decode", decode)
        patch.setattr(session, "compile_once", lambda *_, **__: None)
        patch.setattr(session, "DISPATCH_SECONDS", 0.0)  # a step a dispatch
        seen = [next(pieces).token for _ in range(at)]
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    assert len(dispatches) == at
    assert seen == wanted[:at]
    assert list(pieces) == []  # the stream has ended; a new one begins afresh
    assert tokens(model) == wanted


@pytest.mark.parametrize("at", [1, 20, 38])
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_no_tensor_is_read_after_an_interrupt_while_loading_and_the_next_load_is_whole(
    model: ql.Model, at: int, layout: Any
):
    done = []

    def progress(*counts: int) -> None:
        done.append(counts)
        if len(done) == at:
            signal.raise_signal(signal.SIGINT)

    wanted = jax.tree.leaves(ql.load(model.path, layout=layout).params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that is left open is one
        with pytest.raises(KeyboardInterrupt):
            ql.load(model.path, layout=layout, progress=progress)
        gc.collect()
    assert len(done) == at < len(ql.read_gguf(model.path).tensors)
    found = jax.tree.leaves(ql.load(model.path, layout=layout).params)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_at_most_one_layer_waits_while_another_runs(
    model: ql.Model, monkeypatch: pytest.MonkeyPatch
):
    made: list[jax.Array] = []

    def layer(*arguments: Any, **static: Any) -> Any:
        assert all(keys.is_ready() for keys in made[:-1])  # pyright: ignore[reportAttributeAccessIssue]
        x, k, v = run(*arguments, **static)
        made.append(k)
        return x, k, v

    run = layerwise._layer
    monkeypatch.setattr(layerwise, "_layer", layer)
    cache = ql.init_cache(model.config, 1, 128)
    lengths = np.asarray([100], np.int32)
    options: dict[str, Any] = {"config": model.config, "activations": "float"}
    layerwise.prefill(model.params, PROMPT[None], lengths, cache, **options)
    assert len(made) == 4


def test_an_interrupt_is_heard_while_another_thread_compiles():
    caught, events = threading.Event(), []

    class Lowered:
        def compile(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            events.append("caught" if caught.wait(60) else "waited in vain")

    function = SimpleNamespace(lower=lambda *_, **__: Lowered())
    with pytest.raises(KeyboardInterrupt):
        compile_ahead([Program(function, (1,), {})])
    caught.set()
    for thread in threading.enumerate():
        if thread.name == "compile_ahead":
            thread.join()
    assert events == ["caught"]


def test_what_is_compiled_ahead_is_traced_and_compiled_once():
    compiled: list[str] = []
    traced: list[int] = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        traced.append(1)
        return 3 * jnp.sin(x)

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    x = jnp.ones((7,))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compile_ahead([Program(function, (x,), {})])
        assert len(compiled) == len(traced) == 1
        function(x)
        compile_ahead([Program(function, (x,), {})])
        assert len(compiled) == len(traced) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_cannot_be_compiled_is_the_calls_error():
    class Lowered:
        def compile(self) -> None:
            raise RuntimeError("out of memory")

    compile_ahead([Program(SimpleNamespace(lower=lambda: Lowered()), (), {})])


def test_progress_rises_to_all_prompt_tokens_in_one_step_a_chunk(
    model: ql.Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(session, "PREFILL_CHUNK", 32)
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    assert tokens(model, progress=progress) == tokens(model)
    assert calls == [(0, 100), (32, 100), (64, 100), (96, 100), (100, 100)]
    calls.clear()
    next(ql.stream(model, PROMPT[:33], max_new_tokens=3, progress=progress))
    assert calls == [(0, 33), (32, 33), (33, 33)]
    calls.clear()
    rows = [PROMPT[:70], PROMPT[:10], PROMPT[:32]]
    ql.generate(model, rows, max_new_tokens=2, progress=progress)
    assert calls == [(0, 112), (74, 112), (106, 112), (112, 112)]
    calls.clear()
    ql.generate(model, PROMPT[:32], max_new_tokens=2, progress=progress)
    assert calls == []
