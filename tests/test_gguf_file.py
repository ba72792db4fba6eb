"""A GGUF file is read as gguf-py reads it; one that changes meanwhile is refused."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from gguf_bytes import (
    TinyGGUF,
    assert_same_metadata,
    assert_same_tensors,
    read_with_gguf_py,
    string,
    typed_array,
    typed_u32,
)
from qllama_jax import gguf_cursor, gguf_file, gguf_header
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf
from qllama_jax.tensor_file import aligned_bytes

INTEGERS = {
    GGUFValueType.UINT8: (0, 255),
    GGUFValueType.INT8: (-128, 127),
    GGUFValueType.UINT16: (0, 65_535),
    GGUFValueType.INT16: (-32_768, 32_767),
    GGUFValueType.UINT32: (0, 2**32 - 1),
    GGUFValueType.INT32: (-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: (0, 2**64 - 1),
    GGUFValueType.INT64: (-(2**63), 2**63 - 1),
}
OTHERS = {
    GGUFValueType.FLOAT32: (0.1, -0.0, float("inf"), float("nan"), 1e-45),
    GGUFValueType.FLOAT64: (0.1, -0.0, float("-inf"), float("nan"), 5e-324),
    GGUFValueType.BOOL: (True, False),
    GGUFValueType.STRING: ("plain", "é▁🦙", "nul \0 inside", "x" * 1000),
}


def write_with_gguf_py(path: Path, version: int = 3, alignment: int | None = None) -> Path:
    """Every kind of value and array, every tensor type in one to four dimensions, random bytes."""
    rng = np.random.default_rng(5)
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for kind, values in (INTEGERS | OTHERS).items():
        for i, value in enumerate(values):
            writer.add_key_value(f"scalar.{kind.name}.{i}", value, kind)
        writer.add_key_value(f"array.{kind.name}", list(values), GGUFValueType.ARRAY, kind)
        writer.add_key_value(f"array.one.{kind.name}", [values[0]], GGUFValueType.ARRAY, kind)
    for i, qtype in enumerate(GGML_QUANT_SIZES):
        _, block_bytes = GGML_QUANT_SIZES[qtype]
        row_bytes = block_bytes * (1 + i % 3)
        shape = (*((2, 3, 5)[: i % 4]), row_bytes)
        raw = rng.integers(0, 256, shape, np.uint8)
        writer.add_tensor(f"blk.{i}.{qtype.name.lower()}", raw, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", version)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_all_kinds_of_values_and_tensors_are_read_as_gguf_py_reads_them(
    tmp_path, version, alignment
):
    path = write_with_gguf_py(tmp_path / "all.gguf", version, alignment)
    file = read_gguf(path)
    reader = read_with_gguf_py(path)
    assert file.version == version
    assert file.path == path
    assert file.metadata.path == str(path)
    assert len(file.tensors) == len(GGML_QUANT_SIZES)
    assert_same_metadata(file, reader)
    assert_same_tensors(file, [reader])


def test_arrays_of_numbers_keep_the_dtype_of_the_file_and_are_read_only(tmp_path):
    metadata = read_gguf(write_with_gguf_py(tmp_path / "all.gguf")).metadata
    for kind in (INTEGERS | OTHERS).keys() - {GGUFValueType.STRING}:
        array = metadata[f"array.{kind.name}"]
        assert array.dtype == np.dtype(kind.name.lower())
        assert not array.flags.writeable


@pytest.mark.parametrize("kind", [*INTEGERS, *OTHERS], ids=lambda kind: kind.name)
def test_an_empty_array_is_read_as_one(tmp_path, kind):
    tiny = TinyGGUF()
    tiny.keys.insert(0, (b"x.none", typed_array(int(kind), 0, b"")))
    path = tmp_path / "empty.gguf"
    path.write_bytes(tiny.encode())
    value = read_gguf(path).metadata["x.none"]
    assert len(value) == 0
    assert isinstance(value, list if kind is GGUFValueType.STRING else np.ndarray)
    assert_same_tensors(read_gguf(path), [read_with_gguf_py(path)])


def test_a_file_of_metadata_alone_may_end_unpadded(tmp_path):
    path = tmp_path / "vocab.gguf"
    header = TinyGGUF(rows=[]).header()
    assert len(header) % 32
    path.write_bytes(header)
    file = read_gguf(path)
    assert file.tensors == {}
    assert len(file.metadata) == 6


@pytest.mark.parametrize("step", [1, 7, 24, 25, 61, 200])
def test_where_the_header_is_cut_into_reads_changes_nothing(tmp_path, monkeypatch, step):
    path = write_with_gguf_py(tmp_path / "all.gguf")
    whole = read_gguf(path)
    monkeypatch.setattr(gguf_cursor, "READ_STEP", step)
    monkeypatch.setattr(gguf_header, "READ_STEP", step)
    pieces = read_gguf(path)
    assert repr(dict(pieces.metadata)) == repr(dict(whole.metadata))
    assert list(pieces.tensors.values()) != []
    assert repr(pieces.tensors) == repr(whole.tensors)


def test_opening_reads_no_more_than_a_step_past_the_header():
    words = b"".join(string(f"word {i}") for i in range(200_000))
    tiny = TinyGGUF(keys=[(b"x.words", typed_array(8, 200_000, words))], data=bytes(10 * 2**20))
    raw = tiny.encode()
    file = io.BytesIO(raw)
    header = gguf_header.read_header(file, "m.gguf", len(raw))
    assert header.end == len(tiny.header()) > 2 * gguf_cursor.READ_STEP
    assert file.tell() <= header.end + gguf_cursor.READ_STEP < len(raw)
    assert header.metadata["x.words"][-1] == "word 199999"


# Tensor bytes


def test_data_is_a_new_writable_array_aligned_to_64_bytes(tmp_path):
    path = write_with_gguf_py(tmp_path / "all.gguf", alignment=8)
    for tensor in read_gguf(path).tensors.values():
        first, second = tensor.data, tensor.data
        assert first.ctypes.data % 64 == 0
        assert first.flags.writeable
        assert first.flags.c_contiguous
        assert not np.shares_memory(first, second)
        before = second.copy()
        first[...] = ~first
        np.testing.assert_array_equal(second, before)
        np.testing.assert_array_equal(tensor.data, before)


def mapping_flags(address: int) -> list[str]:
    """The flags of the piece of memory that has an address, as Linux tells them."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(n, 16) for n in found.groups())
            within = begin <= address < end
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no memory at {address:#x}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="of Linux")
def test_large_memory_asks_for_no_large_pages():
    # Over the 32 MiB that glibc may take from its heap, for parts of which numpy has asked before.
    memory = aligned_bytes(2**26)
    assert memory.ctypes.data % 64 == 0
    assert "hg" not in mapping_flags(memory.ctypes.data + 2**25)


def replace_same_size(path: Path) -> None:
    """Other file under the same name, same size, same time."""
    status = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def cut_same_time(path: Path) -> None:
    status = path.stat()
    os.truncate(path, len(TinyGGUF().header()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES = {
    "inode": replace_same_size,
    "size": cut_same_time,
    "mtime_ns": touch,
    "no such file": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_of_a_file_that_changed_since_opening_is_refused(tmp_path, change):
    path = tmp_path / "m.gguf"
    path.write_bytes(TinyGGUF().encode())
    tensor = read_gguf(path).tensors["one"]
    CHANGES[change](path)
    with pytest.raises(GGUFError, match=change) as caught:
        _ = tensor.data
    assert str(path) in str(caught.value)
    others = set(CHANGES) - {change}
    assert not any(other in str(caught.value) for other in others)


def test_data_of_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(TinyGGUF().encode())
    tensor = read_gguf(path).tensors["one"]
    reading = tensor.source.open()
    reading.__enter__()
    touch(path)
    with pytest.raises(GGUFError, match="changed since it was opened: mtime_ns"):
        reading.__exit__(None, None, None)


def test_a_file_that_changes_while_its_header_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(TinyGGUF().encode())

    def read_and_touch(*arguments):
        touch(path)
        return gguf_header.read_header(*arguments)

    monkeypatch.setattr(gguf_file, "read_header", read_and_touch)
    with pytest.raises(GGUFError, match="changed since it was opened: mtime_ns"):
        read_gguf(path)


# Which files are opened


opened: list[str] | None = None


def record(event: str, arguments: tuple) -> None:
    if event == "open" and opened is not None:
        opened.append(os.path.basename(str(arguments[0])))


sys.addaudithook(record)  # for good: Python cannot remove it


def test_no_path_is_opened_that_a_file_names(tmp_path):
    global opened
    tiny = TinyGGUF()
    bait = tmp_path / "bait.gguf"
    bait.write_bytes(tiny.encode())
    tiny.keys.append((b"general.base_model.0.url", b"\x08\0\0\0" + string(str(bait))))
    tiny.keys.append((b"split.no", typed_u32(0)))
    tiny.keys.append((b"split.count", typed_u32(2)))
    tiny.keys.append((b"split.tensors.count", typed_u32(4)))
    one, two = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    one.write_bytes(tiny.encode())
    tiny.keys[-3] = (b"split.no", typed_u32(1))
    tiny.rows, tiny.data, tiny.end = tiny.rows[:1], tiny.data[:32], b""
    tiny.rows[0].name = b"four"
    two.write_bytes(tiny.encode())
    opened = []
    try:
        file = read_gguf(one)
        _ = [tensor.data for tensor in file.tensors.values()]
    finally:
        seen, opened = opened, None
    assert list(file.tensors) == ["one", "two", "three", "four"]
    assert set(seen) == {one.name, two.name}


# A real file


def test_smollm2_has_its_known_keys_and_tensors_and_gguf_py_agrees(smollm2_path):
    file = read_gguf(smollm2_path)
    assert file.version == 3
    assert len(file.metadata) == 33
    assert file.metadata.get_str("general.architecture") == "llama"
    tokens = file.metadata.get_strings("tokenizer.ggml.tokens")
    assert len(tokens) == 49_152
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(file.metadata.get_strings("tokenizer.ggml.merges")) == 48_900
    assert file.metadata.get_ints("tokenizer.ggml.token_type").shape == (49_152,)
    assert len(file.tensors) == 272
    embedding = file.tensors["token_embd.weight"]
    assert embedding.shape == (576, 49_152)
    assert embedding.qtype is QType.Q8_0
    assert embedding.data.shape == (49_152, 612)
    reader = read_with_gguf_py(smollm2_path)
    assert_same_metadata(file, reader)
    assert_same_tensors(file, [reader])
