"""What a session is asked for -> what its dispatches take: room, numbers, keys, the window."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Key, UInt32

from qllama_jax.errors import ContextOverflowError
from qllama_jax.load import Model
from qllama_jax.matmul import Activations
from qllama_jax.memory import SMALLEST_CACHE, Needs, cache_bytes, check_fits, workspace_bytes
from qllama_jax.penalties import PENALTY_WINDOW
from qllama_jax.sampling import Sampling

LAST_SEED = 2**32 - 1
SMALLEST_PROMPT = 8  # the smallest padded prompt
PREFILL_CHUNK = 512  # the largest; a longer prompt goes in several


def check_room(model: Model, rows: int, longest: int, max_new_tokens: int, itemsize: int) -> None:
    """Refuse what the model's context or the memory has no room for; nothing is allocated.

    `longest` are the tokens of the longest of `rows` prompts, `itemsize` the bytes of a number in
    the cache. Raises ContextOverflowError, OutOfMemoryError.
    """
    context = model.config.context_length
    if longest + max_new_tokens > context:
        room = max(context - longest, 0)
        raise ContextOverflowError(
            f"prompt of {longest} tokens + max_new_tokens={max_new_tokens}: the model's context"
            f" is {context} tokens; after this prompt there is room for {room}"
        )
    check_fits(
        f"prompt of {longest} tokens + max_new_tokens={max_new_tokens}, {rows} rows",
        lambda context: _needs(model, rows, context, itemsize),
        longest + max_new_tokens,
        mesh=model.mesh,
    )


def _needs(model: Model, batch_size: int, context: int, itemsize: int) -> Needs:
    """Return what a generation of `context` tokens, prompt and new ones together, allocates."""
    config = model.config
    positions = context - 1  # the last token is not stored
    room = power_of_two(positions, SMALLEST_CACHE)
    cache = cache_bytes(config, batch_size, room, itemsize, model.params.partitioning)
    chunk = min(power_of_two(positions, SMALLEST_PROMPT), PREFILL_CHUNK)
    growing = cache // 2 if room > SMALLEST_CACHE else 0  # the old cache beside the new one
    workspace = max(workspace_bytes(config, batch_size, chunk), growing)
    return Needs(cache=cache, workspace=workspace, loaded=model.device_nbytes)


def dtype_of_cache(
    asked: DTypeLike | None, dtype: np.dtype, activations: Activations, looped: bool
) -> np.dtype:
    """Return the cache's dtype: what was asked for or, if that is None, what serves best.

    `dtype` is that of the activations, `looped` whether a CPU decodes in a loop over layers. To
    round activations to 8 bits moves logits by far more than to round keys and values to 11, of
    which a step then reads half as much; what "int8x2" adds to them moves logits by less. (With F16
    and BF16 weights "auto" rounds nothing: there as in llama.cpp, whose cache is float16 too.)

    Raises ValueError for another dtype than float32, bfloat16 or float16.
    """
    if asked is None:
        rounds = looped and activations in ("auto", "int8") and dtype == np.float32
        return np.dtype(np.float16) if rounds else dtype
    known = [jnp.dtype(kind) for kind in (jnp.float32, jnp.bfloat16, jnp.float16)]
    try:
        return known[known.index(jnp.dtype(asked))]
    except (TypeError, ValueError):
        wanted = "float32, bfloat16 or float16"
        raise ValueError(f"cache_dtype={asked!r}: expected {wanted}") from None


def keys_of(seed: int | Sequence[int] | np.ndarray | jax.Array, batch_size: int) -> jax.Array:
    """Return a key a row: of a seed a row, the key that its prompt alone would have with it.

    Raises TypeError, ValueError: no integers in 0..2^32-1, or another number of them than rows.
    """
    if hasattr(seed, "__array__"):  # numpy's scalars and JAX's arrays too
        seed = np.asarray(seed)
        if seed.ndim > 1:
            raise ValueError(f"seed: expected one, or one a row, found shape {seed.shape}")
    if isinstance(seed, str | bytes) or not isinstance(seed, Sequence | np.ndarray):
        seeds, rows = [whole("seed", seed, 0, LAST_SEED)] * batch_size, range(batch_size)
    elif isinstance(seed, np.ndarray) and seed.ndim == 0:
        seeds, rows = [whole("seed", seed[()], 0, LAST_SEED)] * batch_size, range(batch_size)
    else:
        seeds = [whole(f"seed[{row}]", value, 0, LAST_SEED) for row, value in enumerate(seed)]
        rows = [0] * batch_size
    if len(seeds) != batch_size:
        raise ValueError(f"seed: {len(seeds)} seeds for {batch_size} rows")
    kind = jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
    return _keys(np.asarray(seeds, np.uint32), np.asarray(rows, np.int32), kind=kind)


@functools.partial(jax.jit, static_argnames="kind")
def _keys(seeds: UInt32[Array, " B"], rows: Int32[Array, " B"], *, kind: str) -> Key[Array, " B"]:
    """fold_in(key(seed), row) of each pair, in one program; as calls they would be several."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed, impl=kind), row))(
        seeds, rows
    )


def with_window(sampling: Sampling, most_tokens: int) -> tuple[Sampling, int]:
    """Return the sampling with a penalty_last_n that the returned window of recent tokens holds.

    There are at most `most_tokens`, so to look back on more, or on all, is to look back on those.
    The window is a power of two, so that few are compiled.
    """
    last_n = np.asarray(sampling.penalty_last_n)
    last_n = np.where((last_n < 0) | (last_n > most_tokens), most_tokens, last_n).astype(np.int32)
    window = power_of_two(int(last_n.max()), PENALTY_WINDOW)
    return dataclasses.replace(sampling, penalty_last_n=last_n), window


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer in low..high; raises TypeError or ValueError for another value."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # refuses a float, and an array that is no number
    except TypeError:
        raise TypeError(f"{name}={value!r}: expected an integer") from None
    if not low <= number <= high:
        raise ValueError(f"{name}={number}: expected {low}..{high}")
    return number


def power_of_two(size: int, smallest: int) -> int:
    """Return the smallest power of two that is at least `size` and at least `smallest`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())
