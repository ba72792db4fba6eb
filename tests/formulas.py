"""Formulas in float64 that layers are compared with, what they are given, and how near they are."""

from __future__ import annotations

import math

import jax
import numpy as np

FLOAT32 = 2e-6  # relative to the largest value: sums of a few hundred float32 products


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_close(found: jax.Array, wanted: np.ndarray, tolerance: float = FLOAT32) -> None:
    assert found.shape == wanted.shape
    error = np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()
    assert error <= tolerance


def attention64(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Attention in float64, one query head of one query at a time."""
    B, T, N, H = q.shape
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        head, last = n * k.shape[1] // N, positions[b, t] + 1
        scores = q[b, t, n].astype(np.float64) @ k[b, head, :, :last] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ v[b, head, :last]
    return out


def in_tiles(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L, B, K, H, S] and [L, B, K, S, H] as `KVCache` says that all layers' are laid out."""
    L, B, K, H, S = k.shape
    t = math.gcd(S, 64)
    k = k.reshape(L, B, K, H, S // t, t).transpose(0, 1, 4, 2, 3, 5)
    v = v.reshape(L, B, K, S // t, t, H).transpose(0, 1, 3, 2, 4, 5)
    return k, v
