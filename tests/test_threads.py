"""Threads share a model: each gets what it would get alone; a stream belongs to one at a time."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qllama_jax as ql

THREADS, PROMPTS = 8, 20
SMALL: dict[str, Any] = {"layers": 1, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2}
TEXTS = [
    " ".join(f"word{n}" for n in np.random.default_rng(i).integers(0, 50, 1 + i % 4))
    for i in range(PROMPTS)
]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> ql.Model:
    return ql.load(tiny_llama("Q4_0", **SMALL))


@pytest.fixture(autouse=True)
def threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def answer(model: ql.Model, i: int) -> tuple[list[int], str, list[float]]:
    """Prompt i, half of them streamed, with a temperature and a seed of its own."""
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": i % 3, "seed": i}
    if i % 2:
        result = ql.generate(model, TEXTS[i], **options)
        return result.tokens, result.text, result.logprobs.tolist()
    pieces = list(ql.stream(model, TEXTS[i], **options))
    text = "".join(piece.text for piece in pieces)
    logprobs = [float(np.float32(piece.logprob)) for piece in pieces]
    return [piece.token for piece in pieces], text, logprobs


def test_8_threads_of_20_prompts_give_what_a_serial_run_gives(model: ql.Model):
    """From the first call on, in which every thread finds nothing compiled."""
    jax.clear_caches()
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[tuple[int, Any]]:
        order = np.random.default_rng(thread).permutation(PROMPTS)
        start.wait()
        return [(int(i), answer(model, int(i))) for i in order]

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(itertools.chain(*threads.map(work, range(THREADS))))
    assert len(found) == THREADS * PROMPTS
    wanted = [answer(model, i) for i in range(PROMPTS)]
    assert [tokens for i, (tokens, _, _) in found if tokens != wanted[i][0]] == []
    assert all(result == wanted[i] for i, result in found)


def test_a_stream_that_two_threads_pull_from_gives_each_token_once_or_says_that_it_is_busy(
    model: ql.Model,
):
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "seed": 3}
    wanted = [piece.token for piece in ql.stream(model, TEXTS[3], **options)]
    pieces = ql.stream(model, TEXTS[3], **options)
    got: list[list[int]] = [[], []]
    busy, other = [], []
    order: list[int] = []

    def pull(thread: int) -> None:
        while True:
            try:
                piece = next(pieces)
            except StopIteration:
                return
            except ValueError as error:  # Python's own, before anything is touched
                busy.append(str(error))
                continue
            except BaseException as error:
                other.append(error)
                return
            got[thread].append(piece.token)
            order.append(piece.token)

    threads = [threading.Thread(target=pull, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other == []
    assert set(busy) <= {"generator already executing"}
    assert sorted(order) == sorted(wanted)
    for tokens in got:  # each thread's are in the order in which they were generated
        rest = iter(wanted)
        assert all(token in rest for token in tokens)


def test_a_stream_says_that_it_is_busy_while_another_thread_pulls(model: ql.Model):
    """Made sure of by a tokenizer that waits within the first thread's call."""
    entered, leave = threading.Event(), threading.Event()
    pieces = ql.stream(model, TEXTS[0], max_new_tokens=4, progress=None)
    step = pieces.gi_frame.f_locals["row"].add  # type: ignore[attr-defined]

    def wait_and_step(event: Any) -> str:
        entered.set()
        assert leave.wait(60)
        return step(event)

    pieces.gi_frame.f_locals["row"].add = wait_and_step  # type: ignore[attr-defined]
    first: list[Any] = []
    thread = threading.Thread(target=lambda: first.append(next(pieces)))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(ValueError, match="generator already executing"):
        next(pieces)
    leave.set()
    thread.join()
    tokens = [piece.token for piece in [*first, *pieces]]
    assert tokens == [piece.token for piece in ql.stream(model, TEXTS[0], max_new_tokens=4)]
