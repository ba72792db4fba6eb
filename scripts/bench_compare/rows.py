"""What is measured: each row of a table by rounds, the engines by turns, one active at a time."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO

from engines import CANDLE, LLAMA_CPP, MISTRALRS, OURS, Engine, EngineError, Worker
from models import Measured

SHORT = 16  # tokens of the prompt before the timed steps
LONG = 2048
CONTEXT = LONG + 128
MOST_ROUNDS = {CANDLE: 2, MISTRALRS: 1}  # slow engines

Task = Callable[[Worker], dict[str, float]]
#: What one engine gave in one round: (engine, {row: value}).
Found = Iterator[tuple[str, dict[str, float]]]


def decode(worker: Worker) -> dict[str, float]:
    """Tokens a second, positions 80 to 144."""
    return {"decode": _steps_a_second(worker)}


def residual(worker: Worker) -> dict[str, float]:
    """The same with activations of twice eight bits."""
    options = {"activations": "int8x2"} if worker.engine.name == OURS else {}
    return {"decode, int8x2": _steps_a_second(worker, **options)}


def _steps_a_second(worker: Worker, **options: object) -> float:
    short, long = (
        worker.ask("seconds", prompt=SHORT, steps=steps, **options) for steps in (64, 128)
    )
    return 64 / (long - short)


def batch(worker: Worker) -> dict[str, float]:
    """Tokens a second of all rows together, positions 48 to 80."""
    found = {}
    for rows in (1, 4, 8):
        short, long = (
            worker.ask("seconds", prompt=SHORT, steps=steps, rows=rows) for steps in (32, 64)
        )
        found[f"batch of {rows}"] = rows * 32 / (long - short)
    return found


def prefill(worker: Worker) -> dict[str, float]:
    """Tokens a second of prompts up to their first token."""
    return {f"prefill {n}": n / worker.ask("seconds", prompt=n, steps=0) for n in (128, 512)}


def long_text(worker: Worker) -> dict[str, float]:
    """A long prompt, and the steps after it beside those after a short one."""
    long = worker.ask("arrivals", prompt=LONG, steps=80)
    short = worker.ask("arrivals", prompt=64, steps=80)
    return {
        f"prefill {LONG}": LONG / long[0],
        f"decode at {LONG}": _rate(long),
        "decode at 64": _rate(short),
    }


def _rate(arrivals: Sequence[float], skip: int = 16) -> float:
    """Steps a second of a stream but for its first tokens, within which the cache may grow.

    What is computed in one dispatch comes at once when it is done.
    """
    last = len(arrivals) - 1
    ends = [i for i in range(last) if arrivals[i + 1] - arrivals[i] > 1e-3] + [last]
    first = next(i for i in ends if i >= skip)
    return (last - first) / (arrivals[last] - arrivals[first])


def by_turns(
    model: Measured, engines: Sequence[Engine], tasks: Sequence[Task], rounds: int, log: IO[str]
) -> Found:
    """Load the model in all engines, then ask each in turn; one that fails is left out."""
    with ExitStack() as stack:
        workers = []
        for engine in engines:
            with left_out_if_it_fails(engine):
                worker = stack.enter_context(Worker(engine, log))
                worker.ask("load", path=str(model.path), **_sizes(engine, model))
                worker.ask("seconds", prompt=SHORT, steps=8)
                workers.append(worker)
        for task in tasks:
            count = min(rounds, 2) if task is long_text else rounds  # one takes a minute
            able = [w for w in workers if _is_able(w.engine, task)]
            for worker in able:
                if worker.engine.name.startswith(OURS):
                    with left_out_if_it_fails(worker.engine):
                        task(worker)  # compiles
            for i in range(count):
                turn = [w for w in able if i < MOST_ROUNDS.get(w.engine.name, count)]
                for worker in turn if i % 2 == 0 else turn[::-1]:
                    with left_out_if_it_fails(worker.engine):
                        yield worker.engine.name, task(worker)


def _sizes(engine: Engine, model: Measured) -> dict[str, int]:
    if engine.name in (CANDLE, MISTRALRS):
        return {"vocabulary": model.vocabulary}
    return {"context": CONTEXT}


def _is_able(engine: Engine, task: Task) -> bool:
    """Whether a row is one of this engine's."""
    if engine.name == OURS:
        return True
    if engine.name == LLAMA_CPP:
        return task is not batch
    return task is decode or (task is prefill and engine.name not in (CANDLE, MISTRALRS))


def load(model: Measured, engines: Sequence[Engine], rounds: int, log: IO[str]) -> Found:
    """Seconds of loading in a fresh process, and of the first token after it.

    Import left out. "cold" is with an empty compilation cache, "warm" with what that left there.
    """
    model.path.read_bytes()  # into the page cache
    for i in range(rounds):
        for engine in engines if i % 2 == 0 else engines[::-1]:
            with tempfile.TemporaryDirectory() as cache, left_out_if_it_fails(engine):
                load, cold = _load_seconds(engine, model, log, cache)
                _, warm = _load_seconds(engine, model, log, cache)
                found = {"load": load, "first token, cold": cold, "first token, warm": warm}
                yield engine.name, found


def _load_seconds(engine: Engine, model: Measured, log: IO[str], cache: str) -> tuple[float, float]:
    with Worker(engine, log) as worker:
        worker.ask("versions")  # imports
        if engine.name.startswith(OURS):
            worker.ask("keep_compiled", folder=cache)
        load = worker.ask("load", path=str(model.path), context=512)
        return load, worker.ask("arrivals", prompt=SHORT, steps=0)[0]


def memory(model: Measured, engines: Sequence[Engine], rounds: int, log: IO[str]) -> Found:
    """The most memory over an empty process's, through load, a prompt and 64 tokens.

    As multiples of the file's size. The cache has 512 positions, all of which are filled.
    """
    del rounds  # it is no time
    for engine in engines:
        with left_out_if_it_fails(engine), Worker(engine, log) as worker:
            worker.ask("begin")
            worker.ask("load", path=str(model.path), context=512)
            loaded = worker.ask("peak")
            worker.ask("seconds", prompt=448, steps=63)
            peak = worker.ask("peak")
            yield (
                engine.name,
                {
                    "peak memory, loading": loaded / model.file_bytes,
                    "peak memory": peak / model.file_bytes,
                },
            )


@contextlib.contextmanager
def left_out_if_it_fails(engine: Engine) -> Iterator[None]:
    """Go on without an engine that cannot do what it was asked."""
    try:
        yield
    except (EngineError, OSError) as error:
        print(f"left out: {engine.name}: {error}", file=sys.stderr)
