"""The reference is right: it agrees with llama.cpp, and with itself where forms must agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

import blocks
from blocks import dequantize
from reference import Reference

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "reference.json").read_text())
TOKENS = GOLDENS["tokens"]

# llama.cpp computes in float32. Measured over all cases: at most 1.6e-6 of the largest logit.
FLOAT32_ROUNDING = 5e-6


@pytest.mark.parametrize("case", GOLDENS["cases"].values(), ids=GOLDENS["cases"])
def test_logits_equal_llama_cpp_to_float32_rounding(tiny_llama, case):
    logits = Reference(tiny_llama(**case["options"])).logits(TOKENS)
    assert logits.dtype == np.float64
    few = logits[GOLDENS["positions"]]
    assert few.argmax(axis=1).tolist() == case["largest"]
    error = np.abs(few[:, GOLDENS["ids"]] - case["logits"]).max() / np.abs(few).max()
    assert error < FLOAT32_ROUNDING


def test_goldens_tell_the_options_apart():
    logits = {name: np.array(case["logits"]) for name, case in GOLDENS["cases"].items()}
    same = {("grouped_query", "no_scaling"), ("linear", "linear_by_its_old_key")}
    names = list(logits)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            difference = np.abs(logits[a] - logits[b]).max()
            assert (difference == 0) if (a, b) in same else (difference > 0.1), (a, b)


def test_experts_in_files_of_their_own_equal_merged_ones(tiny_llama):
    options = {"experts": 4, "experts_used": 2, "qtype": "Q4_0"}
    merged = Reference(tiny_llama(**options)).logits(TOKENS)
    separate = Reference(tiny_llama(**options, merged=False)).logits(TOKENS)
    np.testing.assert_array_equal(separate, merged)


@pytest.mark.parametrize("options", [{}, {"experts": 4, "experts_used": 2}], ids=["dense", "moe"])
def test_greedy_with_a_cache_equals_the_cacheless_form(tiny_llama, options):
    reference = Reference(tiny_llama("Q8_0", **options))
    tokens = TOKENS[:5]
    for _ in range(16):
        tokens.append(int(np.argmax(reference.logits(tokens)[-1])))
    assert reference.greedy(TOKENS[:5], 16) == tokens[5:]


def test_tokens_one_at_a_time_equal_all_at_once(tiny_llama):
    reference = Reference(tiny_llama())
    past = reference._nothing()
    hidden = np.concatenate([reference._forward([token], past) for token in TOKENS])
    # Sums in another order: a few units in float64's last place.
    np.testing.assert_allclose(hidden, reference.hidden(TOKENS), rtol=0, atol=1e-13)


def test_later_tokens_change_no_earlier_logits(tiny_llama):
    reference = Reference(tiny_llama())
    np.testing.assert_allclose(
        reference.logits(TOKENS)[:20], reference.logits(TOKENS[:20]), rtol=0, atol=1e-13
    )


def test_weights_are_the_same_whether_kept_or_not(tiny_llama):
    kept, dropped = Reference(tiny_llama("Q6_K")), Reference(tiny_llama("Q6_K"))
    dropped._keep = False
    np.testing.assert_array_equal(kept.logits(TOKENS), dropped.logits(TOKENS))


def test_q8_k_is_scale_times_integer():
    d = np.array([0.5, -2.0], "<f4")
    q = np.arange(512).reshape(2, 256).astype(np.int8)
    sums = np.full((2, 16), 12_345, "<i2")  # a format's bookkeeping, no part of the weights
    raw = np.hstack([d[:, None].view(np.uint8), q.view(np.uint8), sums.view(np.uint8)])
    assert raw.shape == (2, 292)
    np.testing.assert_array_equal(
        dequantize(raw.reshape(1, -1), QType.Q8_K), (d[:, None] * q).reshape(1, 512)
    )


def test_q8_k_of_a_ramp_is_the_ramp_to_half_a_step():
    ramp = ((np.arange(1024) - 512) * np.float32(0.5 / 512)).astype(np.float32)
    raw = blocks.quantize(ramp[None], QType.Q8_K)
    weights = dequantize(raw, QType.Q8_K)[0]
    few = weights[[0, 128, 256, 512, 800, 1023]]
    np.testing.assert_allclose(few, [-0.5, -0.374, -0.25, 0, 0.283, 0.499], atol=0.002)
    steps = np.abs(ramp).reshape(4, 256).max(axis=1) / 127
    assert (np.abs(weights - ramp).reshape(4, 256) <= 0.5001 * steps[:, None]).all()


def test_q1_0_is_plus_or_minus_the_scale():
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.array([0.5], "<f2").view(np.uint8)
    raw[0, 2] = 0b0000_0101
    weights = dequantize(raw, QType.Q1_0)[0]
    assert weights[:4].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert (weights[4:] == -0.5).all()


FORMATS = [q for q in QType if q.name not in {"I8", "I16", "I32", "I64", "F64"}]


@pytest.mark.parametrize("qtype", FORMATS, ids=lambda q: q.name)
def test_random_blocks_are_finite_and_differ(qtype):
    raw = blocks.random_blocks(qtype, (64, 2048), np.random.default_rng(0))
    weights = dequantize(raw, qtype)
    assert weights.shape == (64, 2048)
    assert np.isfinite(weights).all()
    assert len(np.unique(weights)) > 100


@pytest.mark.parametrize("qtype", [q for q in FORMATS if q.name != "Q8_1"], ids=lambda q: q.name)
def test_tiny_models_of_every_format_have_logits_of_sensible_size(tiny_llama, qtype):
    logits = Reference(tiny_llama(qtype)).logits(TOKENS[:4])
    assert 1 < logits.std() < 4
