"""How a file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qllama_jax.errors import GGUFError


def message_of(read: Callable[..., Any], path: Path, **options: Any) -> str:
    """Message with which a file is refused, which begins with the file."""
    with pytest.raises(GGUFError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")
