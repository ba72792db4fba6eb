"""Token ids are llama.cpp's."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qllama_jax.tokenizer import Tokenizer
from tokenizer_vectors import GGML, TEXTS, VECTORS, VOCABULARIES, bpe_metadata, spm_metadata

INP_OUT = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm"),
    *("mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)


def test_there_are_1000_texts():
    assert len(set(TEXTS)) == len(TEXTS) == 1000
    assert all(len(VOCABULARIES[name]["plain"]) == 1000 for name in ("smollm2", "llama-spm"))
    assert len(VOCABULARIES["llama-bpe"]["plain"]) == 1000


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("parse_special", [False, True], ids=["plain", "special"])
def test_ids_equal_llama_cpp(name, parse_special, tokenizer_of):
    tokenizer, vectors = tokenizer_of(name), VOCABULARIES[name]
    special = vectors["special"] if parse_special else {}
    wrong = [
        text
        for i, (text, ids) in enumerate(zip(TEXTS, vectors["plain"], strict=False))
        if tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        != special.get(str(i), ids)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", VOCABULARIES)
def test_bos_and_eos_are_where_llama_cpp_puts_them(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    for i, ids in VOCABULARIES[name]["added"].items():
        assert tokenizer.encode(TEXTS[int(i)], add_eos=tokenizer.add_eos) == ids


@pytest.mark.parametrize("name", INP_OUT)
def test_llama_cpp_own_vectors(name, path_of, tokenizer_of):
    path = path_of(name)
    texts = path.with_name(path.name + ".inp").read_bytes().decode()
    texts = texts.split("\n__ggml_vocab_test__\n")
    expected = path.with_name(path.name + ".out").read_bytes().decode().split("\n")
    assert len(texts) == len(expected) >= 47
    encode = functools.partial(tokenizer_of(name).encode, add_bos=False, parse_special=False)
    assert [encode(text) for text in texts] == [[*map(int, ids.split())] for ids in expected]


def test_equal_scores_merge_leftmost_first():
    ties = VECTORS["ties"]
    metadata = {
        "model": "llama",
        "tokens": ties["tokens"],
        "token_type": np.array(ties["types"], np.int32),
        "scores": np.array(ties["scores"], np.float32),
    }
    tokenizer = Tokenizer.from_metadata({GGML + key: value for key, value in metadata.items()})
    encode = functools.partial(tokenizer.encode, add_bos=False, parse_special=False)
    assert len(ties["texts"]) == 300
    assert [encode(text) for text in ties["texts"]] == ties["ids"]


def test_bytes_without_a_token_are_left_out_and_not_merged_across():
    tokenizer = Tokenizer.from_metadata(bpe_metadata())
    assert tokenizer.encode("ab", add_bos=False) == [2]
    assert tokenizer.encode("a\x04b", add_bos=False) == [0, 1]


def test_first_of_duplicate_merges_counts():
    tokens = ["a", "b", "c", "ab", "bc"]
    metadata = bpe_metadata(tokens=tokens, token_type=None, bos_token_id=None, add_bos_token=False)
    metadata[f"{GGML}merges"] = ["a b", "b c", "a b"]
    assert Tokenizer.from_metadata(metadata).encode("abc") == [3, 2]


def test_empty_token_has_llama_cpp_name():
    tokens = ["a", "", "b", "ab", "Ġ"]
    tokenizer = Tokenizer.from_metadata(bpe_metadata(tokens=tokens, token_type=None))
    assert tokenizer.encode("[EMPTY_1]", add_bos=False) == []
    assert tokenizer.vocab_size == 5


def test_special_ids_default_as_in_llama_cpp():
    spm = Tokenizer.from_metadata(spm_metadata())
    assert (spm.bos_id, spm.eos_id, spm.add_bos, spm.add_eos) == (1, 2, True, False)
    bpe = Tokenizer.from_metadata(bpe_metadata(bos_token_id=None))
    assert (bpe.bos_id, bpe.eos_id, bpe.add_bos) == (None, None, False)  # 11 is no token here


@pytest.mark.parametrize(
    ("pre", "add_bos"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)]
)
def test_bos_by_default_goes_by_the_pre_tokenizer(pre, add_bos):
    tokenizer = Tokenizer.from_metadata(bpe_metadata(pre=pre))
    assert tokenizer.encode("ab") == ([4, 2] if add_bos else [2])
    assert tokenizer.encode("ab", add_bos=not add_bos) == ([2] if add_bos else [4, 2])


def test_space_prefix_can_be_switched_off():
    off = Tokenizer.from_metadata(spm_metadata(add_space_prefix=False))
    on = Tokenizer.from_metadata(spm_metadata())
    ids = {text: 259 + i for i, text in enumerate(["▁", "a", "b", "ab", "▁a", "▁ab"])}
    assert on.encode("ab", add_bos=False) == [ids["▁ab"]]
    assert off.encode("ab", add_bos=False) == [ids["ab"]]
    assert off.decode([ids["▁ab"]]) == " ab"
    assert on.decode([ids["▁ab"]]) == "ab"


def test_threads_with_different_parse_special_get_their_ids(smollm2):
    text = "<|im_start|>user\nhi<|im_end|>"
    expected = {flag: smollm2.encode(text, parse_special=flag) for flag in (False, True)}
    assert len(expected[True]) < len(expected[False])
    flags = [bool(i % 2) for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda flag: smollm2.encode(text, parse_special=flag), flags)
        assert list(found) == [expected[flag] for flag in flags]


@pytest.mark.parametrize("name", ["llama-spm", "smollm2", "llama-bpe"])
@pytest.mark.parametrize("character", "a \n中")
def test_long_runs_of_one_character_come_back(name, character, tokenizer_of):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(character * 4_000, add_bos=False)
    assert tokenizer.decode(ids) == character * 4_000
