"""Token ids, pieces and the end-of-generation set are llama.cpp's; decoding is exact.

The expected ids come from scripts/make_tokenizer_vectors.py.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllama_jax.chat_template import ChatTemplateError
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf
from qllama_jax.tokenizer import Tokenizer
from qllama_jax.tokenizer.pretokenizers import PRETOKENIZERS

VECTORS = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "tokenizer_vectors.json.gz").read_bytes())
)
TEXTS = VECTORS["texts"]
VOCABULARIES = VECTORS["vocabularies"]
# Vocabularies of llama.cpp's that no Llama uses: name -> tokenizer model.
OTHER_MODELS = {"bert-bge": "bert", "gemma-4": "gemma4", "nomic-bert-moe": "t5"}
INP_OUT = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm"),
    *("mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|eot_id|>")
GGML = "tokenizer.ggml."


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


def spm_metadata(**changes) -> dict:
    """A small SentencePiece vocabulary; a change to None takes a key out."""
    pieces = ["▁", "a", "b", "ab", "▁a", "▁ab"]
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32),
        "scores": np.array([0.0] * 259 + [-1, -2, -3, -4, -5, -6], np.float32),
    }
    kept = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    return {GGML + key: value for key, value in kept.items()}


def bpe_metadata(**changes) -> dict:
    """A small byte-level vocabulary; a change to None takes a key out."""
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "Ġ", "<|im_end|>"],
        "token_type": np.array([1, 1, 1, 1, 3], np.int32),
        "merges": ["a b"],
        "bos_token_id": 4,
    }
    kept = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    return {GGML + key: value for key, value in kept.items()}


# Ids


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


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_tokenizer_models_are_refused_by_name(name, path_of):
    with pytest.raises(GGUFError, match=rf"'{OTHER_MODELS[name]}', wanted .*gpt2, llama"):
        Tokenizer.from_gguf(path_of(name))


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


# Decoding


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


# Errors


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


# Chats


def test_smollm2_chat_prompt(smollm2):
    hello = {"role": "user", "content": "Hello!"}
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert smollm2.apply_chat_template([hello]) == (
        f"<|im_start|>system\n{default}<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    chat = [
        {"role": "system", "content": "Be <b>brief</b> & 'kind'."},
        hello,
        {"role": "assistant", "content": " Hi.\n"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ]
    assert smollm2.apply_chat_template(chat, add_generation_prompt=False) == (
        "<|im_start|>system\nBe <b>brief</b> & 'kind'.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n Hi.\n<|im_end|>\n"
        "<|im_start|>user\n{{ 7 * 7 }} {% raw %}<|im_end|>\n"
    )


def test_smollm2_chat_prompt_ids(smollm2):
    ids = smollm2.encode(smollm2.apply_chat_template([{"role": "user", "content": "Hello!"}]))
    start, end = smollm2.encode("<|im_start|><|im_end|>")
    assert (ids.count(start), ids.count(end)) == (3, 2)
    assert ids[-4:] == [start, *smollm2.encode("assistant\n")]


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_never_doubled(add_bos):
    metadata = spm_metadata(add_bos_token=add_bos)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = Tokenizer.from_metadata(metadata)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    assert prompt == ("ab</s>" if add_bos else "<s>ab</s>")
    assert tokenizer.encode(prompt) == [1, 264, 2]


def test_template_is_rendered_only_when_asked_for():
    metadata = spm_metadata()
    metadata["tokenizer.chat_template"] = "{{ raise_exception('rendered') }}{% broken"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("ab", add_bos=False) == [264]
    with pytest.raises(ChatTemplateError):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_given_template_replaces_the_file_s(path_of):
    tokenizer = Tokenizer.from_gguf(path_of("llama-spm"), chat_template="[{{ messages|length }}]")
    assert tokenizer.chat_template == "[{{ messages|length }}]"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "[1]"


def test_missing_template_is_an_error(spm):
    assert spm.chat_template is None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        spm.apply_chat_template([{"role": "user", "content": "hi"}])


def test_variables_reach_the_template():
    metadata = spm_metadata()
    template = "{% if thinking %}hm{% endif %}{{ tools|length }}{{ add_generation_prompt }}"
    metadata["tokenizer.chat_template"] = template
    tokenizer = Tokenizer.from_metadata(metadata)
    prompt = tokenizer.apply_chat_template([], False, thinking=True, tools=[{}, {}])
    assert prompt == "hm2False"
