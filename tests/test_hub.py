"""Names on the hub become files in the hub library's cache; a local server stands in for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qllama_jax.errors import GGUFError
from qllama_jax.hub import is_hub_name
from qllama_jax.model_file import read_model_file
from tiny import write_tiny_llama

COMMIT = "0" * 40
SMALL = {"layers": 1, "embed": 32, "ffn": 32, "heads": 2, "kv_heads": 1}


class Hub(ThreadingHTTPServer):
    """The two things that the client asks of a hub: what is in a repository, and a file of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = files
        self.downloads: list[str] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/some/model"):
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": COMMIT}
                for name, body in self.server.files.items()
            ]
            return self.answer(200, json.dumps(listed).encode(), {})
        name = self.path.removeprefix("/some/model/resolve/main/")
        name = name.removeprefix(f"/some/model/resolve/{COMMIT}/")
        if name not in self.server.files:
            code = "EntryNotFound" if "/some/model/" in self.path else "RepoNotFound"
            return self.answer(404, b"", {"X-Error-Code": code})
        body = self.server.files[name]
        if self.command == "GET":
            self.server.downloads.append(name)
        etag = hashlib.sha256(body).hexdigest()
        self.answer(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    files = {"README.md": b"a model"}
    for qtype in ("Q4_0", "Q8_0"):
        written = write_tiny_llama(folder / "a.gguf", qtype, **SMALL)  # type: ignore[arg-type]
        files[f"tiny-{qtype.lower()}.gguf"] = written.read_bytes()
    files["sub/other-Q8_0.gguf"] = files["tiny-q8_0.gguf"]
    files["big-Q6_K-00001-of-00002.gguf"] = b"GGUF first"
    files["big-Q6_K-00002-of-00002.gguf"] = b"GGUF second"
    files["mmproj-tiny-Q4_0.gguf"] = files["MMPROJ-Q4_0.gguf"] = b"GGUF of images"
    files["imatrix-tiny-Q4_0.gguf"] = b"GGUF of statistics"
    for name in ("a-Q3_K_M", "a-UD-Q3_K_M", "a-Q3_K_M-old"):
        files[f"{name}.gguf"] = b"GGUF"
    for count in (2, 3):  # the same name, cut twice
        for part in range(1, count + 1):
            files[f"cut-Q2_K-{part:05d}-of-{count:05d}.gguf"] = b"GGUF"
    files["IQ1_S/m-00001-of-00002.gguf"] = files["IQ1_S/m-00002-of-00002.gguf"] = b"GGUF"
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(hub: Hub, cache: Path, code: str, **environment: str) -> str:
    """What a fresh process prints: the hub library reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "JAX_PLATFORMS": "cpu",
        "no_proxy": "*",
    }
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LOAD = "import qllama_jax as ql; m = ql.load({!r}); print(m.path.name, m.config.embed_dim)"
REFUSED = """
from qllama_jax.hub import fetch
from qllama_jax.errors import GGUFError
try:
    fetch({!r})
except GGUFError as error:
    print(error)
"""


def test_a_file_and_a_tag_load_and_come_from_the_cache_the_second_time(hub: Hub, tmp_path: Path):
    hub.downloads.clear()
    for name in ("hf://some/model/tiny-q4_0.gguf", "some/model:Q4_0", "hf://some/model:q4_0"):
        assert ask(hub, tmp_path, LOAD.format(name)) == "tiny-q4_0.gguf 32"
    assert hub.downloads == ["tiny-q4_0.gguf"]
    name = "hf://some/model/tiny-q4_0.gguf"
    assert ask(hub, tmp_path, LOAD.format(name), HF_HUB_OFFLINE="1") == "tiny-q4_0.gguf 32"


def test_the_command_line_takes_a_name_wherever_it_takes_a_file(hub: Hub, tmp_path: Path):
    call = "from qllama_jax.cli import main; main(['info', 'some/model:Q4_0'])"
    assert "'tiny-q4_0.gguf', GGUF version 3" in ask(hub, tmp_path, call)


FETCH = """
from qllama_jax.hub import fetch
path = fetch({!r})
print(path.name, *sorted(other.name for other in path.parent.iterdir()))
"""


def test_all_parts_of_a_split_file_are_fetched(hub: Hub, tmp_path: Path):
    both = "big-Q6_K-00001-of-00002.gguf big-Q6_K-00002-of-00002.gguf"
    first, second = both.split()
    assert ask(hub, tmp_path / "a", FETCH.format("some/model:Q6_K")) == f"{first} {both}"
    for part in (first, second):
        name = f"hf://some/model/{part}"
        assert ask(hub, tmp_path / part, FETCH.format(name)) == f"{part} {both}"


def test_the_parts_are_those_that_the_name_counts_and_come_from_the_cache_offline(
    hub: Hub, tmp_path: Path
):
    three = [f"cut-Q2_K-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    code = FETCH.format(f"hf://some/model/{three[1]}")
    wanted = " ".join([three[1], *three])
    assert ask(hub, tmp_path, code) == wanted
    assert ask(hub, tmp_path, code, HF_HUB_OFFLINE="1") == wanted


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_0", "tiny-q4_0.gguf"),  # beside what belongs to a model and is none
        ("Q3_K_M", "a-Q3_K_M.gguf"),
        ("UD-Q3_K_M", "a-UD-Q3_K_M.gguf"),
        ("IQ1_S", "m-00001-of-00002.gguf"),  # by its folder
    ],
)
def test_a_tag_means_the_plainest_model_that_has_it(hub: Hub, tmp_path: Path, tag: str, file: str):
    code = f"from qllama_jax.hub import fetch; print(fetch('some/model:{tag}').name)"
    assert ask(hub, tmp_path, code) == file


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some/model:Q5_K", "no model of that name; there are IQ1_S/m-00001-of-00002.gguf, a-Q3_"),
        ("some/model:Q4", "no model of that name"),
        (
            "some/model:Q8_0",
            "2 models of that name; give one in full: hf://some/model/sub/other-Q8_0.gguf,"
            " hf://some/model/tiny-q8_0.gguf",
        ),
        (
            "some/model:Q2_K",
            "2 models of that name; give one in full: hf://some/model/cut-Q2_K-00001-of-00002.gguf,"
            " hf://some/model/cut-Q2_K-00001-of-00003.gguf",
        ),
        ("hf://some/model/none.gguf", "the hub does not give it: 404"),
        ("hf://some/model/none-00001-of-00002.gguf", "the hub does not give it: 404"),
        ("hf://some/model/a-00001-of-00000.gguf", "part 1 of 0, wanted a part in 1..0"),
        ("hf://some/model/a-00003-of-00002.gguf", "part 3 of 2, wanted a part in 1..2"),
        ("hf://some/model/a-00000-of-00002.gguf", "part 0 of 2, wanted a part in 1..2"),
        ("hf://some/nothing/a.gguf", "the hub does not give it: "),
        ("hf://some/model", "wanted hf://owner/repo/file.gguf or owner/repo:QUANTIZATION"),
    ],
)
def test_what_the_hub_has_not_or_has_twice_is_refused(
    hub: Hub, tmp_path: Path, name: str, says: str
):
    printed = ask(hub, tmp_path, REFUSED.format(name))
    assert printed.startswith(f"{name}: ")
    assert says in printed


def test_a_repository_without_a_model_is_said_to_have_none(tmp_path: Path):
    server = Hub({"README.md": b"", "mmproj-Q8_0.gguf": b"GGUF"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        printed = ask(server, tmp_path, REFUSED.format("some/model:Q8_0"))
    finally:
        server.shutdown()
        server.server_close()
    assert printed.endswith("no model of that name: the repository has no .gguf file of a model")


def test_a_hub_name_in_a_path_is_told_to_be_a_str(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(GGUFError, match=r"^hf:/a/b/c\.gguf: no such file; .* as a str"):
        read_model_file(Path("hf://a/b/c.gguf"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:").mkdir()
    write_tiny_llama(tmp_path / "hf:" / "c.gguf", **SMALL)  # type: ignore[arg-type]
    assert "token_embd.weight" in read_model_file(Path("hf:/c.gguf")).tensors


def test_a_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert is_hub_name("hf://a/b/c.gguf")
    assert is_hub_name("owner/repo:Q4_K_M")
    for name in ("a.gguf", "folder/a.gguf", "/folder/a.gguf", "owner/repo", tmp_path, "a/b/c:d"):
        assert not is_hub_name(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "repo:Q4_K_M").write_bytes(b"")
    assert not is_hub_name("owner/repo:Q4_K_M")
