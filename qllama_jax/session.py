"""A generation driven from the host, in dispatches of a fraction of a second.

That keeps Ctrl-C working and lets text stream; the tokens do not depend on how the work is cut.
Shapes come in powers of two, so a process compiles at most one prefill a prompt size and one
decode loop a cache size, and the work of a step follows the positions that are filled.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qllama_jax import decoding, layerwise
from qllama_jax.cache import KVCache, init_cache, resize_cache
from qllama_jax.compiling import Program, compile_once
from qllama_jax.decoding import Chosen, DecodeState, Finish
from qllama_jax.errors import NumericalError
from qllama_jax.load import Model
from qllama_jax.matmul import Activations, check_activations, cpu
from qllama_jax.memory import SMALLEST_CACHE
from qllama_jax.model import check_dtype
from qllama_jax.params import StackedBlocks
from qllama_jax.sampling import Sampling
from qllama_jax.sampling_ranges import check_sampling
from qllama_jax.session_arguments import (
    PREFILL_CHUNK,
    SMALLEST_PROMPT,
    check_room,
    dtype_of_cache,
    keys_of,
    power_of_two,
    whole,
    with_window,
)
from qllama_jax.tensor_reader import Progress

MAX_STEPS = 64  # steps of one dispatch at the most
DISPATCH_SECONDS = 0.25  # what the number of steps is steered to
STEPS_ON_HOSTS = 8  # steps of a dispatch on several hosts
MOST_TOP_LOGPROBS = 1000  # tokens whose log-probabilities one may ask for

# Caches and states belong to one session alone, so they are donated and updated in place.
_start = jax.jit(decoding.start_decoding, static_argnames="top_logprobs", donate_argnames="cache")
_decode = jax.jit(
    decoding.decode_many,
    static_argnames=("config", "max_steps", "activations", "top_logprobs", "dtype"),
    donate_argnames="state",
    compiler_options=cpu.compiler_options(),
)
_resize = jax.jit(resize_cache, static_argnames="max_length")


@dataclass
class Stats:
    """What a generation took, all rows together; seconds include what had to be compiled."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens a second; the time includes choosing each row's first token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Decoding steps a second: the tokens a second of one row that goes on to the end."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0


class Event(NamedTuple):
    """A row's next token; `finish` is RUNNING but for its last one."""

    row: int
    token: int
    logprob: float
    finish: Finish
    top_logprobs: list[tuple[int, float]]


