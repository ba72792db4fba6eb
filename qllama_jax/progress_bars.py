"""Progress bars on stderr where it is a terminal, for the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qllama_jax.tensor_reader import Progress


@contextmanager
def bar(label: str, *, is_bytes: bool = False) -> Iterator[Progress | None]:
    """Give a function of (done, total) that draws a bar; None where stderr is no terminal.

    The bar is there from the first call until all is done, and leaves no trace.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    counts = rich.DownloadColumn() if is_bytes else rich.MofNCompleteColumn()
    columns = label, rich.BarColumn(), counts
    shown = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    task = shown.add_task("", total=None)

    def progress(done: int, total: int) -> None:
        shown.start()
        shown.update(task, completed=done, total=total)
        if done == total:
            shown.stop()

    try:
        yield progress
    finally:
        shown.stop()
