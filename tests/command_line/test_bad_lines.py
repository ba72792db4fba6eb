"""What cannot be done is one line on stderr, and exit code 2."""

from __future__ import annotations

import pytest

import qllama_jax as ql
from qllama_jax.cli import main
from typed_lines import NO_CACHE, raising, replace_stream

BAD_LINES = [
    ([], "COMMAND"),
    (["frobnicate"], "'frobnicate'"),
    (["generate", "{path}"], "PROMPT"),
    (["generate", "{path}", "x", "--frobnicate"], "--frobnicate"),
    (["generate", "{path}", "x", "-n", "0"], "found '0', wanted an integer in 1.."),
    (["generate", "{path}", "x", "-n", "ten"], "found 'ten'"),
    (["generate", "{path}", "x", "-n", "9" * 5000], "-n/--max-new-tokens"),
    (["generate", "{path}", "x", "-n", "600"], "context is 512"),
    (["generate", "{path}", "x", "--seed", "4294967296"], "--seed"),
    (["generate", "{path}", "x", "--seed", "-1"], "--seed"),
    (["generate", "{path}", "x", "--temperature", "-1"], "temperature=-1.0"),
    (["generate", "{path}", "x", "--temperature", "nan"], "temperature=nan"),
    (["generate", "{path}", "x", "--temperature", "hot"], "'hot'"),
    (["generate", "{path}", "x", "--top-k", "-1"], "--top-k"),
    (["generate", "{path}", "x", "--top-p", "0"], "top_p=0.0"),
    (["generate", "{path}", "x", "--min-p", "1.5"], "min_p=1.5"),
    (["generate", "{path}", "x", "--repeat-penalty", "0"], "repeat_penalty=0.0"),
    (["generate", "{path}", "x", "--typical", "0"], "typical_p=0.0"),
    (["generate", "{path}", "x", "--presence-penalty", "inf"], "presence_penalty=inf"),
    (["generate", "{path}", "x", "--frequency-penalty", "nan"], "frequency_penalty=nan"),
    (["generate", "{path}", "x", "--repeat-last-n", "-2"], "found '-2', wanted an integer in -1.."),
    (["generate", "{path}", "x", "--logit-bias", "5"], "found '5', wanted a token's id"),
    (["generate", "{path}", "x", "--logit-bias", "5+inf"], "found '5+inf'"),
    (["generate", "{path}", "x", "--logit-bias", "5-nan"], "found '5-nan'"),
    (["generate", "{path}", "x", "--logit-bias", "a+1"], "found 'a+1'"),
    (["generate", "{path}", "x", "--logit-bias", "384+1"], "token id 384"),
    (["generate", "{path}", "x", "--logit-bias", "5+1e99"], "inf for token 5"),
    (["generate", "{path}", "x", "--stop", ""], "stop: a text is empty"),
    (["generate", "{path}", "x", "--activations", "int4"], "'int4'"),
    (["generate", "{path}", "x\udcff"], "surrogate"),
    (["generate", "/no/such\nfile", "x"], "/no/such\\nfile: no such file"),
    (["generate", "{folder}", "x"], "a directory"),
    (["generate", "{text}", "x"], "not a GGUF file"),
    (["chat", "{path}"], "no chat template"),
    (["info", "/no/such/file"], "no such file"),
    (["info", "{text}"], "not a GGUF file"),
    (["bench", "{path}", "-p", "500", "-n", "13"], "context is 512"),
    (["bench", "{path}", "-p", "0"], "-p/--prompt-tokens"),
]


@pytest.mark.parametrize(("arguments", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(path, tmp_path, capsys, arguments, reason):
    text = tmp_path / "text"
    text.write_text("Once upon a time")
    places = {"{path}": path, "{folder}": str(tmp_path), "{text}": str(text)}
    assert main([places.get(a, a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qllama: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert reason in err


@pytest.mark.parametrize(
    "error", [ql.NumericalError("row 0: nan"), MemoryError("10 GiB"), RuntimeError("no\ndevice")]
)
def test_what_goes_wrong_later_is_one_line_too(path, capsys, monkeypatch, error):
    failing = raising(error, ql.Piece("so far", 1, 0.0))
    replace_stream(monkeypatch, "generate", failing)
    assert main(["generate", path, "x", NO_CACHE]) == 2
    shown = str(error).replace("\n", "\\n")
    assert capsys.readouterr() == ("so far\n", f"qllama: error: {shown}\n")
