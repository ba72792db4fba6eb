"""A file that is cut or damaged is refused, or read as gguf-py reads it."""

from __future__ import annotations

import dataclasses
import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_bytes import TinyGGUF, assert_same_metadata, assert_same_tensors, read_with_gguf_py
from qllama_jax import gguf_header
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf


def test_data_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(TinyGGUF().encode())
    tensor = read_gguf(path).tensors["three"]
    longer = dataclasses.replace(tensor, shape=(2, 2, 16), nbytes=128)
    with pytest.raises(
        GGUFError,
        match=r"tensor 'three' \(data at byte \d+\): the file shrank: it ends 96 bytes before",
    ):
        _ = longer.data


def test_a_header_that_ends_early_is_refused():
    raw = TinyGGUF().encode()
    for have in range(len(TinyGGUF().header())):
        with pytest.raises(GGUFError, match=f"the file ended at byte {have} while .* shrank"):
            gguf_header.read_header(io.BytesIO(raw[:have]), "m.gguf", len(raw))


def test_a_file_cut_anywhere_is_refused_and_only_final_padding_may_be_missing(tmp_path):
    tiny = TinyGGUF()
    raw = tiny.encode()
    needed = len(raw) - len(tiny.end)
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw)
    reader = read_with_gguf_py(path)
    cut_path = tmp_path / "shorter.gguf"
    for cut in range(len(raw) + 1):
        cut_path.write_bytes(raw[:cut])
        if cut < needed:
            with pytest.raises(GGUFError) as caught:
                read_gguf(cut_path)
            assert str(caught.value).startswith(f"{cut_path}: ")
            assert f"{cut} bytes" in str(caught.value) or f"has {cut}" in str(caught.value)
        else:
            whole = read_gguf(cut_path)
            assert [t.data.tobytes() for t in whole.tensors.values()] == [
                t.data.tobytes() for t in reader.tensors
            ]


def test_cutting_a_file_at_a_region_boundary_names_the_tensor_and_the_part_that_is_there(tmp_path):
    raw = TinyGGUF().encode()
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    for name, tensor in read_gguf(path).tensors.items():
        last = tensor.offset + tensor.nbytes
        for cut in (tensor.offset, last - 1):
            path.write_bytes(raw[:cut])
            with pytest.raises(GGUFError) as caught:
                read_gguf(path)
            share = f"incomplete ({100 * cut // len(raw)}%)"
            there = f"data ends at byte {last} but the file has {cut} bytes"
            text = str(caught.value)
            assert f"tensor '{name}' (header offset " in text
            assert there in text
            assert share in text


BASE = TinyGGUF().encode()
WORDS = [0, 1, 2, 31, 2**31, 2**32 - 1, 2**32, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
place = st.integers(0, len(BASE) - 1)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The tiny file with one byte, one word or one stretch of bytes wrong."""
    raw = bytearray(BASE)
    at = draw(place)
    match draw(st.sampled_from(["byte", "byte", "word", "delete", "repeat", "zero"])):
        case "byte":
            raw[at] ^= draw(st.integers(1, 255))
        case "word":
            raw[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(WORDS)))
        case "delete":
            del raw[at : at + draw(st.integers(1, 64))]
        case "repeat":
            raw[at:at] = raw[at : at + draw(st.integers(1, 64))]
        case "zero":
            stop = min(len(raw), at + draw(st.integers(1, 64)))
            raw[at:stop] = bytes(stop - at)
    return bytes(raw)


def refusal(path: Path) -> str | None:
    """Message of the error with which a file is refused; None for one that is read."""
    try:
        read_gguf(path)
    except GGUFError as error:
        return str(error)
    return None


def assert_refused_or_read_as_gguf_py_reads_it(raw: bytes, path: Path) -> bool:
    path.unlink(missing_ok=True)  # a mapping of the last one may still be alive
    path.write_bytes(raw)
    if message := refusal(path):
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
        return False
    file, reader = read_gguf(path), read_with_gguf_py(path)
    assert_same_metadata(file, reader)
    assert_same_tensors(file, [reader])
    return True


@settings(max_examples=600, deadline=None)
@given(raw=damaged())
def test_a_damaged_file_is_refused_or_read_as_gguf_py_reads_it(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    assert_refused_or_read_as_gguf_py_reads_it(raw, path)


def test_every_flipped_bit_of_the_header_is_refused_or_read_as_gguf_py_reads_it(tmp_path):
    size = len(TinyGGUF().header())
    accepted = 0
    for at in range(size):
        for bit in (0, 7):
            raw = bytearray(BASE)
            raw[at] ^= 1 << bit
            accepted += assert_refused_or_read_as_gguf_py_reads_it(bytes(raw), tmp_path / "f.gguf")
    assert 0 < accepted < size  # letters in names and strings may differ
