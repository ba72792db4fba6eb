"""What the figures were taken on, and how fast its memory is."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BYTES = 2**29  # more than any cache holds
PIECE = 2**22


def name() -> str:
    """The processor and how many of its cores there are to use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    model = found.get("model name", platform.processor())
    family = f"family {found['cpu family']} model {found['model']}" if "cpu family" in found else ""
    return f"{os.cpu_count()} cores of {model} ({family})"


def memory_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the most of ten tries.

    A dot product of a vector with itself reads each number once and does little else.
    """
    cores = os.cpu_count() or 1
    pieces = np.ones((BYTES // PIECE, PIECE // 4), np.float32)
    seconds = []
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(10):
            began = time.perf_counter()
            list(threads.map(_read, np.array_split(pieces, cores)))
            seconds.append(time.perf_counter() - began)
    return pieces.nbytes / min(seconds)


def _read(pieces: np.ndarray) -> None:
    for piece in pieces:
        np.dot(piece, piece)
