"""Every test that a promise names is there, so that no promise outlives what holds it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["SECURITY.md", "docs/reliability.md", "docs/status.md"]
NAMED = re.compile(r"(?:tests/)?((?:\w+/)?test_\w+\.py)(?:::(\w+)| -k (?:\"([^\"]+)\"|(\w+)))?")


@functools.cache
def names_in(file: str) -> list[str]:
    """Names of a file's tests, and of what else a `-k` may mean: its parameters' texts."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    tests = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return [name for name in tests if name.startswith("test_")] + list(map(str, texts))


def missing(text: str) -> list[str]:
    """What a text names of tests and is not there."""
    found = []
    for file, test, words, word in NAMED.findall(re.sub(r"\s+", " ", text)):
        if not (ROOT / "tests" / file).exists():
            found.append(file)
            continue
        names = names_in(file)[:]
        if file == "test_mutations.py":  # whose parameters are the operators
            names += [p.read_text() for p in (ROOT / "tests" / "mutations").glob("*.py")]
        wanted = [test] if test else (words or word).split(" or ")
        for one in filter(None, wanted):
            start = one.removesuffix("_").lower()
            if not any(start in name.lower() for name in names):
                found.append(f"{file}: {one}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_are_there(page: str):
    text = (ROOT / page).read_text()
    assert len(NAMED.findall(text)) >= 15
    assert missing(text) == []


def test_a_test_that_is_not_there_would_be_missed():
    assert missing("`test_load.py -k no_such_thing`") == ["test_load.py: no_such_thing"]
    assert missing('`test_load.py -k "refused or\nno_such"`') == ["test_load.py: no_such"]
    assert missing("`test_load.py::test_that_is_not`") == ["test_load.py: test_that_is_not"]
    assert missing("`test_nothing.py`") == ["test_nothing.py"]
