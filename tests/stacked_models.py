"""Tiny models whose layers are stacks, as a CPU decodes them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qllama_jax as ql
from qllama_jax.matmul.cpu import LAYOUTS


def in_two_formats(name: str) -> str:
    """As a Q4_K_M file: Q6_K for some tensors of some layers."""
    return "Q6_K" if re.search(r"blk\.\d*[01]\.(attn_v|ffn_(down|up_exps))", name) else "Q4_K"


FILES: dict[str, dict[str, Any]] = {
    **{name: {"qtype": name} for name in LAYOUTS},
    "two formats": {"qtype": in_two_formats},
    "biases, tied": {"qtype": "Q8_0", "biases": True, "tied": True},
    "experts": {"qtype": "Q4_1", "experts": 4, "experts_used": 2},
    "experts in two formats": {"qtype": in_two_formats, "experts": 3, "experts_used": 2},
    "one expert": {"qtype": "Q5_1", "experts": 1, "experts_used": 1},
    "one layer": {"qtype": "BF16", "layers": 1},
}


def loader(tiny_llama: Callable[..., Path]) -> Callable[..., tuple[Path, ql.Model]]:
    """A function of a name in FILES that writes the model and loads it, each once."""

    @functools.cache
    def load(name: str, **options: Any) -> tuple[Path, ql.Model]:
        path = tiny_llama(**{"layers": 3, **FILES[name], **options})
        return path, ql.load(path)

    return load


def looped(model: ql.Model) -> ql.Params:
    params = model.looped_params
    assert params is not None
    return params
