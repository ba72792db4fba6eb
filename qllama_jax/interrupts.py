"""Ctrl-C on the command line, also while the process compiles or computes outside of Python."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


@contextlib.contextmanager
def exit_at_interrupt(status: int) -> Iterator[None]:
    """End the process with `status` as soon as SIGINT arrives.

    A KeyboardInterrupt would wait for the end of a compilation, can be swallowed in a callback that
    must not raise, and would tear the interpreter down under a compilation that goes on. So the
    signal is read from the pipe that the C handler writes to, by a thread of its own. Outside the
    main thread, where signals cannot be handled, and of POSIX nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                if os.isatty(2):
                    os.write(2, SHOW_CURSOR)
                os.write(2, b"\n")  # after the terminal's ^C
                os._exit(status)
        os.close(reader)

    thread = threading.Thread(target=wait, name="interrupts", daemon=True)
    thread.start()
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, handler)
        os.close(writer)  # ends the thread
        thread.join()
