"""No file, however it is damaged, gives anything but GGUFError or what it declares.

Each operator of `mutations` makes files from the sound ones and declares what has to come of them.
$QLLAMA_MUTATIONS is the number of files, 2,000 where it is not set.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mutations import OPERATORS
from mutations.bases import make_bases
from mutations.judge import judge
from mutations.operators import Base, Files, Operator

FILES = int(os.environ.get("QLLAMA_MUTATIONS", "2000"))
EACH = -(-FILES // len(OPERATORS))

#: Each works on SmolLM2's header too, in the run of all files; else one in so many.
REAL = [name for name, operator in OPERATORS.items() if "real" in operator.bases]
REAL = REAL if FILES >= 12_000 else REAL[::12]

Bases = dict[Base, Files]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def real_base(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"), smollm2_path)


def check(name: str, base: Base, seed: int, bases: Bases, folder: Path) -> None:
    try:
        judge(OPERATORS[name], base, seed, bases, folder)
    except BaseException as error:
        error.add_note(f"mutant {name}, base {base}, seed {seed}")
        raise


@pytest.mark.parametrize("name", OPERATORS)
def test_a_mutant_is_refused_or_read_as_its_operator_declares(
    bases: Bases, tmp_path: Path, name: str
):
    tiny = [base for base in OPERATORS[name].bases if base != "real"]
    for seed in range(EACH):
        check(name, tiny[seed % len(tiny)], seed, bases, tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_so_is_a_mutant_of_a_real_header(real_base: Bases, tmp_path: Path, name: str):
    check(name, "real", 0, real_base, tmp_path)


def test_a_sound_file_is_accepted_from_every_base(bases: Bases, tmp_path: Path):
    """Else an operator that changes nothing might seem to be refused for what it does."""
    nothing = Operator("nothing", "accept", "", ("llama",), "draft", lambda draft, rng: None)
    for base in ("llama", "mixtral"):
        assert judge(nothing, base, 0, bases, tmp_path).model is not None
    whole = Operator("nothing", "accept", "", ("split",), "split", lambda files, rng: None)
    assert judge(whole, "split", 0, bases, tmp_path).model is not None
