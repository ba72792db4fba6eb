"""What `compile_ahead` does once XLA is done; that it hears Ctrl-C is in test_interruption.py."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import pytest

from qllama_jax import compiling
from qllama_jax.compiling import Program, compile_ahead


def recording(events: list[Any]) -> list[Program]:
    """Two programs, whose compilation is an event."""
    lowered = SimpleNamespace(compile=lambda: events.append("compiled"))
    return [Program(SimpleNamespace(lower=lambda: lowered), (), {})] * 2


def test_memory_goes_back_to_the_system_before_and_after_all_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
):
    events: list[Any] = []
    monkeypatch.setattr(compiling, "_malloc_trim", lambda: events.append)
    compile_ahead(recording(events))
    assert events == [0, "compiled", "compiled", 0]  # malloc_trim(0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_glibc_has_the_function():
    trim = compiling._malloc_trim()
    assert trim is not None
    assert trim(0) in (0, 1)


def test_a_system_without_malloc_trim_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    events: list[Any] = []
    monkeypatch.setattr(compiling, "_malloc_trim", lambda: None)
    compile_ahead(recording(events))
    assert events == ["compiled", "compiled"]
