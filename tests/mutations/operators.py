"""The table of mutations: what each changes, in which files, and what has to come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

from mutations.draft import Draft

#: "open", "load", "tokenizer": GGUFError there at the latest. "accept": the same bytes. "either":
#: GGUFError, or what gguf-py reads.
Verdict = Literal["open", "load", "tokenizer", "accept", "either"]
#: A file to start from: llama, mixtral, split, or real, SmolLM2's header with zeros for weights.
Base = str

DENSE, EXPERTS, WHOLE = ("llama", "real"), ("mixtral",), ("llama", "mixtral", "real")
SCORED, MERGED = ("llama",), ("mixtral", "real")  # tokenizers: SentencePiece, byte-level BPE
TINY = ("llama", "mixtral")

Files = dict[str, Draft]  # parts of a split file by name; the first is opened
Change = (
    Callable[[Draft, Random], None]
    | Callable[[bytearray, Random], None]
    | Callable[[Files, Random], str | None]
)
C = TypeVar("C", bound=Change)


@dataclass(frozen=True)
class Operator:
    """A mutation. `place` is what the error must name, as it names it: "key ", "tensor ".

    `change` changes a draft; for level "bytes" the finished file; for "split" the parts, and it
    may return the name of the part to open.
    """

    name: str
    verdict: Verdict
    place: str
    bases: tuple[Base, ...]
    level: Literal["draft", "bytes", "split"]
    change: Callable[..., str | None]


OPERATORS: dict[str, Operator] = {}


def mutation(
    verdict: Verdict,
    place: str = "",
    *,
    on: tuple[Base, ...] = WHOLE,
    level: Literal["draft", "bytes", "split"] = "draft",
) -> Callable[[C], C]:
    """Decorator that puts a function into the table, under its own name."""

    def add(change: C) -> C:
        name = change.__name__
        assert name not in OPERATORS, name
        bases: tuple[Base, ...] = (
            on if level == "draft" else TINY if level == "bytes" else ("split",)
        )
        OPERATORS[name] = Operator(name, verdict, place, bases, level, change)  # pyright: ignore
        return change

    return add
