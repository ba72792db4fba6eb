"""Nothing in a file is executed and nothing but the file is opened: what Python's audit hooks see.

And the package has no code that could: no eval or exec, no pickle, no other process, no socket.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qllama_jax as ql
from mutations import OPERATORS
from mutations.bases import make_bases
from mutations.judge import make_mutant
from mutations.operators import Base, Files

# What is opened

recorded: list[tuple[str, str]] | None = None
#: Kinds of events that reach outside of the process or run code, but for `open`.
OUTSIDE = ("os.", "shutil.", "tempfile.", "glob.", "subprocess.", "pty.", "ctypes.", "mmap.")
OUTSIDE += ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "pickle.", "marshal.", "sqlite3.")
#: Where Linux says how much memory is free.
ABOUT_MEMORY = ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup/")


def record(event: str, arguments: tuple) -> None:
    if recorded is not None and (event == "open" or event.startswith(OUTSIDE)):
        recorded.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(record)  # for good: Python cannot remove it


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Everything that is opened or reached meanwhile, in any thread."""
    global recorded
    seen = recorded = []
    try:
        yield seen
    finally:
        recorded = None


def reached(function: Callable[[], object]) -> set[tuple[str, str]]:
    """What a second call reaches: the first one imports modules."""
    function()
    with recording() as seen:
        function()
    return {(event, what) for event, what in seen if not what.startswith(ABOUT_MEMORY)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Base, Files]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", ["names_of_files_among_the_keys", "template_that_is_hostile"])
def test_loading_opens_the_given_file_and_its_parts_and_nothing_else(
    bases: dict[Base, Files], tmp_path: Path, name: str
):
    operator = OPERATORS[name]
    path, _ = make_mutant(operator, operator.bases[0], 0, bases, tmp_path)
    found = reached(lambda: ql.load(path).tokenizer)
    assert found == {("open", str(part)) for part in tmp_path.iterdir()}
    assert len(found) == (3 if "split" in operator.bases else 1)


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content']|trim }}{% endfor %}"


@pytest.mark.parametrize("tokenizer", ["llama", "gpt2"])
def test_tokenizing_and_rendering_a_template_open_nothing(
    tiny_llama: Callable[..., Path], tokenizer: str
):
    path = tiny_llama("F32", layers=1, embed=32, ffn=32, heads=2, kv_heads=1, tokenizer=tokenizer)
    made = ql.load(path, chat_template=TEMPLATE).tokenizer
    messages = [{"role": "user", "content": " /etc/passwd file:///etc/passwd {{ 7 }} "}]

    def use() -> None:
        text = made.apply_chat_template(messages)
        assert text == "<|user|>/etc/passwd file:///etc/passwd {{ 7 }}"
        assert made.decode(made.encode(text)) == text

    assert reached(use) == set()


def test_generating_and_scoring_open_nothing(tiny_llama: Callable[..., Path]):
    path = tiny_llama("F32", layers=1, embed=32, ffn=32, heads=2, kv_heads=1)
    model = ql.load(path)

    def use() -> None:
        ql.generate(model, "hello", max_new_tokens=3)
        ql.score(model, "hello there")

    assert reached(use) == set()


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("open('/dev/null').close()", "open"),
        ("import os; os.system('true')", "os.system"),
        ("import socket; socket.socket().close()", "socket.__new__"),
        ("import pickle; pickle.loads(pickle.dumps(tuple))", "pickle.find_class"),
        ("import os; os.listdir('/')", "os.listdir"),
    ],
)
def test_what_reaches_out_would_be_seen(code: str, event: str):
    assert event in {found for found, _ in reached(lambda: exec(code))}


# What the package could do

PACKAGE = Path(__file__).resolve().parent.parent / "qllama_jax"
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "multiprocessing", "pty"}
MODULES |= {"socket", "socketserver", "ssl", "http", "urllib", "ftplib", "smtplib", "telnetlib"}
MODULES |= {"requests", "httpx", "aiohttp", "ctypes", "cffi", "code", "codeop", "runpy", "imp"}
MODULES |= {"webbrowser", "mmap"}
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
#: Methods by which a process starts another, runs what it is given, or maps a file.
METHODS = {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile"}
METHODS |= {"import_module", "memmap", "fromfile", "loadtxt"}
METHODS |= {f"{kind}{end}" for kind in ("exec", "spawn") for end in ("l", "le", "lp", "v", "ve")}


def dangers(source: str) -> set[str]:
    """Names in a module's source of what this package may not use, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found |= {(node.module or "").split(".")[0]} & MODULES
            found |= names & (METHODS | CALLS)
        elif isinstance(node, ast.Name):
            found |= {node.id} & (CALLS | {"__builtins__"})
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "args":
            found |= {node.attr} & METHODS  # but for flags of the command line
        elif isinstance(node, ast.keyword):
            found |= {node.arg} & {"allow_pickle", "shell"}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_runs_code_starts_a_process_or_opens_a_socket(path: Path):
    # XLA's function of that name; glibc's malloc_trim; and the argument --system.
    allowed = {"compiling": {"compile", "ctypes"}, "cli": {"system"}}.get(path.stem, set())
    assert dangers(path.read_text()) - allowed == set()


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "run = exec",
        "from builtins import eval",
        "import subprocess",
        "def f():\n    import pickle as p",
        "from urllib.request import urlopen",
        "import os\nos.system('true')",
        "from os import execv",
        "import importlib\nimportlib.import_module('x')",
        "np.load(path, allow_pickle=True)",
        "np.memmap(path)",
        "__builtins__['eval']",
    ],
)
def test_what_could_would_be_found(source: str):
    assert dangers(source)
