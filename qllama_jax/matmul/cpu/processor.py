"""What the processor is and which instructions it has: on that depends what is the fastest."""

from __future__ import annotations

import functools
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def instructions(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Return Linux's names of the processor's instruction sets; none on another system."""
    return frozenset(_field("flags", cpuinfo).split())


@functools.cache
def vendor(cpuinfo: Path = CPUINFO) -> str:
    """Return Linux's name of the processor's maker, "GenuineIntel" say; "" on another system."""
    return _field("vendor_id", cpuinfo)


@functools.cache
def family(cpuinfo: Path = CPUINFO) -> int:
    """Return the number of its generation, as its maker counts them; 0 on another system."""
    number = _field("cpu family", cpuinfo)
    return int(number) if number.isdecimal() else 0


def _field(name: str, cpuinfo: Path) -> str:
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            # All cores have the same.
            first = next((line for line in lines if line.startswith(name)), "")
    except OSError:
        return ""
    return first.partition(":")[2].strip()


def has_matrix_unit() -> bool:
    """Return whether it multiplies matrices of bfloat16 in a unit of its own, Intel's AMX."""
    return "amx_bf16" in instructions()


def multiplies_bfloat16() -> bool:
    """Return whether it has products of bfloat16: 1.7 to 2 times as fast as float32's, with AMX 5.

    XLA's products are of what the processor has, whatever `--xla_cpu_max_isa` says.
    """
    return has_matrix_unit() or "avx512_bf16" in instructions()


def has_512_bits() -> bool:
    """Return whether its vectors of float32 have 16 lanes, of AVX-512, instead of 8."""
    return "avx512f" in instructions()


def has_undivided_512_bits() -> bool:
    """Return whether it works on vectors of 512 bits at once: AMD's from family 26 (Zen 5) on.

    Those before it halve them, with no gain over 256 bits; Intel's were not measured.
    """
    return vendor() == "AuthenticAMD" and has_512_bits() and family() >= 26
