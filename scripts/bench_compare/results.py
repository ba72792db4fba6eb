"""What was measured, in a JSON file: {model: {row: {engine: [a value a round]}}}, and of what."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

Rounds = dict[str, list[float]]  # by engine


class Results:
    """The file, read at first and written after each value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Rounds]] = {}
        self.bandwidth: float | None = None  # bytes a second in this run
        self._begun: set[tuple[str, str]] = set()
        if path.exists():
            found = json.loads(path.read_text())
            self.about, self.rows = found["about"], found["rows"]

    def of(self, machine: str, versions: dict[str, str]) -> None:
        """Say what will be measured; what was on another machine or of other versions goes."""
        known = self.about.get("versions", {})
        if self.about and self.about["machine"] != machine:
            print(f"{self.path}: of another machine, begun anew", file=sys.stderr)
            self.about, self.rows, known = {}, {}, {}
        changed = {name for name in versions if known.get(name, versions[name]) != versions[name]}
        for row in (row for rows in self.rows.values() for row in rows.values()):
            for name in changed & row.keys():
                del row[name]
        self.about |= {"machine": machine, "versions": known | versions}
        self.about.setdefault("models", {})
        self.about.setdefault("bandwidth", {})

    def add(self, model: str, row: str, engine: str, value: float) -> None:
        """Put a round's value into the file; the first of this run clears what was there."""
        rounds = self.rows.setdefault(model, {}).setdefault(row, {})
        if (model, row) not in self._begun:
            self._begun.add((model, row))
            rounds.clear()
            # A row is of its own run, which may have found the memory slower or faster.
            self.about["bandwidth"].setdefault(model, {})[row] = self.bandwidth
        rounds.setdefault(engine, []).append(float(f"{value:.5g}"))
        self.save()

    def save(self) -> None:
        """Write the file; another is never half there."""
        text = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(_short_lists(text) + "\n")
        partial.replace(self.path)


def _short_lists(text: str) -> str:
    """JSON with lists of numbers on a line each."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside:
            inside = not line.strip().startswith("]")
            lines[-1] += line.strip() + (" " if inside and line.endswith(",") else "")
        else:
            lines.append(line)
            inside = line.endswith("[")
    return "\n".join(lines)


def median(rounds: Rounds, engine: str) -> float | None:
    """Of an engine's rounds; None where it has none."""
    return statistics.median(rounds[engine]) if rounds.get(engine) else None


def spread(rounds: Rounds, engine: str, other: str) -> tuple[float, float] | None:
    """Lowest and highest of the rounds' ratios; None where an engine has none."""
    ratios = [a / b for a, b in zip(rounds.get(engine, ()), rounds.get(other, ()), strict=False)]
    return (min(ratios), max(ratios)) if ratios else None
