"""What the figures were taken on, and how fast its memory is."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BYTES = 2**29  # more than any cache holds


def name() -> str:
    """The processor and how many of its cores there are to use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    model = found.get("model name", platform.processor())
    family = f"family {found['cpu family']} model {found['model']}" if "cpu family" in found else ""
    return f"{os.cpu_count()} cores of {model} ({family}), Python {platform.python_version()}"


def memory_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the most of ten tries.

    A dot product of a vector with itself reads each number once and does little else.
    """
    cores = os.cpu_count() or 1
    parts = np.split(np.ones(BYTES // 4 // cores * cores, np.float32), cores)
    seconds = []
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(10):
            began = time.perf_counter()
            # A piece at a time, below the size at which BLAS itself would use all cores.
            list(threads.map(_read, parts))
            seconds.append(time.perf_counter() - began)
    return sum(part.nbytes for part in parts) / min(seconds)


def _read(part: np.ndarray) -> None:
    for piece in part.reshape(-1, 2**13) if part.size % 2**13 == 0 else [part]:
        np.dot(piece, piece)
