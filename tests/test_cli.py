"""The command line says what the library computes, and one line where it cannot."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import gguf
import jax
import pytest

import qllama_jax as ql
from qllama_jax import cli, session
from qllama_jax.cli import main
from qllama_jax.compilation_cache import set_compilation_cache
from qllama_jax.matmul import Activations
from qllama_jax.session import Stats

ROOT = Path(__file__).resolve().parent.parent
NO_CACHE = "--no-compilation-cache"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
)
CACHE_SETTINGS = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture(autouse=True)
def cache_settings():
    """JAX's settings are the process's: put back what a command line changes."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    for name, value in CACHE_SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def path(tiny_llama) -> str:
    return str(tiny_llama("Q4_0", layers=1))


@pytest.fixture
def chat_path(tiny_llama):
    """Function: keywords of `tiny_llama` -> path of a model with a chat template."""

    def write(**options) -> str:
        metadata = {"tokenizer.chat_template": TEMPLATE}
        path = tiny_llama("Q4_0", layers=1, tokenizer="gpt2", metadata=metadata, **options)
        return str(path)

    return write


@pytest.fixture
def chat(monkeypatch, capsys):
    """Function: path, typed text and flags -> exit code, stdout, stderr of a greedy chat."""

    def run(path: str, typed: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main(["chat", path, NO_CACHE, "--temperature", "0", "-n", "4", *flags])
        return code, *capsys.readouterr()

    return run


def answers(path: str, texts: list[str], system: str | None = None, new_tokens: int = 4) -> str:
    """What a greedy chat prints for the user's texts, by the library alone."""
    model, shown = ql.load(path), ""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in texts:
        messages.append({"role": "user", "content": text})
        ids = model.tokenizer.encode(model.tokenizer.apply_chat_template(messages))
        answer = ql.generate(model, ids, max_new_tokens=new_tokens).text
        messages.append({"role": "assistant", "content": answer})
        shown += answer + "\n"
    return shown


def python(*arguments: str, **options) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **options)


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
    monkeypatch.setattr(importlib.import_module("qllama_jax.generate"), "stream", failing)
    assert main(["generate", path, "x", NO_CACHE]) == 2
    shown = str(error).replace("\n", "\\n")
    assert capsys.readouterr() == ("so far\n", f"qllama: error: {shown}\n")


def raising(error: BaseException, *pieces: ql.Piece):
    """A `stream` that gives some pieces, then raises."""

    def stream(*_, **__):
        yield from pieces
        raise error

    return stream


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

    monkeypatch.setattr(importlib.import_module("qllama_jax.generate"), "stream", stream)
    assert main(["generate", path, "hello", NO_CACHE, *flags]) == 0
    ((prompt, keywords),) = seen
    assert prompt == "hello"
    assert 0 <= keywords["seed"] < 2**32
    assert keywords == options | {"seed": options.get("seed", keywords["seed"])}


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


def test_flags_name_every_kind_of_activations():
    assert get_args(Activations) == cli.ACTIVATIONS


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


@pytest.mark.parametrize("system", [None, "and"])
def test_chat_answers_with_the_whole_conversation_as_prompt(chat_path, chat, system):
    flags = [] if system is None else ["--system", system]
    code, out, err = chat(chat_path(), "hello\n\n  the \n", *flags)
    assert code == 0
    assert out == answers(chat_path(), ["hello", "the"], system)
    assert err.count("finish: ") == 2


def test_clear_forgets_all_but_the_system_message(chat_path, chat):
    _, out, _ = chat(chat_path(), "hello\n/clear\nthe world\n", "--system", "and")
    again = answers(chat_path(), ["the world"], "and")
    assert out == answers(chat_path(), ["hello"], "and") + again


def test_exit_ends_a_chat_before_the_end_of_input(chat_path, chat):
    code, out, _ = chat(chat_path(), "hello\n/exit\nthe world\n")
    assert code == 0
    assert out == answers(chat_path(), ["hello"])


def test_a_message_too_long_for_the_context_is_forgotten_with_an_error(chat_path, chat):
    path = chat_path(context_length=48)
    code, out, err = chat(path, "x" * 48 + "\nhello\n")
    assert code == 0
    assert out == answers(path, ["hello"])
    error, hint, closing = err.splitlines()
    assert error.startswith("qllama: error: prompt of ")
    assert "context is 48 tokens" in error
    assert hint.startswith("/clear")
    assert "finish: " in closing


def test_an_answer_may_fill_the_context(chat_path, chat):
    path = chat_path(context_length=48)
    model = ql.load(path)
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    room = 48 - len(model.tokenizer.encode(text))
    assert 0 < room < 100
    _, out, _ = chat(path, "hello\n", "-n", "100")
    assert out == answers(path, ["hello"], new_tokens=room)


