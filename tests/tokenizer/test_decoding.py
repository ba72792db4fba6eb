"""Pieces and the end-of-generation set are llama.cpp's; decoding is exact."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllama_jax.tokenizer import Tokenizer
from tokenizer_vectors import VOCABULARIES, bpe_metadata


@pytest.mark.parametrize("name", VOCABULARIES)
def test_pieces_of_tokens_equal_llama_cpp(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    shown, plain = hashlib.sha256(), hashlib.sha256()
    size = tokenizer.vocab_size
    step = 1 + size // 10_000
    for token in sorted({*range(0, size, step), *range(300), *range(size - 300, size)}):
        piece = tokenizer.token_bytes(token)
        hidden = b"" if tokenizer.is_hidden(token) else piece
        shown.update(len(piece).to_bytes(4, "little") + piece)
        plain.update(len(hidden).to_bytes(4, "little") + hidden)
    assert [shown.hexdigest(), plain.hexdigest()] == VOCABULARIES[name]["pieces"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_end_of_generation_set_equals_llama_cpp(name, tokenizer_of):
    assert sorted(tokenizer_of(name).eog_ids) == VOCABULARIES[name]["eog"]


def test_smollm2_ends_on_three_tokens(smollm2):
    ends = {smollm2.token_bytes(token) for token in smollm2.eog_ids}
    assert ends == {b"<|im_end|>", b"<|endoftext|>", b"<reponame>"}


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        (["<|end|>"], {"<|end|>"}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}),
        (["<|end|>", "<|flush|>", "<|calls|>"], {"<|flush|>", "<|calls|>"}),
        (["</s>", "<|tool_response>"], {"<|tool_response>"}),
        (["<PAD>", "<|file_sep|>", "<PRE>"], {"<PAD>", "<|file_sep|>"}),
    ],
)
def test_end_of_generation_goes_by_the_texts(texts, ends):
    tokens = ["a", "b", "ab", "Ġ", "Ċ", *texts]
    metadata = bpe_metadata(tokens=tokens, token_type=None, bos_token_id=None)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert {tokens[token] for token in tokenizer.eog_ids} == ends


def test_decode_hides_control_tokens_unless_asked(smollm2):
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>\n")
    assert smollm2.decode(ids) == "user\nhi\n"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|>\n"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm"])
def test_decode_inverts_encode(name, tokenizer_of, text):
    text = text.replace("▁", " ") if name == "llama-spm" else text  # it has no token of its own
    tokenizer = tokenizer_of(name)
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("skip_special", [False, True], ids=["shown", "hidden"])
def test_streamed_pieces_join_to_the_whole_decode(name, skip_special, tokenizer_of):
    tokenizer = tokenizer_of(name)
    rng = random.Random(7)
    for continues in (False, True):
        for length in (*range(20), 200):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
            decoder = tokenizer.stream_decoder(skip_special=skip_special, continues=continues)
            pieces = [*map(decoder.step, ids), decoder.flush()]
            kept = [i for i in ids if not (skip_special and tokenizer.is_hidden(i))]
            whole = b"".join(map(tokenizer.token_bytes, kept)).decode("utf-8", "replace")
            if name in ("llama-spm", "phi-3") and not continues:
                whole = whole.removeprefix(" ")
            assert "".join(pieces) == whole
            assert whole == tokenizer.decode(ids, skip_special=skip_special, continues=continues)


@pytest.mark.parametrize("name", ["smollm2", "llama-spm", "llama-bpe"])
def test_streaming_never_cuts_a_character(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    text = "🙂👩‍👩‍👧‍👦 中文 é ❤️ 🇩🇪 नमस्ते"
    ids = tokenizer.encode(text, add_bos=False)
    assert len(ids) > len(text) / 2  # many characters take several tokens
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.step(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert decoder.flush() == ""


def test_cut_emoji_flushes_one_replacement_character(spm):
    ids = spm.encode("x🙂", add_bos=False)
    assert len(ids) == 5  # ▁x and four bytes
    decoder = spm.stream_decoder()
    assert "".join(decoder.step(token) for token in ids[:-1]) == "x"
    assert decoder.flush() == "\ufffd"


def test_continuation_keeps_the_leading_space(spm):
    ids = spm.encode("Once upon", add_bos=False)
    assert spm.decode(ids) == "Once upon"
    assert spm.decode(ids, continues=True) == " Once upon"
    assert spm.decode([spm.bos_id, *ids]) == "Once upon"


def test_decode_takes_arrays(spm):
    ids = spm.encode("arrays of ids")
    assert spm.decode(np.array(ids, np.int32)) == "arrays of ids"
    assert spm.decode(iter(ids)) == "arrays of ids"
    assert spm.decode(np.zeros(0, np.int32)) == ""
