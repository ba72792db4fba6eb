"""What an interrupted or mistaken download leaves is refused, and the error says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qllama_jax as ql
from gguf_bytes import assert_same_metadata, assert_same_tensors, read_with_gguf_py

SMALL: dict[str, Any] = {"layers": 1, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def path(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("Q4_0", vocab=289, **SMALL)


def refused(path: Path) -> str:
    with pytest.raises(ql.GGUFError) as caught:
        ql.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def boundaries(path: Path) -> dict[str, list[int]]:
    """Where the regions of a file begin and end, by the offsets that gguf-py finds."""
    reader = read_with_gguf_py(path)
    keys = [int(field.offset) for name, field in reader.fields.items() if name[:5] != "GGUF."]
    rows = [int(tensor.field.offset) for tensor in reader.tensors]
    data = [int(tensor.data_offset) for tensor in reader.tensors]
    ends = [int(t.data_offset + t.n_bytes) for t in reader.tensors]
    return {"header": [4, 24, *keys, *rows], "data": [*data, *ends]}


def test_a_download_cut_anywhere_is_said_to_be_cut(path: Path, tmp_path: Path):
    """At and beside every boundary of a region."""
    raw, regions = path.read_bytes(), boundaries(path)
    first, last = min(regions["data"]), max(regions["data"])
    cuts = {at + step for region in regions.values() for at in region for step in (-1, 0, 1)}
    cuts = sorted(cut for cut in cuts if cut < last)
    assert len(cuts) >= 50
    part = tmp_path / "m.gguf.incomplete"
    for cut in cuts:
        part.write_bytes(raw[:cut])
        message = refused(part)
        if cut < first:
            assert f"the file has {cut} bytes; it is truncated" in message or (
                f"file has {cut} bytes; the download is incomplete" in message
            ), message
        else:
            assert message.startswith("tensor '")
            assert (
                f"file has {cut} bytes; the download is incomplete ({100 * cut // len(raw)}%)"
                in (message)
            )
    assert ql.load(path, layout="file").nbytes > 0


@pytest.mark.parametrize("kept", [1, 4, 1000, -1000, -1, None])
def test_a_download_that_began_again_behind_its_first_part_is_refused(
    path: Path, tmp_path: Path, kept: int | None
):
    raw = path.read_bytes()
    both = tmp_path / "m.gguf"
    both.write_bytes(raw[:kept] + raw)
    message = refused(both)
    if kept is None:
        assert f"{len(raw)} bytes follow the last tensor, from byte {len(raw)} on" in message
        assert "something was appended" in message


def test_a_hole_of_zeros_in_the_header_is_refused_or_read_as_gguf_py_reads_it(
    path: Path, tmp_path: Path
):
    """Zeros in place of a sector: all but some among numbers, such as scores, are found."""
    raw, holed = path.read_bytes(), tmp_path / "m.gguf"
    end = max(boundaries(path)["header"])
    refusals = []
    for at in range(0, end, 512):
        holed.unlink(missing_ok=True)
        holed.write_bytes(raw[:at] + bytes(512) + raw[at + 512 :])
        try:
            file = ql.read_gguf(holed)
            ql.load(holed)
        except ql.GGUFError as error:
            refusals.append(str(error))
        else:
            reader = read_with_gguf_py(holed)
            assert_same_metadata(file, reader)
            assert_same_tensors(file, [reader])
            assert b"tokenizer.ggml.scores" in raw[:at]
    assert "it starts with b'" in refusals[0]
    assert "zeros: an interrupted download" in refusals[0]
    assert len(refusals) >= 0.7 * end / 512


OTHERS = {
    "an HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page: the download"),
    "an HTML page in capitals": (b"\r\n<HTML>Sign in</HTML>", "an HTML page: the download"),
    "a page of XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "a git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n",
        "a git-LFS pointer: the file itself was not downloaded",
    ),
    "an answer in words": (b"Entry not found", "it starts with b'Entry not found', wanted b'GGUF'"),
    "an answer in JSON": (b'{"error":"Repo not found"}', 'it starts with b\'{"error":"Repo n'),
    "nothing": (b"", "the file is empty (0 bytes)"),
    "room for a download": (bytes(100_000), "zeros: an interrupted download"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_is_said_to_be_what_it_is(tmp_path: Path, name: str):
    body, wanted = OTHERS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(body)
    message = refused(path)
    assert wanted in message
    assert message.startswith("header: ")
