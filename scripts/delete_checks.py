"""Delete each check of what a file says, in turn, and see whether a test fails without it.

    python scripts/delete_checks.py [--rooms gguf_header config ...] [--list]

A check is an `if` that raises, one operand of it, one end of a range, or a call that refuses. Each
deletion runs the room's tests in a process of its own, on a copy of the package. Prints a line for
every check that no test misses, and the counts.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What takes long to import, before the processes fork.
import gguf  # noqa: F401
import hypothesis  # noqa: F401
import jax  # noqa: F401
import libgguf  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # of work for the tests of one room; a check whose absence lets them hang is missed
GGUF = [
    "test_gguf_refusals.py",
    "test_gguf_paths.py",
    "test_gguf_limits.py",
    "test_gguf_split_files.py",
    "test_gguf_file.py",
    "test_gguf_damage.py",
]
REFUSALS = "refused or finite or missing or leftover or too_many or needs or without"
#: Room -> the tests that know its checks, as arguments of pytest.
ROOMS = {
    "gguf_cursor": GGUF,
    "gguf_header": GGUF,
    "gguf_file": GGUF,
    "tensor_file": GGUF,
    "metadata": ["test_metadata.py", "test_config.py", "test_config_refusals.py"],
    "config": ["test_config.py", "test_config_refusals.py"],
    "tensor_reader": ["test_load_refusals.py", "-k", REFUSALS],
    "read_params": ["test_load_refusals.py", "test_moe.py", "test_moe_of_one.py", "-k", REFUSALS],
    "load": ["test_load_refusals.py", "test_moe.py", "test_moe_of_one.py", "-k", REFUSALS],
    "tokenizer/vocabulary": ["test_mutations.py", "-k", "token or type or score or merge or flag"],
}
REFUSES = ("check", "_check", "_refuse", "_expect", "_same")


def refuses(statement: ast.stmt) -> bool:
    """Whether a statement raises, or calls what does."""
    if isinstance(statement, ast.Raise):
        return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    function = statement.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name == "fail" or name.startswith(REFUSES)


def weaker(test: ast.expr) -> Iterator[ast.expr]:
    """Conditions that hold less often: never, without an operand, without one end of a range."""
    yield ast.Constant(False)
    inner = test.operand if isinstance(test, ast.UnaryOp) else test
    if isinstance(inner, ast.BoolOp) and isinstance(inner.op, ast.Or):
        for i in range(len(inner.values)):
            yield ast.BoolOp(ast.Or(), inner.values[:i] + inner.values[i + 1 :])
    if isinstance(inner, ast.Compare) and len(inner.ops) == 2 and inner is not test:
        low, high = [inner.left, *inner.comparators][:2], inner.comparators
        yield ast.UnaryOp(ast.Not(), ast.Compare(low[0], inner.ops[:1], low[1:]))
        yield ast.UnaryOp(ast.Not(), ast.Compare(high[0], inner.ops[1:], high[1:]))


def deletions(source: str) -> Iterator[tuple[str, str]]:
    """Source with one check deleted, and what was deleted."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    for index, node in enumerate(nodes):
        place = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.If) and refuses(node.body[-1]):
            for test in weaker(node.test):
                changed = copy.deepcopy(tree)
                node_at(changed, index, ast.If).test = test
                yield (
                    ast.unparse(ast.fix_missing_locations(changed)),
                    (f"{place}if {ast.unparse(node.test)}  ->  if {ast.unparse(test)}"),
                )
        elif isinstance(node, ast.Expr) and refuses(node) and "fail" not in ast.unparse(node):
            changed = copy.deepcopy(tree)
            node_at(changed, index, ast.Expr).value = ast.Constant(None)
            yield ast.unparse(changed), place + ast.unparse(node)
        elif isinstance(node, ast.Call):
            for keyword in [k.arg for k in node.keywords if k.arg in ("lo", "hi")]:
                changed = copy.deepcopy(tree)
                call = node_at(changed, index, ast.Call)
                call.keywords = [k for k in call.keywords if k.arg != keyword]
                yield ast.unparse(changed), f"{place}{keyword}= of {ast.unparse(node)}"


Node = TypeVar("Node", bound=ast.AST)


def node_at(tree: ast.AST, index: int, kind: type[Node]) -> Node:
    """The node that stands at an index of the walk."""
    node = list(ast.walk(tree))[index]
    assert isinstance(node, kind)
    return node


def passes(folder: Path, arguments: list[str]) -> bool:
    """Whether tests pass on the package in a folder."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.chdir(ROOT)
        sys.path.insert(0, str(folder))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            tests = [f"tests/{a}" if a.endswith(".py") else a for a in arguments]
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        os._exit(int(status))
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    """Print what no test misses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rooms", nargs="*", default=list(ROOMS), choices=list(ROOMS))
    parser.add_argument("--list", action="store_true", help="print the checks, delete none")
    args = parser.parse_args()
    os.environ.setdefault("QLLAMA_MUTATIONS", "400")
    deleted = missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "qllama_jax", folder / "qllama_jax")
        for room in args.rooms:
            path = folder / "qllama_jax" / f"{room}.py"
            source = path.read_text()
            if not args.list and not passes(folder, ROOMS[room]):
                sys.exit(f"{room}: its tests fail as they are")
            for changed, what in deletions(source):
                deleted += 1
                if args.list:
                    print(f"{room}, {what}", flush=True)
                    continue
                path.write_text(changed)
                if passes(folder, ROOMS[room]):
                    print(f"no test misses {room}, {what}", flush=True)
                else:
                    missed += 1
            path.write_text(source)
    print(f"{deleted} checks" + ("" if args.list else f", {missed} missed by a test"))


if __name__ == "__main__":
    main()
