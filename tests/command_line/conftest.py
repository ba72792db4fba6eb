"""Models and conversations to type to; the settings that a command line changes are put back."""

from __future__ import annotations

import io
import sys

import jax
import pytest

from qllama_jax.cli import main
from typed_lines import NO_CACHE

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
)
CACHE_SETTINGS = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture(autouse=True)
def cache_settings():
    """JAX's settings are the process's: put back what a command line changes."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    for name, value in CACHE_SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def path(tiny_llama) -> str:
    return str(tiny_llama("Q4_0", layers=1))


@pytest.fixture
def chat_path(tiny_llama):
    """Function: keywords of `tiny_llama` -> path of a model with a chat template."""

    def write(**options) -> str:
        metadata = {"tokenizer.chat_template": TEMPLATE}
        path = tiny_llama("Q4_0", layers=1, tokenizer="gpt2", metadata=metadata, **options)
        return str(path)

    return write


@pytest.fixture
def chat(monkeypatch, capsys):
    """Function: path, typed text and flags -> exit code, stdout, stderr of a greedy chat."""

    def run(path: str, typed: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main(["chat", path, NO_CACHE, "--temperature", "0", "-n", "4", *flags])
        return code, *capsys.readouterr()

    return run
