"""Files in several parts: any part opens all, and parts that do not belong together are refused."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from gguf_bytes import TinyGGUF, assert_same_tensors, read_with_gguf_py, string, u32
from qllama_jax.errors import GGUFError
from qllama_jax.gguf_file import read_gguf
from refusals import message_of

BASE = TinyGGUF().encode()
refused = functools.partial(message_of, read_gguf)


def write_split(folder: Path) -> list[Path]:
    """The tiny file's tensors in three parts, written by gguf-py."""
    folder.mkdir(exist_ok=True)
    writer = GGUFWriter(folder / "m", "llama", split_max_tensors=1)
    writer.add_string("general.name", "whole")
    source = folder / "source"
    source.write_bytes(BASE)
    for name, tensor in read_gguf(source).tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=GGMLQuantizationType(tensor.qtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def edit(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def number(key: str, value: int) -> bytes:
    """A split key as gguf-py writes it: uint16, the number of tensors int32."""
    kind, form = (5, "<i") if key == "split.tensors.count" else (2, "<H")
    return string(key) + u32(kind) + struct.pack(form, value)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_of_a_split_file_opens_all_parts(tmp_path, part):
    paths = write_split(tmp_path / "split")
    file = read_gguf(paths[part])
    assert file.path == paths[part]
    assert file.metadata.path == str(paths[0])
    assert file.metadata.get_str("general.name") == "whole"
    assert list(file.tensors) == ["one", "two", "three"]
    assert_same_tensors(file, [read_with_gguf_py(path) for path in paths])


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (1, 2)])
def test_missing_parts_are_listed(tmp_path, gone):
    paths = write_split(tmp_path / "split")
    for part in gone:
        paths[part].unlink()
    there = next(path for path in paths if path.exists())
    names = ", ".join(paths[part].name for part in gone)
    assert refused(there) == f"{len(gone)} of 3 parts are missing: {names}"


def rename_to_plain(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("model.gguf"))


def rename_to_fewer(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("m-00001-of-00002.gguf"))


def rename_to_part_4(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("m-00004-of-00003.gguf"))


def rename_to_part_0(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("m-00000-of-00003.gguf"))


@pytest.mark.parametrize(
    "rename", [rename_to_plain, rename_to_fewer, rename_to_part_4, rename_to_part_0]
)
def test_a_part_under_another_name_is_refused(tmp_path, rename):
    path = rename(write_split(tmp_path / "split"))
    message = "one of 3 parts, so its name must end like -00001-of-00003.gguf"
    assert refused(path) == message


BAD_PARTS: dict[str, tuple[int, tuple[bytes, bytes], str]] = {
    "a part that says it is another": (
        1,
        (number("split.no", 1), number("split.no", 2)),
        "found 2, wanted 1",
    ),
    "a part of another number of parts": (
        2,
        (number("split.count", 3), number("split.count", 2)),
        "found 2, wanted 3",
    ),
    "a part that says it is whole": (
        2,
        (number("split.count", 3), number("split.count", 1)),
        "found 1, wanted 3",
    ),
    "a wrong number of tensors in the first part": (
        0,
        (number("split.tensors.count", 3), number("split.tensors.count", 4)),
        "found 4, wanted 3",
    ),
    "a wrong number of tensors in a later part": (
        1,
        (number("split.tensors.count", 3), number("split.tensors.count", 2)),
        "found 2, wanted 3",
    ),
    "no number of tensors in the first part": (
        0,
        (number("split.tensors.count", 3), number("split.tensors.c_unt", 3)),
        "key 'split.tensors.count' is missing",
    ),
    "a negative number": (
        1,
        (number("split.no", 1), string("split.no") + u32(3) + struct.pack("<h", -1)),
        "key 'split.no' (header offset ",
    ),
    "a tensor that another part has": (
        1,
        (string("two"), string("one")),
        "tensor 'one' is in ",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_contradict_each_other_are_refused(tmp_path, name):
    part, (old, new), wanted = BAD_PARTS[name]
    paths = write_split(tmp_path / "split")
    edit(paths[part], old, new)
    opener = paths[0] if part else paths[1]
    with pytest.raises(GGUFError) as caught:
        read_gguf(opener)
    assert str(caught.value).startswith(f"{paths[part]}: ")
    assert wanted in str(caught.value)
