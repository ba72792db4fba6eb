"""Bytes that can still be allocated: what Linux, a container's limit or the device itself says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: Any) -> int | None:
    """Return the bytes that can still be allocated on a JAX device; None where nothing tells."""
    if device.platform == "cpu":
        return host_free_bytes()
    try:
        stats = device.memory_stats() or {}
    except (NotImplementedError, RuntimeError):  # a device that keeps no such numbers
        return None
    if "bytes_limit" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def host_free_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the bytes that a process can still allocate; None on a system that is no Linux.

    That is the least of what the machine and each control group above the process (of version 1 or
    2) leave. Files that the kernel keeps in memory can go, so they count as free, and so does swap:
    what is refused here the kernel could not give.
    """
    machine = _numbers(proc / "meminfo")
    swap = 1024 * machine.get("SwapFree", 0)
    rooms = list(_group_rooms(proc / "self" / "cgroup", cgroups, swap))
    if "MemAvailable" in machine:
        rooms.append(1024 * machine["MemAvailable"] + swap)
    return max(0, min(rooms)) if rooms else None


def _group_rooms(listing: Path, cgroups: Path, swap: int) -> Iterator[int]:
    """Yield what each limit leaves; lines of the listing are "4:memory:/a/b", of version 2 "0::/a".

    In a container the path may be the host's, of which only the root is to be seen.
    """
    for line in _text(listing).splitlines():
        _, controllers, path = line.split(":", 2)
        relative = PurePosixPath(path.lstrip("/"))
        folders = [relative, *relative.parents]
        if controllers == "":
            for folder in folders:
                yield from _rooms_v2(cgroups / folder, swap)
                yield from _rooms_v2(cgroups / "unified" / folder, swap)
        elif "memory" in controllers.split(","):
            for folder in folders:
                yield from _rooms_v1(cgroups / "memory" / folder, swap)


def _rooms_v2(folder: Path, swap: int) -> Iterator[int]:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:  # "max": no limit; and the root has no such files
        return
    most_swap, swapped = (_number(folder / f"memory.swap.{end}") for end in ("max", "current"))
    if most_swap is not None and swapped is not None:
        swap = min(swap, max(0, most_swap - swapped))
    stat = _numbers(folder / "memory.stat")
    files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    yield limit - (used - files) + swap


def _rooms_v1(folder: Path, swap: int) -> Iterator[int]:
    stat = _numbers(folder / "memory.stat")
    files = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    # The second limit is on memory and swap together.
    for name, beside in (("memory", swap), ("memory.memsw", 0)):
        limit = _number(folder / f"{name}.limit_in_bytes")
        used = _number(folder / f"{name}.usage_in_bytes")
        if limit is not None and used is not None:
            yield limit - (used - files) + beside


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Numbers by name from lines such as "MemFree:  7 kB" and "inactive_file 4096"."""
    return {name: int(n) for name, n in re.findall(r"^(\w+):?[ \t]+(\d+)", _text(path), re.M)}
