"""Texts are cut as llama.cpp cuts them, for every name that it knows."""

from __future__ import annotations

import functools

import pytest

from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf
from qllama_jax.tokenizer import Tokenizer
from qllama_jax.tokenizer.pretokenizers import PRETOKENIZERS
from tokenizer_vectors import GGML, TEXTS, VECTORS, bpe_metadata


@pytest.fixture(scope="session")
def gpt2_metadata(path_of) -> dict:
    """Metadata of gpt-2, with which llama.cpp was made to use other pre-tokenizers."""
    return dict(read_gguf(path_of("gpt-2")).metadata)


@pytest.mark.parametrize("name", VECTORS["pretokenizers"])
def test_pre_tokenizers_split_as_llama_cpp(name, gpt2_metadata):
    tokenizer = Tokenizer.from_metadata({**gpt2_metadata, f"{GGML}pre": name})
    encode = functools.partial(tokenizer.encode, add_bos=False, parse_special=False)
    ids = VECTORS["pretokenizers"][name]
    assert len(ids) == 300
    assert [encode(text) for text in TEXTS[:300]] == ids


def test_every_pre_tokenizer_is_like_a_tested_one():
    tested = {PRETOKENIZERS[name].patterns for name in VECTORS["pretokenizers"]}
    assert {pre.patterns for pre in PRETOKENIZERS.values()} <= tested


def test_missing_pre_means_default(gpt2_metadata):
    without = {key: v for key, v in gpt2_metadata.items() if key != f"{GGML}pre"}
    tokenizer = Tokenizer.from_metadata(without)
    ids = [tokenizer.encode(text, add_bos=False, parse_special=False) for text in TEXTS[:300]]
    assert ids == VECTORS["pretokenizers"]["default"]


@pytest.mark.parametrize("text", ["ab", "", "<|im_end|>"])
def test_unknown_pre_is_refused_by_name_when_a_text_is_encoded(text):
    tokenizer = Tokenizer.from_metadata(bpe_metadata(pre="gpt-99"))
    for _ in range(2):
        with pytest.raises(GGUFError, match=r"'gpt-99', wanted .*llama-bpe.*smollm"):
            tokenizer.encode(text)
    with pytest.raises(TypeError):
        tokenizer.encode(b"ab")  # pyright: ignore


def test_all_but_encoding_works_with_an_unknown_pre():
    known = Tokenizer.from_metadata(bpe_metadata())
    tokenizer = Tokenizer.from_metadata(bpe_metadata(pre="gpt-99", add_bos_token=True))
    ids = list(range(5))
    for skip_special in (True, False):
        expected = known.decode(ids, skip_special=skip_special)
        assert tokenizer.decode(ids, skip_special=skip_special) == expected
    assert (tokenizer.bos_id, tokenizer.add_bos) == (4, True)
    assert tokenizer.eog_ids == known.eog_ids == {4}
    silent = Tokenizer.from_metadata(bpe_metadata(pre="gpt-99", bos_token_id=None))
    assert (silent.bos_id, silent.add_bos) == (None, False)