class Session:
    """One generation: prompts `[B]` of token ids -> events, in the order of computation."""

    def __init__(
        self,
        model: Model,
        prompts: list[np.ndarray],
        *,
        max_new_tokens: int,
        seed: int | Sequence[int] | np.ndarray | jax.Array,
        stop_tokens: frozenset[int],
        sampling: Sampling,
        activations: Activations,
        top_logprobs: int,
        progress: Progress | None = None,
        dtype: DTypeLike = jnp.float32,
        cache_dtype: DTypeLike | None = None,
    ) -> None:
        """Check everything that can be checked before work begins; the errors of `generate`."""
        check_activations(activations)
        check_dtype(dtype)
        self.dtype = jnp.dtype(dtype)
        check_sampling(sampling, len(prompts), model.config.vocab_size)
        most = min(MOST_TOP_LOGPROBS, model.config.vocab_size)
        self.top_logprobs = whole("top_logprobs", top_logprobs, 0, most)
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1, 2**31 - 1)
        self.keys = keys_of(seed, len(prompts))
        longest = max(map(len, prompts))
        # A loop over layers decodes as fast as a program of them all, and takes XLA a fraction of
        # the time and memory.
        looped = model.looped_params if cpu.reads_stacks(len(prompts), activations) else None
        self._params = model.params if looped is None else looped
        self._stacked = isinstance(self._params.blk, StackedBlocks)
        self.cache_dtype = dtype_of_cache(cache_dtype, self.dtype, activations, self._stacked)
        check_room(model, len(prompts), longest, max_new_tokens, self.cache_dtype.itemsize)
        self.model = model
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.stop_tokens = np.asarray(sorted(stop_tokens), np.int32)
        sampling, self.penalty_window = with_window(sampling, longest + max_new_tokens)
        self.sampling = jax.device_put(sampling.per_row(len(prompts)))
        self.recent = self._recent()
        self.activations: Activations = activations
        self.stats = Stats(prompt_tokens=sum(map(len, prompts)))
        self._progress = progress
        self._stopped: set[int] = set()
        partitioning = model.params.partitioning
        self._on_hosts = partitioning is not None and partitioning.spans_processes

    def stop(self, row: int) -> None:
        """Generate no more tokens of a row."""
        self._stopped.add(row)

    def run(self) -> Iterator[Event]:
        """Yield every token as soon as its dispatch is done.

        Raises:
            NumericalError: a row's logits are not finite; it names the row and the token.
        """
        began = time.perf_counter()
        logits, cache = self._prefill()
        arguments = logits, cache, self.recent, self.keys, self.sampling, self.stop_tokens
        state, first = _start(*arguments, top_logprobs=self.top_logprobs)
        chosen = jax.tree.map(lambda column: np.asarray(column)[:, None], first)
        before = np.zeros(len(self.prompts), np.int32)
        self.stats.prefill_seconds = time.perf_counter() - began
        filled, done, steps = max(map(len, self.prompts)), 1, 1
        static = {
            "config": self.model.config,
            "max_steps": MAX_STEPS,
            "activations": self.activations,
            "top_logprobs": self.top_logprobs,
            "dtype": self.dtype,
        }
        while True:
            finish, after = np.asarray(state.finish), np.asarray(state.generated)
            yield from self._events(chosen, before, after, finish)
            running = (finish == Finish.RUNNING) & ~np.isin(
                np.arange(len(finish)), list(self._stopped)
            )
            if done == self.max_new_tokens or not running.any():
                return
            began = time.perf_counter()
            state = self._with_room(state, filled)
            if self._stopped:
                stopped = np.where(running, finish, np.int32(Finish.STOP))
                state = dataclasses.replace(state, finish=stopped)
            room = state.cache.max_length - filled
            limit = min(steps, room, self.max_new_tokens - done)
            arguments = self._params, state, self.sampling, self.stop_tokens, np.int32(limit)
            loop = Program(_decode, arguments, static)
            kind = ("decode", self._kind(), state.cache.max_length, *static.values())
            compile_once(self.model, kind, lambda loop=loop: [loop])
            state, chosen, ran = _decode(*arguments, **static)
            count = int(ran)
            chosen, before = jax.tree.map(np.asarray, chosen), after
            filled, done = filled + count, done + count
            seconds = time.perf_counter() - began
            self.stats.decode_seconds += seconds
            self.stats.decode_steps += count
            if self._on_hosts:  # which have to take the same steps, whatever their clocks say
                steps = STEPS_ON_HOSTS
                continue
            # Steer slowly upwards: the first dispatch of a shape is all compilation.
            steps = int(np.clip(DISPATCH_SECONDS * count / seconds, 1, min(4 * count, MAX_STEPS)))

    def _prefill(self) -> tuple[jax.Array, KVCache]:
        """Run the prompts a chunk at a time; they are padded in numpy, which compiles nothing."""
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        longest = int(lengths.max())
        width = min(power_of_two(longest, SMALLEST_PROMPT), PREFILL_CHUNK)
        mesh = self.model.params.partitioning
        rows = len(self.prompts)
        config, dtype, stacked = self.model.config, self.cache_dtype, self._stacked
        cache = init_cache(config, rows, width, dtype, mesh=mesh, stacked=stacked)
        last_room = power_of_two(-(-longest // width) * width, width)
        total, logits = int(lengths.sum()), None
        progress = self._progress if longest > width else None
        if progress is not None:
            progress(0, total)
        for begin in range(0, longest, width):
            counts = np.clip(lengths - begin, 0, width).astype(np.int32)
            tokens = np.zeros((len(self.prompts), width), np.int32)
            for row, prompt in enumerate(self.prompts):
                tokens[row, : counts[row]] = prompt[begin : begin + width]
            # The room grows with the chunks, so the early ones do not attend to all of it.
            room = power_of_two(begin + width, width)
            if cache.max_length < room:
                cache = _resize(cache, max_length=room)
            arguments = self.model.params, tokens, counts, cache
            static = {
                "config": self.model.config,
                "activations": self.activations,
                "dtype": self.dtype,
            }
            if mesh is None:  # else shapes do not tell how what lies between is cut
                self._compile_prefill(arguments, static, last_room)
            new, cache = layerwise.prefill(*arguments, **static)
            logits = new if logits is None else jnp.where((counts > 0)[:, None], new, logits)
            if progress is not None:
                progress(int(np.minimum(lengths, begin + width).sum()), total)
        assert logits is not None
        return logits, cache

    def _compile_prefill(self, arguments: tuple, static: dict[str, Any], last_room: int) -> None:
        """Compile a prefill, and beside it the choice of the first token: its shapes are known."""
        _, tokens, _, cache = arguments
        config = self.model.config

        def programs() -> Iterator[Program]:
            # The choice is traced quickly and takes XLA long, so it is compiled while all else is
            # traced.
            B, _ = tokens.shape
            logits = jax.ShapeDtypeStruct((B, config.vocab_size), jnp.float32)
            filled = jax.eval_shape(
                lambda: init_cache(config, B, last_room, self.cache_dtype, stacked=self._stacked)
            )
            start = logits, filled, self.recent, self.keys, self.sampling, self.stop_tokens
            yield Program(_start, start, {"top_logprobs": self.top_logprobs})
            yield from layerwise.programs(*arguments, **static)

        kind = ("prefill", tokens.shape, cache.max_length, last_room, self.top_logprobs)
        compile_once(self.model, (*kind, self._kind(), *static.values()), programs)

    def _kind(self) -> tuple[str, str]:
        """What programs are compiled for besides the model, the rows and the cache's size."""
        shapes = jax.tree.map(jnp.shape, (self.recent, self.sampling, self.stop_tokens))
        return str(shapes), self.cache_dtype.name

    def _recent(self) -> np.ndarray:
        """`recent_tokens` of the prompts, in numpy: that would compile for every length anew."""
        W = self.penalty_window
        recent = np.full((len(self.prompts), W), -1, np.int32)
        for row, prompt in enumerate(self.prompts):
            tail = prompt[-W:]
            recent[row, W - len(tail) :] = tail
        return recent

    def _with_room(self, state: DecodeState, filled: int) -> DecodeState:
        size = power_of_two(filled + 1, SMALLEST_CACHE)
        if state.cache.max_length >= size:
            return state
        return dataclasses.replace(state, cache=_resize(state.cache, max_length=size))

    def _events(
        self,
        chosen: Chosen,
        before: np.ndarray,
        after: np.ndarray,
        finish: np.ndarray,
    ) -> Iterator[Event]:
        """Yield the tokens of one dispatch by step; row b has after[b] - before[b] of them."""
        for step in range(chosen.tokens.shape[1]):
            for row in np.flatnonzero(before + step < after):
                if row in self._stopped:
                    continue
                self.stats.generated_tokens += 1
                count, code = before[row] + step + 1, Finish.RUNNING
                if count == after[row] and finish[row] == Finish.STOP:
                    code = Finish.STOP
                elif count == self.max_new_tokens:
                    code = Finish.LENGTH
                token, logprob = int(chosen.tokens[row, step]), float(chosen.logprobs[row, step])
                likeliest = chosen.top_tokens[row, step].tolist()
                top = list(zip(likeliest, chosen.top_logprobs[row, step].tolist(), strict=True))
                yield Event(int(row), token, logprob, code, top)
        for row in np.flatnonzero(finish == Finish.ERROR):
            if row not in self._stopped:
                raise NumericalError(
                    f"row {row}: the logits for generated token {after[row]} are not finite: a"
                    " weight or an activation is NaN or infinite, or biases and penalties leave no"
                    " finite one"
                )
