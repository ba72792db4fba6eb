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

from qllama_jax.hub import is_hub_name
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


def test_all_parts_of_a_split_file_are_fetched(hub: Hub, tmp_path: Path):
    fetch = (
        "from qllama_jax.hub import fetch; p = fetch({!r});"
        " print(p.name, len(list(p.parent.iterdir())))"
    )
    wanted = "big-Q6_K-00001-of-00002.gguf 2"
    assert ask(hub, tmp_path / "a", fetch.format("some/model:Q6_K")) == wanted
    name = "hf://some/model/big-Q6_K-00001-of-00002.gguf"
    assert ask(hub, tmp_path / "b", fetch.format(name)) == wanted


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some/model:Q5_K", "0 files of that name; there are big-Q6_K-00001-of-00002.gguf, "),
        ("some/model:Q4", "0 files of that name"),
        ("some/model:Q8_0", "2 files of that name; there are sub/other-Q8_0, tiny-q8_0"),
        ("hf://some/model/none.gguf", "the hub does not give it: 404"),
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


def test_a_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert is_hub_name("hf://a/b/c.gguf")
    assert is_hub_name("owner/repo:Q4_K_M")
    for name in ("a.gguf", "folder/a.gguf", "/folder/a.gguf", "owner/repo", tmp_path, "a/b/c:d"):
        assert not is_hub_name(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "repo:Q4_K_M").write_bytes(b"")
    assert not is_hub_name("owner/repo:Q4_K_M")
