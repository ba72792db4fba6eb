"""Rotary position embedding, exact at any position.

An angle p * w in float32 is wrong by 1e-4 at position 4,095 and 2e-3 at 131,071: the product has
more digits than float32 holds. Here a frequency is a count of 2^-32 turns, and p times it is an
unsigned 32-bit product, where whole turns fall away by wrap-around; what is left is a fraction of
one turn, so the error does not grow with the position (2e-7 in cos and sin at position 131,071).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int32

from qllama_jax.config import ModelConfig
from qllama_jax.errors import GGUFError
from qllama_jax.quants import Leaf

# Bits of a frequency kept below 2^-32 turns; their product with a position must fit 32 bits.
FINE_BITS = 12
MAX_POSITIONS = 2 ** (32 - FINE_BITS)

# Pairs that turn more often than this in the trained context stay, those below the second are
# stretched by the full factor (ggml's defaults beta_fast and beta_slow).
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0


@struct.dataclass
class RopeFrequencies:
    """Turns a position for each pair of channels, (coarse + fine 2^-12) 2^-32; cos and sin scale.

    coarse, fine: uint32 `[pairs]`; magnitude: float32 scalar.
    """

    coarse: Leaf
    fine: Leaf
    magnitude: Leaf


def rope_frequencies(
    config: ModelConfig, freq_factors: Float32[np.ndarray, " pairs"] | None = None
) -> RopeFrequencies:
    """Return base^(-2i / rope_dim) / freq_factors[i] radians a position, scaled, as turns (numpy).

    Sources: Su et al. 2021 (RoFormer); the factors of Llama 3.1 and the kinds of scaling as ggml's
    ggml_rope_ext: linear (Chen et al. 2023), yarn (Peng et al. 2023) and longrope (Ding et al.
    2024), whose factors for short or for long contexts are given as `freq_factors`.

    Raises:
        GGUFError: constants without a meaning.
    """
    exponent = np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim
    with np.errstate(all="ignore"):  # what comes of a file's constants is judged below
        radians = config.rope_theta**-exponent
        if freq_factors is not None:
            radians = radians / freq_factors.astype(np.float64)
        radians, scale = _scale(radians, config)
        magnitude = np.float32(scale)
    found = f"rope: freq_base {config.rope_theta}, {config.rope_scaling}"
    if not np.isfinite(radians).all():
        raise GGUFError(f"{found} give frequencies up to {radians.max()}, wanted finite ones")
    if not 0 < magnitude < np.inf:
        raise GGUFError(f"{found} scale cos and sin by {scale}, wanted a float32 above 0")
    turns = radians / (2 * np.pi) % 1.0  # positions are integers: whole turns change nothing
    steps = np.round(turns * 2.0 ** (32 + FINE_BITS)).astype(np.uint64)
    return RopeFrequencies(
        coarse=(steps >> np.uint64(FINE_BITS)).astype(np.uint32),
        fine=(steps & np.uint64(2**FINE_BITS - 1)).astype(np.uint32),
        magnitude=magnitude,
    )


def _scale(radians: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, float]:
    scaling = config.rope_scaling
    if scaling is None:
        return radians, 1.0
    if scaling.kind != "yarn":  # longrope is linear besides its factors
        return radians / scaling.factor, scaling.attn_factor
    if config.rope_theta <= 1:
        raise GGUFError(f"rope scaling 'yarn': freq_base {config.rope_theta}, wanted above 1")

    def pair_with_turns(turns: float) -> float:
        """Return the (fractional) pair that makes so many turns in the original context."""
        wavelength = scaling.original_context_length / (turns * 2 * math.pi)
        return config.rope_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_with_turns(YARN_BETA_FAST)), 0)
    last = min(math.ceil(pair_with_turns(YARN_BETA_SLOW)), config.rope_dim - 1)
    stretched = np.clip((np.arange(radians.size) - first) / max(last - first, 0.001), 0, 1)
    blended = radians * (1 - stretched) + radians / scaling.factor * stretched
    grown = 1 + 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 1.0
    return blended, scaling.attn_factor * grown


def rope_cos_sin(
    frequencies: RopeFrequencies, positions: Int32[Array, "B T"]
) -> tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]]:
    """Return cos and sin of position times frequency, for positions 0 .. 2^20 - 1."""
    p = positions.astype(jnp.uint32)[..., None]
    turns = p * frequencies.coarse[None, None] + (
        (p * frequencies.fine[None, None]) >> np.uint32(FINE_BITS)
    )
    # As a signed number the fraction lies in [-1/2, 1/2) turns: small angles stay small.
    angle = turns.astype(jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi * 2.0**-32)
    return jnp.cos(angle) * frequencies.magnitude, jnp.sin(angle) * frequencies.magnitude


def rotate(
    x: Float[Array, "B T heads H"],
    cos: Float32[Array, "B T pairs"],
    sin: Float32[Array, "B T pairs"],
) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (2i, 2i + 1) of the first channels; channels past them stay as they are.

    GGUF files of the llama architecture hold q and k permuted for this interleaved order; rotating
    the halves of a head instead, as Hugging Face's Llama does, would silently give other text.
    """
    *lead, _ = x.shape
    pairs = cos.shape[-1]
    paired = x[..., : 2 * pairs].reshape(*lead, pairs, 2)
    even, odd = paired[..., 0], paired[..., 1]
    c, s = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    rotated = jnp.stack([even * c - odd * s, even * s + odd * c], axis=-1)
    return jnp.concatenate([rotated.reshape(*lead, 2 * pairs), x[..., 2 * pairs :]], axis=-1)
