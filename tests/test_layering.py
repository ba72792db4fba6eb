"""The rooms of the package stand on rungs, and a module imports only from lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qllama_jax"

#: Every module, or package of modules, and its rung. Decimals order the modules of one rung. A new
#: module gets its line here.
RUNGS = {
    "errors": 0,
    "tensor_types": 0,
    "calls": 0,
    "carries": 0,
    "metadata": 1.0,
    "hub": 1.0,
    "gguf_cursor": 1.0,
    "ggml_cursor": 1.0,
    "tensor_file": 1.1,
    "gguf_header": 1.1,
    "ggml_vocabulary": 1.1,
    "gguf_file": 1.2,
    "ggml_file": 1.2,
    "model_file": 1.3,
    "config": 1.1,
    "free_memory": 1.0,
    "memory": 1.2,
    "rope": 1.2,
    "sharding": 1.0,
    "shard_plan": 1.2,
    "chat_template": 1.0,
    "quants": 1.0,
    "penalties": 1.0,
    "sampling": 1.1,
    "sampling_ranges": 1.2,
    "tokenizer": 2.0,
    "matmul": 2.0,
    "params": 2.1,
    "cache": 2.0,
    "cache_tiles": 1.0,
    "softmax_sums": 1.0,
    "tiled_attention": 2.1,
    "attention": 3.0,
    "layers": 3.0,
    "tensor_reader": 3.0,
    "weight_bytes": 3.1,
    "shard_reader": 3.1,
    "read_params": 3.2,
    "stacking": 2.2,
    "load": 4.0,
    "abstract_params": 4.1,
    "moe": 4.0,
    "transformer_block": 4.1,
    "model": 5.0,
    "decoding_arguments": 5.0,
    "decoding": 6.0,
    "prompts": 6.0,
    "generate_tokens": 6.1,
    "layerwise": 6.1,
    "session_arguments": 6.1,
    "compiling": 6.05,
    "session": 6.15,
    "row_text": 6.2,
    "generate": 6.3,
    "score": 6.4,
    "bench": 7.0,
    "chat": 7.05,
    "compilation_cache": 7.0,
    "info": 7.0,
    "interrupts": 7.0,
    "progress_bars": 7.0,
    "sampling_flags": 7.0,
    "cli": 7.1,
    "__init__": 8.0,
    "__main__": 9.0,
}

#: Rooms for files and text: they work where no jax is installed.
WITHOUT_JAX = {
    "errors",
    "free_memory",
    "metadata",
    "pretokenizers",
    "bpe",
    "spm",
    "gguf_cursor",
    "gguf_header",
    "gguf_file",
    "ggml_file",
    "ggml_cursor",
    "ggml_vocabulary",
    "hub",
    "model_file",
    "tensor_file",
    "tensor_types",
    "chat_template",
    "tokenizer",
}

EMPTY_NAMES = {"utils", "util", "helpers", "common", "base", "misc"}

MODULES = sorted(PACKAGE.rglob("*.py"))
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def room(path: Path) -> str:
    """Name in RUNGS of the module at a path: its own, or its package's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of all modules that a module imports, wherever in it; "from a import b": a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    """Rooms of the package that a module imports, its own left out."""
    rooms = set()
    for name in imports(ast.parse(path.read_text())):
        top, *rest = name.split(".")
        if top == "qllama_jax":
            # "from qllama_jax import generate" may mean the package's function of that name.
            rooms.add(rest[0] if rest and rest[0] in RUNGS else "__init__")
    return rooms - {room(path)}


def test_every_module_has_a_rung():
    unknown = {room(path) for path in MODULES} - RUNGS.keys()
    assert not unknown, f"not in RUNGS of {Path(__file__).name}: {sorted(unknown)}"


@each_module
def test_imports_go_down(path):
    own = RUNGS[room(path)]
    up = {other: RUNGS[other] for other in rooms_imported(path) if RUNGS[other] >= own}
    assert not up, f"{room(path)} on rung {own} imports {up}"


def test_model_does_not_know_where_weights_come_from():
    found = {r for path in MODULES if room(path) == "model" for r in rooms_imported(path)}
    assert not found & {"load", "gguf_file", "ggml_file", "model_file", "hub"}


@each_module
def test_file_and_text_rooms_import_no_jax(path):
    if room(path) in WITHOUT_JAX:
        tops = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not tops & {"jax", "jaxlib", "flax"}
        assert rooms_imported(path) <= WITHOUT_JAX


@each_module
def test_names_say_what_is_inside(path):
    assert not EMPTY_NAMES & set(path.relative_to(PACKAGE).with_suffix("").parts)
