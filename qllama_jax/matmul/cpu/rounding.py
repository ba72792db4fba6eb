"""Activations in whole steps of their group, which a CPU's integer and bfloat16 kernels multiply.

A step is a power of two, and the largest magnitude of a group 128 to 256 of them; steps are larger
where a sum of int16 might overflow otherwise (`Layout.largest_sum`). So what x is rounded to is a
number of bfloat16 too, which `bfloat16_kernel` multiplies. Such blocks with an exponent each are
MXINT8 of OCP's Microscaling Formats (1.0, 2023), of one bit more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from qllama_jax.matmul.cpu.fence import Fence
from qllama_jax.matmul.cpu.layouts import MOST_STEPS, Layout

# Those of a residual for which sums of 4-bit weights have room.
MOST_RESIDUAL_STEPS = 127


class Rounded(NamedTuple):
    """Activations as the integer kernel wants them; P is 2 B with a residual, else B."""

    factors: Array  # uint16[G, P, fields]: what each field's word is multiplied by
    total: Array  # float32[G, P]: the sum of a group's integers
    step: Array  # float32[G, B]


def round_activations(
    x: Float[Array, "B in"], layout: Layout, with_residual: bool
) -> Float[Array, "B in"]:
    """Return x as the kernels round it.

    With a residual, what was rounded away is added in steps 2 `residual_steps` times as fine.
    """
    return functools.reduce(lax.add, rounded_parts(x, layout, with_residual)).astype(x.dtype)


def rounded_parts(
    x: Float[Array, "B in"], layout: Layout, with_residual: bool
) -> list[Float32[Array, "B in"]]:
    """Return what `round_activations` is the sum of: x in whole steps, and perhaps the residual."""
    step, scaled = _scale(x.astype(jnp.float32), layout)
    whole, *residual = _integers(scaled, layout, with_residual)
    parts = [whole, *(part * np.float32(0.5 / residual_steps(layout)) for part in residual)]
    return [(step[..., None] * part).reshape(x.shape) for part in parts]


def residual_steps(layout: Layout) -> int:
    """Steps of a residual up to half a step of x: as many as its sum over a group has room for."""
    bound = layout.largest_sum
    return MOST_RESIDUAL_STEPS if bound is None else min(MOST_RESIDUAL_STEPS, bound // layout.group)


def to_integers(
    x: Float[Array, "B in"], layout: Layout, with_residual: bool, fence: Fence
) -> Rounded:
    """Return x in whole steps, and perhaps the residual, mixed as a word's fields want them."""
    step, scaled = _scale(x.astype(jnp.float32), layout)
    parts = fence(jnp.concatenate(_integers(scaled, layout, with_residual)))
    # Sums and differences of integers below 2^24 are exact in float32. The product takes the place
    # of a gather, which XLA computes a number at a time, and of a sum.
    mixed = lax.dot_general(
        parts.reshape(-1, layout.group),
        layout.factors.mix,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    ).reshape(*parts.shape[:2], -1)
    mixed = mixed.swapaxes(0, 1)
    factors = mixed[..., :-1].astype(jnp.int32).astype(jnp.uint16)
    return Rounded(factors, mixed[..., -1], step.T)


def steps(x: Rounded, layout: Layout) -> tuple[Float32[Array, "G B"], Float32[Array, "G B"]]:
    """Return the step of each group and the sum of its rounded x."""
    B = x.step.shape[1]
    total = x.total[:, :B]
    # Integers know no NaN, and neither does XLA's maximum on a CPU (0.10 and 0.12), but sums do.
    step = x.step + 0 * total
    if x.total.shape[1] > B:
        total = total + x.total[:, B:] * np.float32(0.5 / residual_steps(layout))
    return step, step * total


def _integers(
    scaled: Float32[Array, "B G group"], layout: Layout, with_residual: bool
) -> list[Array]:
    q = jnp.round(scaled)
    return [q, jnp.round((scaled - q) * (2 * residual_steps(layout)))] if with_residual else [q]


def _scale(
    x: Float32[Array, "B in"], layout: Layout
) -> tuple[Float32[Array, "B G"], Float32[Array, "B G group"]]:
    """Return the step of each group and x in steps."""
    B, width = x.shape
    groups = x.reshape(B, width // layout.group, layout.group)
    magnitudes = jnp.abs(groups)
    least = magnitudes.max(-1) * np.float32(1 / MOST_STEPS)
    if (bound := layout.largest_sum) is not None:
        # Rounding adds up to a half for each weight.
        room = np.float32(1 / (bound - layout.group // 2))
        least = jnp.maximum(least, magnitudes.sum(-1) * room)
    # Stored, from jax 0.11 on: XLA would compute it again for every number, and compile that.
    step = lax.optimization_barrier(_next_power_of_two(least))
    return step, groups / step[..., None]


def _next_power_of_two(least: Float32[Array, "B G"]) -> Float32[Array, "B G"]:
    """Return the first power of two above `least`, 2^-126 at least; of infinity, infinity."""
    exponent = lax.bitcast_convert_type(least, jnp.uint32) >> np.uint32(23)  # biased by 127
    exponent = jnp.minimum(exponent, np.uint32(254)) + np.uint32(1)
    return lax.bitcast_convert_type(exponent << np.uint32(23), jnp.float32)
