"""What is no GGUF file at all is refused and named: other formats, other kinds of path."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_bytes import TinyGGUF
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf
from refusals import message_of

BASE = TinyGGUF().encode()
refused = functools.partial(message_of, read_gguf)

OTHER_FILES = {
    "empty": (b"", "header: the file is empty (0 bytes)"),
    "half a magic": (b"GG", "preamble ends at byte 24 but the file has 2 bytes; it is truncated"),
    "wrong magic": (b"GGUG" + BASE[4:], "not a GGUF file: it starts with b'GGUG"),
    "html": (b"\n<!DOCTYPE html>\n<html>404</html>", "an HTML page"),
    "html without doctype": (b"<HTML><body>404</body>", "an HTML page"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n",
        "a git-LFS pointer",
    ),
    "legacy ggml": (b"lmgg" + BASE[4:], "a legacy GGML model"),
    "legacy ggmf": (b"fmgg" + BASE[4:], "a legacy GGMF model"),
    "legacy ggjt": (b"tjgg" + BASE[4:], "a legacy GGJT model"),
    "legacy adapter": (b"algg" + BASE[4:], "a legacy GGML adapter"),
    "legacy session": (b"nsgg" + BASE[4:], "a saved llama.cpp session"),
    "reversed magic": (b"FUGG" + BASE[4:], "a big-endian file"),
    "zip": (b"PK\x03\x04" + BASE[4:], "a zip archive, such as a PyTorch checkpoint"),
    "hole": (bytes(4096), "zeros: an interrupted download"),
    "escapes": (b"\x1b[2J" + BASE[4:], r"it starts with b'\x1b[2J"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_refused_and_named(tmp_path, name):
    raw, wanted = OTHER_FILES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert wanted in refused(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # its name may have 107 bytes


SPECIAL_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "directory": (lambda path: path.mkdir(), "is a directory, wanted a regular file"),
    "fifo": (os.mkfifo, "is a FIFO, wanted a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a character device, wanted"),
    "socket": (make_socket, "is a socket, wanted a regular file"),
}


@pytest.mark.parametrize("name", SPECIAL_FILES)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, wanted = SPECIAL_FILES[name]
    path = tmp_path / "m.gguf"
    make(path)
    assert wanted in refused(path)


def test_a_fifo_that_takes_the_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    path, fifo = tmp_path / "m.gguf", tmp_path / "fifo"
    path.write_bytes(BASE)
    os.mkfifo(fifo)
    regular = path.stat()
    fifo.replace(path)
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: regular)
    assert "is a FIFO" in refused(path)


def test_a_path_below_a_file_or_with_a_nul_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(BASE)
    assert "cannot be read: Not a directory" in refused(path / "below")
    # Not below tmp_path: an error shortens a long name.
    with pytest.raises(GGUFError, match=r"^'/m\\x00\.gguf': no such file"):
        read_gguf("/m\0.gguf")


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "blob").write_bytes(BASE)
    (tmp_path / "m.gguf").symlink_to("blob")
    assert list(read_gguf(tmp_path / "m.gguf").tensors) == ["one", "two", "three"]


def test_what_is_no_path_is_a_type_error():
    with pytest.raises(TypeError):
        read_gguf(0)  # pyright: ignore  # not standard input, on which open(0) would wait
