"""What is NaN or infinite never comes out as a token: it ends in NumericalError, with the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from gguf_bytes import read_with_gguf_py
from qllama_jax.attention import attention
from qllama_jax.layers import rms_norm
from qllama_jax.sampling import sample

NOT_FINITE = [np.nan, np.inf, -np.inf]

# Logits


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 300), (1, 49_152), (3, 4_999), (100, 300)])
def test_one_logit_that_is_not_finite_leaves_no_token_to_choose(
    rows: int, vocab: int, temperature: float, value: float
):
    """XLA's maximum on a CPU passes over a NaN among many, so the largest alone does not tell."""
    logits = np.random.default_rng(vocab).standard_normal((rows, vocab), np.float32)
    recent, keys = jnp.full((rows, 64), -1), jax.random.split(jax.random.key(0), rows)
    parameters = ql.Sampling(temperature=temperature, top_k=1).per_row(rows)
    largest = logits.argmax(axis=-1)
    for at in (0, 7, vocab // 2, vocab - 1):
        bad = logits.copy()
        bad[-1, at] = value
        found = np.asarray(jax.jit(sample)(jnp.asarray(bad), keys, parameters, recent))
        np.testing.assert_array_equal(found[:-1], largest[:-1])
        assert found[-1] == -1


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_neither_does_a_traced_bias_that_is_not_finite(value: float):
    logits = np.random.default_rng(0).standard_normal((2, 4_999), np.float32)
    recent, keys = jnp.full((2, 64), -1), jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def chosen(bias: jax.Array) -> jax.Array:
        return sample(jnp.asarray(logits), keys, ql.Sampling(logit_bias=bias).per_row(2), recent)

    bias = np.zeros((2, 4_999), np.float32)
    bias[1, 3] = value
    assert chosen(jnp.asarray(bias)).tolist() == [logits[0].argmax(), -1]


# Weights

#: Both experts are active, so that every weight counts, and there are many logits.
MIXTURE: dict[str, Any] = {"layers": 1, "embed": 256, "ffn": 256, "heads": 4, "kv_heads": 2}
MIXTURE |= {"experts": 2, "experts_used": 2, "vocab": 4_999, "tokenizer": None}
PROMPT = [5, 17, 4_000, 42, 9]
#: Format -> byte in a block at which its (first) scale or number lies.
SCALES = {"BF16": 0, "Q4_0": 0, "Q6_K": 208}
#: Tensor -> row of it that is spoiled. The embedding's is a token of the prompt.
SPOILED = {
    "token_embd.weight": 17,
    "blk.0.attn_norm.weight": 0,
    "blk.0.attn_q.weight": 3,
    "blk.0.attn_k.weight": 3,
    "blk.0.attn_v.weight": 3,
    "blk.0.attn_output.weight": 3,
    "blk.0.ffn_norm.weight": 0,
    "blk.0.ffn_gate_inp.weight": 1,
    "blk.0.ffn_gate_exps.weight": 3,
    "blk.0.ffn_up_exps.weight": 3,
    "blk.0.ffn_down_exps.weight": 3,
    "output_norm.weight": 0,
    "output.weight": 3,
}


def spoil(path: Path, out: Path, name: str, value: float) -> Path:
    """Copy a file with one scale, or one number, of a tensor replaced."""
    (tensor,) = (t for t in read_with_gguf_py(path).tensors if t.name == name)
    kind = tensor.tensor_type.name
    rows = int(np.prod(tensor.shape[1:]))
    at = int(tensor.data_offset) + SPOILED[name] * (int(tensor.n_bytes) // rows)
    new = np.asarray(value, "<f4").tobytes()
    if kind != "F32":
        at += SCALES[kind]
        new = new[2:] if kind == "BF16" else np.asarray(value, "<f2").tobytes()
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    out.write_bytes(raw)
    return out


@pytest.fixture(scope="module")
def mixture(tiny_llama: Callable[..., Path]) -> Callable[[str], Path]:
    return functools.partial(tiny_llama, **MIXTURE)


@pytest.mark.parametrize(
    ("qtype", "layout"), [("Q4_0", "auto"), ("Q4_0", "file"), ("Q6_K", "auto"), ("BF16", "auto")]
)
def test_a_weight_that_is_not_finite_ends_in_numerical_error_with_the_step(
    mixture: Callable[[str], Path], tmp_path: Path, qtype: str, layout: Any
):
    base = mixture(qtype)
    assert len(ql.generate(ql.load(base, layout=layout), PROMPT, max_new_tokens=1).tokens) == 1
    for name in SPOILED:
        for value in (np.nan, np.inf):
            path = spoil(base, tmp_path / "m.gguf", name, value)
            with pytest.raises(ql.GGUFError, match=f"tensor '{name}' .* NaN or infinite"):
                ql.load(path, layout=layout)
            model = ql.load(path, layout=layout, check_tensors=False)
            with pytest.raises(ql.NumericalError, match="row 0: the logits for generated token 0"):
                print(name, value, ql.generate(model, PROMPT, max_new_tokens=1).tokens)


def test_it_ends_so_in_a_score_too(mixture: Callable[[str], Path], tmp_path: Path):
    base = mixture("Q4_0")
    assert np.isfinite(ql.score(ql.load(base), PROMPT).logprobs).all()
    for name in SPOILED:
        model = ql.load(spoil(base, tmp_path / "m.gguf", name, np.nan), check_tensors=False)
        with pytest.raises(ql.NumericalError, match="text 0: the log-probability of token"):
            ql.score(model, PROMPT)


# Activations


@pytest.mark.parametrize(("queries", "room"), [(1, 16), (1, 600), (5, 16), (130, 600)])
def test_scores_that_overflow_are_nan_and_not_the_mean_of_values_that_are_not_seen(
    queries: int, room: int
):
    seen = 3 if queries == 1 else queries
    q = jnp.ones((1, queries, 2, 8))
    k, v = np.zeros((1, 1, 8, room), np.float32), np.ones((1, 1, room, 8), np.float32)
    positions = jnp.arange(seen - queries, seen, dtype=jnp.int32)[None]
    attend = jax.jit(attention)
    np.testing.assert_allclose(attend(q, jnp.asarray(k), jnp.asarray(v), positions), 1, rtol=1e-6)
    for value in (-np.inf, np.inf, np.nan):
        k[..., 0, :seen] = value
        assert np.isnan(attend(q, jnp.asarray(k), jnp.asarray(v), positions)).all()


@pytest.mark.parametrize("magnitude", [1e18, 1e20, 1e38])
def test_activations_whose_squares_overflow_are_not_normed_to_zeros(magnitude: float):
    x = np.asarray([1, -2, 0.5, 3]) * magnitude
    found = np.asarray(rms_norm(jnp.asarray(x, jnp.float32), jnp.ones((4,)), 1e-5))
    wanted = x / np.sqrt(np.mean(x**2))
    if magnitude < 1e19:
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    else:
        assert np.isnan(found).all()
