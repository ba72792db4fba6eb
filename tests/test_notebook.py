"""The notebook runs, shows what its text says, and is kept with what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"

# Cell -> what its output has to contain.
SHOWN = {
    "params": [
        "Q4_1(shape=(576, 576), nbytes=207360)",
        ".d   float16 (576, 18)",
        ".m   float16 (576, 18)",
        ".qs  uint8 (576, 18, 16)",
        "dense: float32 (576, 576) nbytes=1327104",
    ],
    "bytes": [
        "211 packed weights of 275 arrays",
        "96.6 MB, dense 538.1 MB",
        "5.6 times smaller",
    ],
    "generate": [
        "The three primary colors are:\n\nRed (R)\nBlue (B)\nYellow (Y)\n",
        "23 tokens, finished by 'stop'",
    ],
    "stream": ["Once upon a time"],
    "sites": ["210 sites", "blk.3.attn_out", "blk.3.ffn_out blk.3.out"],
    "lens": ["(30, 5, 49152)"],
    "lens-plot": ["after block 28: ' capital' 0.2", "after block 29: ' Paris' 0.77"],
    "patch": ["(5, 30, 49152)"],
    "patch-plot": [
        "patched at ' France', Rome wins for blocks 0 to 22",
        "patched at ' is', Rome wins for blocks 23 to 29",
    ],
    "gradient": ["' capital' counts most", 'log p(" Paris") = -0.258, p = 0.77'],
    "gradient-check": ["gradient 0.88, difference 0.8"],
    "vmap": ["compiling\n0.0 ' Paris.\\n\\nThe answer is: "],
    "again": ["the same at temperature 0: True"],
    "prefix": [
        "prefix 'The capital of', 3 positions filled",
        "' France is' → ' Paris', as without the cache: True",
        "' Italy is' → ' Rome', as without the cache: True",
    ],
}

# Cell of text -> what it says about the outputs below it.
SAID = {
    "next-token-text": ["77 %"],
    "lens-plot-text": ['" capital" leads after block 28', "block 29"],
    "patch-plot-text": ["Up to block 22", "from block 23 on", "attention of block 23"],
    "gradient-text": ['" capital" counts most'],
}

FIGURES = {"next-token", "lens-plot", "patch-plot", "gradient"}


def shown(cell: NotebookNode) -> str:
    """Everything that a cell's outputs say in text."""
    parts = []
    for output in cell.outputs:
        parts.append(output.text if output.output_type == "stream" else output.data["text/plain"])
    return "\n".join(parts)


def has_figure(cell: NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def code_cells(notebook: NotebookNode) -> dict[str, NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def kept() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(smollm2_path, tmp_path_factory) -> NotebookNode:
    """The notebook as it comes out of a fresh kernel of this Python."""
    before = NOTEBOOK.read_bytes()
    path = tmp_path_factory.mktemp("notebook") / "executed.ipynb"
    done = subprocess.run(
        [sys.executable, "scripts/execute_notebook.py", str(NOTEBOOK), "--to", str(path)],
        cwd=ROOT,
        env=os.environ | {"QLLAMA_MODEL": str(smollm2_path.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # a cell raised; here is its traceback
    assert NOTEBOOK.read_bytes() == before, "the notebook was written to"
    return nbformat.read(path, as_version=4)


def check_outputs(notebook: NotebookNode) -> None:
    cells = code_cells(notebook)
    for name, texts in SHOWN.items():
        for text in texts:
            assert text in shown(cells[name]), name
    assert {name for name, cell in cells.items() if has_figure(cell)} == FIGURES
    assert "compiling" not in shown(cells["again"])
    for cell in cells.values():
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", (cell.id, output.text)


@pytest.mark.slow
def test_executed_outputs_are_what_the_text_says(executed):
    check_outputs(executed)


def test_kept_outputs_are_what_the_text_says(kept):
    check_outputs(kept)
    text = {cell.id: " ".join(cell.source.split()) for cell in kept.cells}
    for name, phrases in SAID.items():
        for phrase in phrases:
            assert phrase in text[name], name


def test_kept_outputs_are_of_one_run_from_top_to_bottom(kept):
    counts = [cell.execution_count for cell in code_cells(kept).values()]
    assert counts == list(range(1, len(counts) + 1))


def test_kept_file_is_small_and_names_no_place_on_a_machine(kept):
    assert NOTEBOOK.stat().st_size < 500_000
    for cell in kept.cells:
        text = cell.source + (shown(cell) if cell.cell_type == "code" else "")
        # "/a/b" where a path can begin; "a/b" inside the repository is fine.
        assert not re.search(r"(?<![\w.:/])[/~][\w.-]+/[\w.-]|[A-Z]:\\", text), cell.id
        assert "execution" not in cell.metadata, "times of a run are kept"
    assert set(kept.metadata.language_info) == {"name"}, "the version of a Python is kept"


def test_text_comes_before_every_code_cell(kept):
    kinds = [cell.cell_type for cell in kept.cells]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) + ["markdown"]
