"""Mutations of split files: which parts there are, and what each says of the others."""

from __future__ import annotations

from random import Random

from gguf_bytes import typed_string, u64
from mutations.draft import typed
from mutations.operators import Files, mutation

KEYS = ["split.no", "split.count", "split.tensors.count"]


def any_part(files: Files, rng: Random) -> str:
    return rng.choice(sorted(files))


def first(files: Files) -> str:
    return min(files)


@mutation("accept", level="split")
def opened_by_any_part(files: Files, rng: Random) -> str:
    return any_part(files, rng)


@mutation("open", "", level="split")
def part_missing(files: Files, rng: Random) -> None:
    for name in rng.sample(sorted(files), rng.choice([1, 2])):
        if len(files) > 1:
            del files[name]


@mutation("open", "", level="split")
def part_in_the_place_of_another(files: Files, rng: Random) -> None:
    one, other = rng.sample(sorted(files), 2)
    files[one] = files[other].copy()


@mutation("open", "", level="split")
def two_parts_exchanged(files: Files, rng: Random) -> None:
    one, other = rng.sample(sorted(files), 2)
    files[one], files[other] = files[other], files[one]


@mutation("open", "key 'split.no'", level="split")
def number_of_a_part_wrong(files: Files, rng: Random) -> None:
    part = files[any_part(files, rng)]
    true = int.from_bytes((part.value("split.no") or b"")[4:6], "little")
    part.set("split.no", typed("u16", rng.choice([n for n in (0, 1, 2, 3, 65_535) if n != true])))


@mutation("open", "", level="split")
def number_of_parts_wrong(files: Files, rng: Random) -> None:
    part = files[any_part(files, rng)]
    part.set("split.count", typed("u16", rng.choice([2, 4, 65_535])))


@mutation("open", "key 'split.tensors.count'", level="split")
def number_of_tensors_wrong(files: Files, rng: Random) -> None:
    part = files[any_part(files, rng)]
    part.set("split.tensors.count", typed("i32", rng.choice([0, 1, 1000, 2**31 - 1])))


@mutation("open", "", level="split")
def key_of_parts_of_another_kind(files: Files, rng: Random) -> None:
    key = rng.choice(KEYS)
    other = [typed("i32", -1), typed("f32", 3.0), typed_string("3"), typed("bool", 1)]
    files[any_part(files, rng)].set(key, rng.choice([*other, typed("u64", 2**63)]))


@mutation("open", "", level="split")
def key_of_parts_missing(files: Files, rng: Random) -> str:
    part = any_part(files, rng)
    key = rng.choice(KEYS if part == first(files) else KEYS[:2])
    files[part].drop(key)
    others = sorted(set(files) - {part})
    # A part without the number is whole by itself: its model is not, but that is another law.
    return rng.choice(others) if key == "split.count" else part


@mutation("open", "tensor ", level="split")
def tensor_in_two_parts(files: Files, rng: Random) -> None:
    one, other = rng.sample(sorted(files), 2)
    files[one].tensors[-1].name = files[other].tensors[0].name


@mutation("load", "", level="split")
def tensor_missing_from_a_part(files: Files, rng: Random) -> None:
    part = files[any_part(files, rng)]
    tensor = rng.choice([t for t in part.tensors if t.name != b"output.weight"])
    part.tensors.remove(tensor)


@mutation("open", "tensor ", level="split")
def part_cut(files: Files, rng: Random) -> None:
    part = files[any_part(files, rng)]
    part.cut = rng.randrange(32, sum(len(t.data) for t in part.tensors))


@mutation("open", "header", level="split")
def part_of_another_version(files: Files, rng: Random) -> None:
    files[any_part(files, rng)].version = rng.choice([0, 1, 4, 3 << 24])


@mutation("open", "key ", level="split")
def part_with_a_bad_key(files: Files, rng: Random) -> None:
    files[any_part(files, rng)].set("x.y", typed("bool", 2))


@mutation("open", "tensor ", level="split")
def part_whose_data_lie_elsewhere(files: Files, rng: Random) -> None:
    part = files[any_part(files, rng)]
    part.tensors[-1].start = 2**64 - 32


@mutation("accept", level="split")
def part_of_version_2_and_of_another_alignment(files: Files, rng: Random) -> None:
    files[any_part(files, rng)].version = 2
    part = files[any_part(files, rng)]
    part.alignment = rng.choice([8, 64, 4096])
    part.set("general.alignment", typed("u32", part.alignment))


@mutation("accept", level="split")
def tensors_in_another_part(files: Files, rng: Random) -> None:
    one, other = rng.sample(sorted(files), 2)
    files[other].tensors.append(files[one].tensors.pop(0))


@mutation("open", "", level="split")
def parts_under_other_names(files: Files, rng: Random) -> str:
    other = rng.choice(
        ["model.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-1-of-3.gguf"]
    )
    files[other] = files.pop(first(files))
    return other


@mutation("accept", level="split")
def names_of_files_among_the_keys(files: Files, rng: Random) -> None:
    for name in ("../bait.gguf", "/dev/zero", "m-00004-of-00003.gguf"):
        files[first(files)].set(f"general.source.{len(name)}", typed_string(name))


@mutation("open", "", level="split")
def tokens_of_a_part_of_huge_number(files: Files, rng: Random) -> None:
    value = b"\x09\0\0\0\x08\0\0\0" + u64(rng.choice([2**32, 2**63, 2**64 - 1]))
    files[any_part(files, rng)].set("x.words", value)
