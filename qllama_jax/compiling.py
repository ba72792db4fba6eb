"""Compile outside of the main thread, so that Ctrl-C need not wait for XLA."""

from __future__ import annotations

import contextlib
import threading
from typing import Any


def compile_ahead(function: Any, *arguments: Any, **static: Any) -> None:
    """Compile what calling the jitted function with these arguments would compile.

    The call then finds it compiled. A model's decoding loop takes XLA seconds, in which a thread
    hears no signal; the one that waits here does. After a KeyboardInterrupt the compilation goes on
    unseen to its end, and is there for the next call.
    """
    lowered = function.lower(*arguments, **static)
    done = threading.Event()

    def compile() -> None:
        try:
            with contextlib.suppress(Exception):  # the call itself will raise it
                lowered.compile()
        finally:
            done.set()

    # No daemon: to tear the interpreter down under a compilation would crash.
    threading.Thread(target=compile, name="compile_ahead").start()
    while not done.wait(0.1):  # Windows interrupts no wait: there Ctrl-C is heard after it
        pass
