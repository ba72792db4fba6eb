"""Tokenizers of whole vocabularies, each built once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from qllama_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def path_of(request) -> Callable[[str], Path]:
    """Function: name of a vocabulary -> its file."""

    def find(name: str) -> Path:
        if name == "smollm2":
            return request.getfixturevalue("smollm2_path")
        return request.getfixturevalue("vocab_path")(name)

    return find


@pytest.fixture(scope="session")
def tokenizer_of(path_of) -> Callable[[str], Tokenizer]:
    """Function: name of a vocabulary -> its tokenizer, built once."""
    return functools.cache(lambda name: Tokenizer.from_gguf(path_of(name)))


@pytest.fixture
def smollm2(tokenizer_of) -> Tokenizer:
    return tokenizer_of("smollm2")


@pytest.fixture
def spm(tokenizer_of) -> Tokenizer:
    return tokenizer_of("llama-spm")
