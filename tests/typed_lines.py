"""What the tests of the command line type, and how they read what it prints."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qllama_jax as ql

ROOT = Path(__file__).resolve().parent.parent
NO_CACHE = "--no-compilation-cache"


def answers(path: str, texts: list[str], system: str | None = None, new_tokens: int = 4) -> str:
    """What a greedy chat prints for the user's texts, by the library alone."""
    model, shown = ql.load(path), ""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in texts:
        messages.append({"role": "user", "content": text})
        ids = model.tokenizer.encode(model.tokenizer.apply_chat_template(messages))
        answer = ql.generate(model, ids, max_new_tokens=new_tokens).text
        messages.append({"role": "assistant", "content": answer})
        shown += answer + "\n"
    return shown


def python(*arguments: str, **options) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **options)


def replace_stream(monkeypatch: pytest.MonkeyPatch, module: str, stream: Callable) -> None:
    """Let a module of the package, generate or chat, find another `stream`."""
    # The command line imports late: chat would keep generate's replacement for good.
    importlib.import_module("qllama_jax.chat")
    monkeypatch.setattr(importlib.import_module(f"qllama_jax.{module}"), "stream", stream)


def raising(error: BaseException, *pieces: ql.Piece):
    """A `stream` that gives some pieces, then raises."""

    def stream(*_, **__):
        yield from pieces
        raise error

    return stream


def facts(text: str) -> dict[str, str]:
    """Label -> text of `qllama info`'s lines."""
    pairs = [(line[:15].strip(), line[15:]) for line in text.splitlines()]
    return {label: text for label, text in pairs if label}
