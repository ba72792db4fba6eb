"""A conversation becomes the prompt that the file's template makes of it."""

from __future__ import annotations

import pytest

from qllama_jax.chat_template import ChatTemplateError
from qllama_jax.tokenizer import Tokenizer
from tokenizer_vectors import spm_metadata


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
