"""Vocabularies, texts and ids that cannot be are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from qllama_jax.errors import GGUFError
from qllama_jax.tokenizer import Tokenizer
from tokenizer_vectors import GGML, bpe_metadata, spm_metadata

# Vocabularies of llama.cpp's that no Llama uses: name -> tokenizer model.
OTHER_MODELS = {"bert-bge": "bert", "gemma-4": "gemma4", "nomic-bert-moe": "t5"}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_tokenizer_models_are_refused_by_name(name, path_of):
    with pytest.raises(GGUFError, match=rf"'{OTHER_MODELS[name]}', wanted .*gpt2, llama"):
        Tokenizer.from_gguf(path_of(name))


@pytest.mark.parametrize("token", [-1, 32_000, 2**31, 2**32 + 5])
def test_ids_out_of_range_are_refused(spm, token):
    for decode in (spm.token_bytes, spm.is_hidden, spm.stream_decoder().step):
        with pytest.raises(ValueError, match=r"is not in 0\.\.31999"):
            decode(token)
    with pytest.raises(ValueError, match=r"is not in 0\.\.31999"):
        spm.decode([1, token])


@pytest.mark.parametrize("ids", [[1.5], [True], ["a"], [None], 5, np.zeros((2, 2), np.int32)])
def test_ids_are_integers(spm, ids):
    with pytest.raises(TypeError):
        spm.decode(ids)


@pytest.mark.parametrize("text", [b"bytes", None, 5, ["a"]])
def test_text_is_a_string(smollm2, text):
    with pytest.raises(TypeError):
        smollm2.encode(text)


@pytest.mark.parametrize("name", ["smollm2", "llama-spm"])
def test_lone_surrogates_are_refused(name, tokenizer_of):
    with pytest.raises(ValueError, match=r"a lone surrogate, U\+D83D, at 2"):
        tokenizer_of(name).encode("ab\ud83d")


def test_bos_and_eos_that_are_missing_are_refused():
    tokenizer = Tokenizer.from_metadata(bpe_metadata(bos_token_id=None))
    with pytest.raises(ValueError, match="no BOS token"):
        tokenizer.encode("a", add_bos=True)
    with pytest.raises(ValueError, match="no EOS token"):
        tokenizer.encode("a", add_eos=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert', wanted one of the supported tokenizers: gpt2, llama"),
        ({"model": None}, "is missing"),
        ({"tokens": None}, "is missing"),
        ({"tokens": []}, "no tokens"),
        ({"scores": None}, "is missing"),
        ({"scores": np.zeros(3, np.float32)}, "3 values, wanted one for each of 265 tokens"),
        ({"scores": np.full(265, np.nan, np.float32)}, "the score nan for token 0"),
        ({"scores": np.full(265, np.inf, np.float32)}, "the score inf for token 0"),
        ({"scores": np.zeros(265, np.uint8)}, "wanted an array of floats"),
        ({"token_type": np.ones(7, np.int32)}, "7 values, wanted one for each of 265 tokens"),
        ({"token_type": np.zeros(265, np.int32)}, "the type 0 for token 0, wanted types 1..6"),
        ({"token_type": np.full(265, 7, np.int32)}, "the type 7 for token 0"),
        ({"token_type": np.full(265, 6, np.int32)}, "the type 6 for token 0, '<unk>'"),
        ({"tokens": ["a"] * 265}, "the token 'a' twice, at 0 and 264"),
        ({"bos_token_id": 265}, "the int 265, wanted an integer in 0..264"),
        ({"eos_token_id": 2**32 - 1}, "wanted an integer in 0..264"),
        ({"fim_pad_token_id": 265}, "wanted an integer in 0..264"),
        ({"add_bos_token": 1}, "wanted a bool"),
    ],
)
def test_broken_vocabulary_names_the_key(changes, message):
    with pytest.raises(GGUFError) as caught:
        Tokenizer.from_metadata(spm_metadata(**changes))
    assert message in str(caught.value)
    (key,) = changes
    assert f"'tokenizer.ggml.{key}'" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": None}, "is missing"),
        ({"merges": ["ab"]}, "the merge 'ab' at 0"),
        ({"merges": ["a b", "a Ġ"]}, "the merge 'a Ġ' at 1"),
        ({"merges": ["a zz"]}, "the merge 'a zz' at 0"),
        ({"bos_token_id": None, "add_bos_token": True}, "a file that names the bos token"),
        ({"add_eos_token": True}, "a file that names the eos token"),
    ],
)
def test_broken_bpe_vocabulary_names_the_key(changes, message):
    with pytest.raises(GGUFError) as caught:
        Tokenizer.from_metadata(bpe_metadata(**changes))
    assert message in str(caught.value)


def test_byte_without_a_token_is_refused_in_sentencepiece():
    metadata = spm_metadata(tokens=["<unk>", "<s>", "</s>", "▁", "a"], scores=np.zeros(5, "f4"))
    metadata[f"{GGML}token_type"] = np.array([2, 3, 3, 1, 1], np.int32)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("aa") == [1, 3, 4, 4]
    with pytest.raises(ValueError, match="no token for the byte 0xC3"):
        tokenizer.encode("é")
