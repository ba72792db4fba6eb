"""`qllama bench` and `qllama perplexity` print what the library measures."""

from __future__ import annotations

import json
from pathlib import Path

import jax

import qllama_jax as ql
from qllama_jax.cli import main
from typed_lines import NO_CACHE


def test_bench_prints_one_line_of_json(path, capsys):
    assert main(["bench", path, "-p", "5", "-n", "3", "--json", NO_CACHE]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    report = json.loads(out)
    params = ql.load(path).params
    assert report["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert report["model"] == Path(path).name
    assert report["qtype"] == "Q4_0"
    assert report["jax"] == jax.__version__
    assert report["device"] == jax.devices()[0].device_kind
    assert (report["prompt_tokens"], report["new_tokens"]) == (5, 3)
    assert report["peak_bytes"] > report["weight_bytes"]
    for name in ("prefill_tok_s", "decode_tok_s", "load_s"):
        assert report[name] > 0
    assert report["compile_s"] >= 0
    assert Path(path).name in err  # the table
    assert main(["bench", path, "-p", "5", "-n", "3", NO_CACHE]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"model        {Path(path).name}, Q4_0\n")
    assert err == ""


def test_perplexity_prints_that_of_the_library_and_each_chunk(tiny_llama, tmp_path, capsys):
    path = tiny_llama("Q8_0", layers=1)
    text = tmp_path / "text.txt"
    content = "one two</s>\r\nthree " * 9
    text.write_bytes(content.encode())
    assert main(["perplexity", str(path), str(text), "-c", "16"]) == 0
    out, err = capsys.readouterr()
    model = ql.load(path)
    ids = model.tokenizer.encode(content, parse_special=False)
    assert ids != model.tokenizer.encode(content)
    results = list(ql.perplexity(model, ids, context=16))
    assert len(results) > 2
    last = results[-1]
    numbers = f"{last.value:.4f} +/- {last.error:.4f} ({last.tokens} tokens scored)"
    assert out == f"perplexity: {numbers}\n"
    chunks = [f"chunk {r.chunks}/{len(results)}: {r.value:.4f}" for r in results]
    assert err.splitlines() == chunks


def test_a_text_shorter_than_a_chunk_is_an_error(tiny_llama, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one")
    assert main(["perplexity", str(tiny_llama("Q8_0", layers=1)), str(text)]) == 2
    assert "tokens, wanted at least 512, one context" in capsys.readouterr().err
