"""`qllama generate` prints what the library generates."""

from __future__ import annotations

import re
import sys
from typing import Any, get_args

import pytest

import qllama_jax as ql
from qllama_jax import cli, session
from qllama_jax.cli import main
from qllama_jax.matmul import Activations
from qllama_jax.session import Stats
from typed_lines import NO_CACHE, answers, raising, replace_stream

DEFAULTS = {
    "max_new_tokens": 128,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "penalty_last_n": 64,
    "logit_bias": {},
    "stop": (),
    "activations": "auto",
    "dtype": "float32",
    "ignore_eos": False,
    "progress": None,
}
ALL_FLAGS = {
    "max_new_tokens": 7,
    "seed": 4294967295,
    "temperature": 1.5,
    "top_k": 9,
    "top_p": 0.9,
    "min_p": 0.01,
    "repeat_penalty": 1.3,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "activations": "int8x2",
    "dtype": "bfloat16",
}
OTHER_FLAGS = [
    "--ignore-eos",
    *("--typical", "0.75", "--repeat-last-n", "-1", "--stop", "end", "--stop=\n"),
    *("--logit-bias", "15+1.5", "-l", "7-inf", "--logit-bias=15-.25", "-l", "2+1e-1"),
]
OTHER_OPTIONS = {
    "ignore_eos": True,
    "typical_p": 0.75,
    "penalty_last_n": -1,
    "stop": ("end", "\n"),
    "logit_bias": {15: 1.25, 7: float("-inf"), 2: 0.1},
    "progress": None,
}


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], DEFAULTS),
        (
            [f"--{name.replace('_', '-')}={value}" for name, value in ALL_FLAGS.items()]
            + OTHER_FLAGS,
            ALL_FLAGS | OTHER_OPTIONS,
        ),
    ],
    ids=["none", "all"],
)
def test_flags_reach_the_library_unchanged(path, monkeypatch, flags, options):
    seen = []

    def stream(_, prompt, **keywords):
        seen.append((prompt, keywords))
        yield ql.Piece("", 1, 0.0, "stop", Stats())

    replace_stream(monkeypatch, "generate", stream)
    assert main(["generate", path, "hello", NO_CACHE, *flags]) == 0
    ((prompt, keywords),) = seen
    assert prompt == "hello"
    assert 0 <= keywords["seed"] < 2**32
    assert keywords == options | {"seed": options.get("seed", keywords["seed"])}


def test_flags_name_every_kind_of_activations():
    assert get_args(Activations) == cli.ACTIVATIONS


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_generate_prints_the_text_of_the_library(path, capsys, temperature):
    options = {"temperature": temperature, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    model = ql.load(path)
    result = ql.generate(model, "hello world", max_new_tokens=12, seed=7, **options)
    line = ["generate", path, "hello world", "-n", "12", "--seed", "7", NO_CACHE]
    for _ in range(2):
        assert main([*line, "--temperature", str(temperature)]) == 0
        out, err = capsys.readouterr()
        assert out == result.text + "\n"
        assert err.startswith(f"prompt: {len(model.tokenizer.encode('hello world'))} tokens, ")
        assert f"generated: {len(result.tokens)} tokens, " in err
        assert err.endswith(f"finish: {result.finish_reason}; seed: 7\n")
        assert err.count("\n") == 1


def test_a_stop_text_and_a_ban_change_what_is_printed(path, chat_path, chat, capsys):
    model = ql.load(path)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    free = ql.generate(model, "hello world", **options)
    line = ["generate", path, "hello world", "-n", "12", "--temperature", "0", NO_CACHE]
    banned = free.tokens[0]
    assert main([*line, "-l", f"{banned}-inf"]) == 0
    out, _ = capsys.readouterr()
    expected = ql.generate(model, "hello world", banned_tokens=[banned], **options)
    assert out == expected.text + "\n"
    assert expected.tokens[0] != banned
    stop = free.text[2:4]
    assert main([*line, "--stop", stop]) == 0
    assert capsys.readouterr().out == free.text[: free.text.find(stop)] + "\n"
    answer = answers(chat_path(), ["hello"])[:-1]
    _, out, err = chat(chat_path(), "hello\n", "--stop", answer[1])
    assert out == answer[: answer.find(answer[1])] + "\n"
    assert "finish: stop" in err


def test_the_seed_of_the_closing_line_repeats_a_run(path, capsys):
    line = ["generate", path, "hello world", "-n", "12", "--temperature", "5", NO_CACHE]
    runs = []
    for _ in range(2):
        assert main(line) == 0
        out, err = capsys.readouterr()
        match = re.search(r"seed: (\d+)\n", err)
        assert match is not None
        runs.append((match[1], out))
    (seed, text), (other_seed, _) = runs
    assert seed != other_seed
    assert main([*line, "--seed", seed]) == 0
    assert capsys.readouterr().out == text


def test_a_bar_on_a_terminal_leaves_stdout_alone(path, capsys, monkeypatch):
    line = ["generate", path, "hello", "-n", "4", "--temperature", "0", NO_CACHE]
    assert main(line) == 0
    plain, quiet = capsys.readouterr()
    assert "loading" not in quiet
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert "loading" in err
    total = sum(tensor.nbytes for tensor in ql.read_gguf(path).tensors.values())
    assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in err


def test_a_bar_of_a_long_prompt_on_a_terminal_leaves_stdout_alone(path, capsys, monkeypatch):
    monkeypatch.setattr(session, "PREFILL_CHUNK", 8)
    line = ["generate", path, "hello" * 10, "-n", "4", "--temperature", "0", NO_CACHE]
    assert main(line) == 0
    plain, quiet = capsys.readouterr()
    assert "prompt " not in quiet.replace("prompt: ", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert out == plain
    count = re.search(r"prompt: (\d+) tokens", quiet)
    assert count is not None
    assert f"{count[1]}/{count[1]}" in err


def test_control_c_keeps_the_text_so_far_and_is_exit_code_130(path, capsys, monkeypatch):
    interrupted = raising(KeyboardInterrupt(), ql.Piece("so far", 1, 0.0))
    replace_stream(monkeypatch, "generate", interrupted)
    assert main(["generate", path, "x", NO_CACHE]) == 130
    assert capsys.readouterr() == ("so far\n", "\n")
