"""`qllama info` tells what a file says, by gguf-py's word."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import gguf
import pytest

from qllama_jax.cli import main
from typed_lines import facts


def test_info_counts_what_gguf_py_counts(tiny_llama, capsys):
    def mixed(name: str) -> str:
        return "Q6_K" if "ffn_down" in name else "F16" if "token_embd" in name else "Q4_K"

    path = tiny_llama(mixed)
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    reader = gguf.GGUFReader(path)

    def value(key: str):
        field = reader.get_field(key)
        assert field is not None
        return field.contents()

    tensors = reader.tensors
    nbytes = sum(int(tensor.n_bytes) for tensor in tensors)
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    shown = facts(out)
    assert shown["architecture"] == repr(value("general.architecture"))
    assert shown["parameters"] == f"{weights:,}"
    assert shown["weights"] == f"{nbytes:,} bytes, {8 * nbytes / weights:.2f} bits a weight"
    assert shown["layers"] == str(value("llama.block_count"))
    assert shown["embedding"] == str(value("llama.embedding_length"))
    assert shown["feed-forward"] == str(value("llama.feed_forward_length"))
    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    assert shown["heads"].startswith(f"{heads}, {kv_heads} of keys")
    assert shown["context"] == f"{value('llama.context_length')} tokens"
    assert shown["vocabulary"] == f"{len(value('tokenizer.ggml.tokens'))} tokens"
    assert shown["chat template"] == "no"
    counts = Counter(tensor.tensor_type.name for tensor in tensors)
    for qtype, count in counts.items():
        size = sum(int(t.n_bytes) for t in tensors if t.tensor_type.name == qtype)
        assert re.search(rf"^ +{qtype} +{count} tensors +{size:,} bytes$", out, re.MULTILINE)
    assert len(re.findall(r"^ {10}", out, re.MULTILINE)) == len(counts)


def test_info_tells_the_experts_of_a_mixture_alone(tiny_llama, capsys):
    def experts(**options: Any) -> str | None:
        assert main(["info", str(tiny_llama("Q8_0", layers=1, **options))]) == 0
        return facts(capsys.readouterr().out).get("experts")

    assert experts(experts=4, experts_used=2) == "4, 2 a token"
    assert experts(experts=1, experts_used=1) == "1, 1 a token"
    assert experts(metadata={"llama.expert_count": 1}) is None
    assert experts() is None


def test_info_says_whether_there_is_a_chat_template(chat_path, capsys):
    assert main(["info", chat_path()]) == 0
    assert facts(capsys.readouterr().out)["chat template"] == "yes"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.attention.head_count_kv": 3}, "'llama.attention.head_count_kv'"),
        ({"general.name": 3, "llama.vocab_size": 7}, "'llama.vocab_size'"),
    ],
    ids=["missing", "wrong", "two"],
)
def test_info_tells_what_it_can_before_the_error(tiny_llama, capsys, metadata, reason):
    path = tiny_llama("Q4_0", metadata=metadata)
    assert main(["info", str(path)]) == 2
    out, err = capsys.readouterr()
    weights = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)
    assert facts(out)["parameters"] == f"{weights:,}"
    assert "layers" not in facts(out)
    assert reason in err
    assert err.count("\n") == 1


def test_info_prints_no_control_characters_of_the_file(tiny_llama, capsys):
    path = tiny_llama(metadata={"general.name": "\x1b[31mred\n"})
    assert main(["info", str(path)]) == 0
    assert facts(capsys.readouterr().out)["name"] == r"'\x1b[31mred\n'"
