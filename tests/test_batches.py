"""A row's result does not depend on how it is padded, with what, or on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from reference import Reference

V = 389
SMALL: dict[str, Any] = {"layers": 1, "embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": V}
BUCKETS = [8, 16, 32, 64, 128]
BATCHES = [1, 2, 3, 5, 8]
PROMPT = np.random.default_rng(0).integers(0, V, 7)
CONTENTS = {"zeros": 0, "last": V - 1, "random": None}

prefill = jax.jit(ql.prefill, static_argnames=("config", "activations"))


@pytest.fixture(scope="module")
def path(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("Q4_0", context_length=256, tokenizer=None, **SMALL)


@pytest.fixture(scope="module")
def models(path: Path) -> dict[str, ql.Model]:
    """By how activations enter: as they are, or rounded as the CPU's kernels want them."""
    return {"float": ql.load(path, layout="file"), "int8": ql.load(path, layout="auto")}


#: All pairs with exact activations; with rounded ones, whose kernels compile slowly, the diagonal.
GRID = [("float", bucket, batch) for bucket in BUCKETS for batch in BATCHES]
GRID += [("int8", bucket, batch) for bucket, batch in zip(BUCKETS, BATCHES, strict=True)]


def run(
    models: dict[str, ql.Model], activations: Any, bucket: int, batch: int, content: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits after PROMPT as the last row of a batch, and the row's keys and values."""
    model, row = models[activations], batch - 1
    rng = np.random.default_rng([bucket, batch])
    tokens = rng.integers(0, V, (batch, bucket)).astype(np.int32)
    lengths = rng.integers(1, bucket + 1, batch).astype(np.int32)
    tokens[row, : PROMPT.size], lengths[row] = PROMPT, PROMPT.size
    filler = CONTENTS[content]
    if filler is not None:
        tokens = np.where(np.arange(bucket)[None] < lengths[:, None], tokens, np.int32(filler))
    logits, cache = prefill(
        model.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        ql.init_cache(model.config, batch, 128),
        config=model.config,
        activations=activations,
    )
    filled = [np.asarray(k)[row, ..., : PROMPT.size] for k in cache.k]
    return np.asarray(logits)[row], filled + [np.asarray(v)[row, :, : PROMPT.size] for v in cache.v]


@pytest.mark.parametrize(("activations", "bucket", "batch"), GRID)
def test_logits_of_any_bucket_and_batch_are_those_of_the_prompt_alone(
    models: dict[str, ql.Model], path: Path, activations: str, bucket: int, batch: int
):
    alone, _ = run(models, activations, 8, 1, "zeros")
    logits, _ = run(models, activations, bucket, batch, "random")
    scale = np.abs(alone).max()
    assert np.abs(logits - alone).max() <= 1e-4 * scale
    assert logits.argmax() == alone.argmax()
    wanted = Reference(path).logits(PROMPT)[-1]
    assert np.abs(logits - wanted).max() <= {"float": 1e-5, "int8": 0.05}[activations] * scale


@pytest.mark.parametrize(("activations", "bucket", "batch"), GRID)
def test_what_padding_holds_changes_no_bit(
    models: dict[str, ql.Model], activations: str, bucket: int, batch: int
):
    (logits, filled), *others = [
        run(models, activations, bucket, batch, content) for content in CONTENTS
    ]
    for other_logits, other_filled in others:
        np.testing.assert_array_equal(other_logits, logits)
        for one, other in zip(other_filled, filled, strict=True):
            np.testing.assert_array_equal(one, other)


def test_greedy_tokens_of_any_bucket_and_batch_are_the_float64_references(path: Path):
    """Prompts of the lengths at which buckets begin and end, in batches of each size."""
    model, reference = ql.load(path, layout="file"), Reference(path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, n).tolist() for n in (1, 8, 9, 33, 65)]
    wanted = [reference.greedy(prompt, 6) for prompt in prompts]
    for batch in BATCHES[:4]:
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            results = ql.generate(model, prompts[part], max_new_tokens=6)
            assert [result.tokens for result in results] == wanted[part]
