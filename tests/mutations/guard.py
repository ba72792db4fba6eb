"""Limits on what reading one file may take: time, and memory beyond the file's own size."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 2.0  # of this process's work, whatever else the machine does
SECONDS_ASLEEP = 600.0  # of waiting, as for a FIFO that nobody writes to
MEMORY = 64 * 2**20


class HangError(BaseException):
    """Reading took too long. No `except Exception` may catch it."""


@contextmanager
def limited(size: int, seconds: float = SECONDS) -> Iterator[None]:
    """Raise where the block takes too long, or more memory than MEMORY and twice `size`."""
    resident = reset_peak()
    with limited_time(seconds):
        yield
    grown = peak() - resident
    assert grown <= MEMORY + 2 * size, f"memory grew by {grown / 2**20:.0f} MiB"


@contextmanager
def limited_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise where the block takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        spent = f"{seconds} s of work" if number == signal.SIGPROF else f"{SECONDS_ASLEEP} s"
        raise HangError(f"no result after {spent}")

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, stop) for number in clocks}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_ASLEEP)
    try:
        yield
    finally:
        for number, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


def reset_peak() -> int:
    """Forget the largest memory so far, where the system can; the bytes that are resident now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak()


def peak() -> int:
    """Largest resident memory since it was reset."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
