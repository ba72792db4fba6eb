"""The small model that these tests share."""

from __future__ import annotations

import pytest

from matrix import SMALL
from small_model import Small
from tiny import write_tiny_llama


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    return Small(write_tiny_llama(folder / "small.gguf", "Q8_0", **SMALL))
