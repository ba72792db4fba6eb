"""A worker's half of the conversation with `bench_compare`: a request a line, its answer a line.

It runs in the environment of its engine, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer {"do": name, **arguments} with {"value": what it returns} until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": functions[request.pop("do")](**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def memory_bytes(key: str) -> int:
    """What Linux says of this process: "VmRSS", bytes resident now, or "VmHWM", the most ever."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {key}")


def write_word_tokenizer(path: Path, size: int) -> None:
    """Write a tokenizer.json whose token 5 is the word "t5": for engines that take text alone."""
    model = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(size)}, "unk_token": "t0"}
    parts = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    whole = {
        "version": "1.0",
        **dict.fromkeys(parts),
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    path.write_text(json.dumps(whole))
