"""What a compiled XLA module does, read from its text: loops, collectives, fusions, buffers.

Instructions of a fusion are not counted, for they make no buffers. Those of a loop count as often
as it runs, where the text says how often that is; else, as in a loop over tokens, once.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
}
# What makes no buffer of its own, or nothing that was not there already.
_NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
_FLOATS = {"bf16", "f16", "f32", "f64"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?")


class Buffer(NamedTuple):
    """An array of a result; its layout names the memory it is in, S(1) say, unless main memory."""

    kind: str
    dims: tuple[int, ...]
    bits: int  # of a number
    layout: str

    @property
    def nbytes(self) -> int:
        """Its bytes without padding."""
        return math.prod(self.dims) * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction: the text of its shape, its opcode, its whole line."""

    shape: str
    opcode: str
    text: str

    def called(self, *keys: str) -> list[str]:
        """Computations named by attributes such as `body=%name` or `branches={%a, %b}`."""
        names = []
        for key in keys:
            for found in re.findall(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.text):
                names += [name.strip().lstrip("%") for name in (found[0] or found[1]).split(",")]
        return names

    def number(self, key: str) -> int | None:
        """Number that the back end's configuration gives under a key."""
        found = re.search(rf'"{key}":(?:\{{"n":)?"?(\d+)', self.text)
        return int(found[1]) if found else None

    def buffers(self) -> list[Buffer]:
        """Each array of the result that is written by it."""
        if self.opcode in _NO_BUFFER:
            return []
        return [
            Buffer(kind, tuple(int(n) for n in dims.split(",") if n), int(bits or 8), layout)
            for kind, bits, dims, layout in _ARRAY.findall(self.shape)
        ]


class Module:
    """A compiled module, parsed."""

    def __init__(self, text: str) -> None:
        """Parse the text that `compiled.as_text()` returns."""
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self._computations.setdefault(header[2], [])
                self._entry = header[2] if header[1] else self._entry
            elif instruction := _INSTRUCTION.match(line):
                current.append(Instruction(instruction[2], instruction[3], line))
        if not self._entry:
            raise ValueError("no ENTRY computation in the module's text")

    def executed(self, computation: str | None = None) -> Iterator[tuple[Instruction, int]]:
        """Yield what runs, with how often; of a conditional, every branch."""
        for instruction in self._computations[computation or self._entry]:
            yield instruction, 1
            times = self._trips(instruction) if instruction.opcode == "while" else 1
            inner = instruction.called("body", "condition", "branch_computations")
            inner += instruction.called("true_computation", "false_computation")
            if instruction.opcode in ("call", "async-start"):
                inner += instruction.called("to_apply", "calls")
            for name in inner:
                for below, count in self.executed(name):
                    yield below, times * count

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as XLA says or, where it does not, up to a constant from 0 on."""
        if (known := loop.number("known_trip_count")) is not None:
            return known
        (condition,) = loop.called("condition")
        *_, root = self._computations[condition]
        compared = re.search(r" compare\([^,]+, %?([\w.\-]+)\), direction=LT", root.text)
        for instruction in self._computations[condition]:
            limit = re.search(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", instruction.text)
            if compared and limit and compared[1] == limit[1]:
                return int(limit[2])
        return 1

    def collectives(self) -> dict[str, int]:
        """How often each kind of communication between devices runs."""
        counts: collections.Counter[str] = collections.Counter()
        for instruction, times in self.executed():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] += times
        return dict(counts)

    def estimated_cycles(self) -> int | None:
        """Sum of the compiler's own estimates (TPU); None where it makes none."""
        cycles = [(i.number("estimated_cycles"), times) for i, times in self.executed()]
        known = [n * times for n, times in cycles if n is not None]
        return sum(known) if known else None

    def kernels(self) -> dict[str, int]:
        """How often each kind of kernel runs: fusions by kind, custom calls by target."""
        counts: collections.Counter[str] = collections.Counter()
        for instruction, times in self.executed():
            if instruction.opcode == "fusion":
                kind = re.search(r"kind=k(\w+)", instruction.text)
                back_end = re.search(r'"fusion_backend_config":\{"kind":"(\w+)"', instruction.text)
                name = back_end[1] if back_end else kind[1].lower() if kind else "?"
                counts[f"{name} fusion"] += times
            elif instruction.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]+)"', instruction.text)
                counts[target[1] if target else "custom-call"] += times
            elif instruction.opcode not in _NO_BUFFER | {"constant"}:
                counts[instruction.opcode] += times
        return dict(counts.most_common())

    def main_memory(self) -> Iterator[Buffer]:
        """Yield every array that is written to a device's main memory.

        A TPU's own fast memories, S(1) and so on in a layout, are left out.
        """
        for instruction, _ in self.executed():
            # A "-start" tells its operand too; what it writes is the result of its "-done".
            if not instruction.opcode.endswith("-start"):
                yield from (b for b in instruction.buffers() if "S(" not in b.layout)

    def float_buffers(self) -> dict[tuple[int, ...], int]:
        """Dimensions of every floating-point array in main memory, with its bytes."""
        found: dict[tuple[int, ...], int] = {}
        for buffer in self.main_memory():
            if buffer.kind in _FLOATS:
                found[buffer.dims] = max(buffer.nbytes, found.get(buffer.dims, 0))
        return found

    def largest_buffer(self) -> tuple[int, str]:
        """Bytes and shape of the largest array in main memory."""
        found = (0, "none")
        for buffer in self.main_memory():
            shape = f"{buffer.kind}{list(buffer.dims)}".replace(" ", "")
            found = max(found, (buffer.nbytes, shape))
        return found
