"""Distances between this package, llama.cpp and float64 for one file of the matrix."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import qllama_jax as ql
from ggml_rounding import RoundedReference, rounded_like_ggml
from matrix import TOKENS
from reference import Reference

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "matrix.json").read_text())

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Distances:
    """Each is max|a - b| over GOLDENS["ids"] over the largest logit, position by position [T].

    `error`: the package from float64. `distance`: the package from llama.cpp. `rounding`: what
    llama.cpp's rounding of activations does in float64. `reference_left`, `left`: what is left
    between float64, or the package, and llama.cpp when both round alike.
    """

    error: Array
    distance: Array | None = None
    rounding: Array | None = None
    reference_left: Array | None = None
    left: Array | None = None


def distances(path: Path, name: str) -> Distances:
    """Compare a file; without llama.cpp where it cannot run it."""
    exact, ours = Reference(path).logits(TOKENS), our_logits(path)
    size = np.abs(exact).max(axis=1)

    def between(a: Array, b: Array) -> Array:
        return np.abs(a - b).max(axis=1) / size

    error = between(ours, exact)
    if name not in GOLDENS["cases"]:
        return Distances(error)
    golden = GOLDENS["cases"][name]
    if hashlib.sha256(path.read_bytes()).hexdigest() != golden["sha256"]:
        raise ValueError(f"{name}: not the file that llama.cpp ran; write the goldens again")
    theirs = np.frombuffer(base64.b64decode(golden["logits"]), "<f4").astype(np.float64)
    theirs = theirs.reshape(len(TOKENS), -1)
    few = GOLDENS["ids"]
    alike = RoundedReference(path).logits(TOKENS)
    with rounded_like_ggml():
        # What the context patches is the product with blocks as the file has them.
        ours_alike = our_logits(path, layout="file")
    return Distances(
        error=error,
        distance=between(ours[:, few], theirs),
        rounding=between(alike[:, few], exact[:, few]),
        reference_left=between(alike[:, few], theirs),
        left=between(ours_alike[:, few], theirs),
    )


def our_logits(path: Path, layout: Literal["auto", "file"] = "auto") -> Array:
    """Logits float64 [T, V] of the package, after each of TOKENS."""
    model = ql.load(path, layout=layout)
    cache = ql.init_cache(model.config, 1, len(TOKENS) + 8)
    tokens = jnp.asarray([TOKENS], jnp.int32)
    logits, _ = ql.forward(model.params, tokens, cache, config=model.config)
    return np.asarray(logits[0], np.float64)