def test_control_c_ends_an_answer_which_stays_in_the_history_as_far_as_it_got(
    chat_path, chat, monkeypatch
):
    prompts = []

    def stream(model, ids, **_):
        prompts.append(model.tokenizer.decode(ids, skip_special=False))
        if len(prompts) == 2:
            raise KeyboardInterrupt
        yield ql.Piece("an answer", 1, 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("qllama_jax.chat"), "stream", stream)
    code, out, _ = chat(chat_path(), "one\ntwo\nthree\n")
    assert code == 0
    assert out == "an answer\n\nan answer\n"
    one, ask = "<|im_start|>u one<|im_end|>", "<|im_end|><|im_start|>a "
    then = one + "<|im_start|>a an answer<|im_end|>"
    assert prompts == [
        one + "<|im_start|>a ",
        then + "<|im_start|>u two" + ask,
        then + "<|im_start|>u three" + ask,
    ]


def test_control_c_keeps_the_text_so_far_and_is_exit_code_130(path, capsys, monkeypatch):
    interrupted = raising(KeyboardInterrupt(), ql.Piece("so far", 1, 0.0))
    monkeypatch.setattr(importlib.import_module("qllama_jax.generate"), "stream", interrupted)
    assert main(["generate", path, "x", NO_CACHE]) == 130
    assert capsys.readouterr() == ("so far\n", "\n")


def test_a_reader_that_goes_away_is_no_error(path):
    command = [sys.executable, "-m", "qllama_jax", "info", path]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def facts(text: str) -> dict[str, str]:
    """Label -> text of `qllama info`'s lines."""
    pairs = [(line[:15].strip(), line[15:]) for line in text.splitlines()]
    return {label: text for label, text in pairs if label}


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


NO_JAX = """
import sys, types
package = types.ModuleType("qllama_jax")  # its own __init__ may import what it likes
package.__path__, package.__version__ = ["qllama_jax"], "1"
sys.modules["qllama_jax"] = package
from qllama_jax.cli import main
codes = main(["info", sys.argv[1]]), main(["generate", "-n", "0"])
assert codes == (0, 2), codes
assert "jax" not in sys.modules
"""


def test_the_modules_of_info_and_bad_flags_import_no_jax(path):
    done = python("-c", NO_JAX, path)
    assert done.returncode == 0, done.stderr


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


def test_help_and_version_are_exit_code_0(capsys):
    for line in (["--help"], ["generate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit_:
            main(line)
        assert exit_.value.code == 0
    assert capsys.readouterr().out.endswith(f"qllama_jax {ql.__version__}\n")


def test_module_and_command_line_are_the_same_and_fill_the_cache(path, tmp_path, capsys):
    line = ["generate", path, "hello", "-n", "4", "--seed", "1"]
    assert main([*line, NO_CACHE]) == 0
    text = capsys.readouterr().out
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = python("-m", "qllama_jax", *line, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == text
    folder = tmp_path / "qllama_jax" / "xla"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(folder.iterdir())


def test_cache_goes_where_it_may(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "qllama_jax" / "xla"
    set_compilation_cache(False)
    assert not folder.exists()
    assert jax.config.jax_enable_compilation_cache is False

    jax.config.update("jax_compilation_cache_dir", "/the/users/own")
    set_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir == "/the/users/own"
    assert not folder.exists()

    jax.config.update("jax_compilation_cache_dir", None)
    folder.mkdir(parents=True)
    folder.chmod(0o777)  # anybody could put code there
    set_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr().err.count("\n") == 1

    folder.chmod(0o700)
    set_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir == str(folder)

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    set_compilation_cache(True)
    expected = tmp_path / "home" / ".cache" / "qllama_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(expected)


def test_control_c_ends_a_run_at_once_also_while_it_compiles(path):
    script = (
        "import os, signal, sys, threading, time\n"
        "from qllama_jax import cli, generate\n"
        "def stream(*_, **__):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    import jax, jax.numpy as jnp\n"
        "    while True:\n"  # busy outside of Python, where a KeyboardInterrupt can be lost
        "        try:\n"
        "            jax.jit(lambda x: jnp.linalg.svd(x))(jnp.ones((3, 3))).S.block_until_ready()\n"
        "            time.sleep(0.01)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "sys.modules['qllama_jax.generate'].stream = stream\n"
        "sys.exit(cli.main(['generate', sys.argv[1], 'x', '--no-compilation-cache']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def test_a_template_can_be_given(chat, path, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    code, out, err = chat(path, "hello\n", "--chat-template", str(template), "-n", "2")
    assert code == 0, err
    assert out


def test_an_empty_template_is_no_template(chat, tiny_llama):
    path = str(tiny_llama("Q4_0", layers=1, metadata={"tokenizer.chat_template": ""}))
    code, out, err = chat(path, "hello\n")
    assert (code, out) == (2, "")
    assert "no chat template" in err
    assert "--chat-template" in err


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
