"""Weights packed for a CPU, and which kernel multiplies with them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from qllama_jax.matmul import Activations, matmul, register, register_expert, xla
from qllama_jax.matmul.cpu import (
    bfloat16_kernel,
    float_kernel,
    int8_kernel,
    processor,
    rounding,
    tiles,
)
from qllama_jax.matmul.cpu.layouts import LAYOUTS
from qllama_jax.matmul.cpu.pack import can_pack, pack, room_for
from qllama_jax.matmul.cpu.weight import CPUWeight

__all__ = [
    "LAYOUTS",
    "CPUWeight",
    "can_pack",
    "compiler_options",
    "pack",
    "reads_stacks",
    "room_for",
]


@register
def _(w: CPUWeight, x: Float[Array, "*batch in"], activations: Activations) -> Array:
    *batch, width = x.shape
    rows = x.reshape(-1, width)
    B = rows.shape[0]
    if B == 0:
        return jnp.zeros((*batch, w.out), x.dtype)
    if not w.layout.words:
        # These have no integer kernel to gain from. Numbers that are floats in the file meet float
        # activations.
        if w.format == "Q8_0":
            rows = xla.round_activations(rows, activations)
        few = B <= float_kernel.MOST_ROWS
        y = _few_rows(rows, w) if few else _tiles(rows, w, in_bfloat16=False)
    elif activations == "float":
        y = _tiles(rows, w, in_bfloat16=False)
    elif activations == "auto" and _is_faster_in_bfloat16(B, w):
        y = _tiles(rows, w, in_bfloat16=True)
    else:
        y = _rounded(rows, w, activations == "int8x2")
    return y.reshape(*batch, w.out)


@register_expert
def _(
    w: CPUWeight, x: Float[Array, "*batch in"], expert: Int32[Array, ""], activations: Activations
) -> Array:
    return matmul(x, w.one_of_stack(expert), activations=activations)


def reads_stacks(rows: int, activations: Activations) -> bool:
    """Whether all kernels read a weight of a stack where it lies; else some copy it first."""
    residuals = rows if activations == "int8x2" else 0
    return activations != "float" and rows + residuals <= int8_kernel.WHOLE_ROWS


def compiler_options() -> dict[str, int]:
    """Return the options for XLA with which a decoding loop is the fastest on this processor.

    XLA's CPU compiler prefers vectors of 256 bits on any processor. With 512 a step of 1.1B in Q4_0
    takes 0.94, in four pairs 0.85 to 1.03 of its time, in other formats 0.92 to 1.06 (jax 0.12, two
    cores of an EPYC Turin, least times of processes by turns). What follows the first stage of the
    kernels gains most. Compilers for other devices take the option too, and make no use of it.
    """
    return {"xla_cpu_prefer_vector_width": 512} if processor.has_undivided_512_bits() else {}


def _is_faster_in_bfloat16(rows: int, w: CPUWeight) -> bool:
    if not processor.multiplies_bfloat16():
        return False
    return rows > int8_kernel.most_rows(w, with_residual=False, beside_bfloat16=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tiles(x: Float[Array, "B in"], w: CPUWeight, in_bfloat16: bool) -> Float[Array, "B out"]:
    rows = x.astype(jnp.bfloat16) if in_bfloat16 else x
    return tiles.by_tiles(rows, w).astype(x.dtype)


@jax.custom_vjp
def _few_rows(x: Float[Array, "B in"], w: CPUWeight) -> Float[Array, "B out"]:
    return float_kernel.multiply(x, w).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x: Float[Array, "B in"], w: CPUWeight, with_residual: bool) -> Float[Array, "B out"]:
    rows, _ = x.shape
    has_unit = processor.has_matrix_unit()
    if rows <= int8_kernel.most_rows(w, with_residual, beside_bfloat16=has_unit):
        y = int8_kernel.multiply(x, w, with_residual)
    elif has_unit:
        y = bfloat16_kernel.multiply(x, w, with_residual)
    else:
        # In float32: a product with half floats would round the weights.
        x32 = x.astype(jnp.float32)
        y = tiles.by_tiles(rounding.round_activations(x32, w.layout, with_residual), w)
    return y.astype(x.dtype)


def _pull_back(w: CPUWeight, dy: Float[Array, "B out"]) -> tuple[Float[Array, "B in"], None]:
    # The gradient of the exact product: that of rounding is zero everywhere.
    filled = jnp.pad(dy, ((0, 0), (0, w.padded - w.out)))
    size = tiles.tile_rows(w.padded, w.shape[-1], w.words.shape[-1])
    return xla.pull_back(filled, w, jnp.int32(0), w.padded, size=size), None


_few_rows.defvjp(lambda x, w: (_few_rows(x, w), w), _pull_back)
_tiles.defvjp(
    lambda x, w, in_bfloat16: (_tiles(x, w, in_bfloat16), w),
    lambda _, w, dy: _pull_back(w, dy),
)
_rounded.defvjp(
    lambda x, w, with_residual: (_rounded(x, w, with_residual), w),
    lambda _, w, dy: _pull_back(w, dy),
)
