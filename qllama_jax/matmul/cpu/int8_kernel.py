"""x @ w.T with x in int8 and the weight's integers in 16-bit words: the CPU's own kernel.

Three stages, each a loop of its own, as fused they lose half of the vector width or all of it:
integer products of a group summed in int16; the sums of up to 16 groups, scaled, in float32; and
the sum of those.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from qllama_jax.matmul.cpu.layouts import GROUP, INT8_MAX, Layout
from qllama_jax.matmul.cpu.weight import LANES, CPUWeight



def quantize(x, layout, residual):
    """Return integers [parts, B, G, group], step [B, G]"""
    B, width = x.shape
    blocks = x.reshape(B, -1, GROUP)
    magnitudes = jnp.abs(blocks)
    step = magnitudes.max(-1) * np.float32(1 / INT8_MAX)
    bound = layout.largest_sum
    if bound is not None:
        sums = magnitudes.reshape(B, -1, GROUP // layout.group, layout.group).sum(-1).max(-1)
        step = jnp.maximum(step, sums * np.float32(1 / (bound - layout.group // 2)))
    inverse = jnp.where(step > 0, 1 / jnp.where(step > 0, step, 1), 0)
    scaled = blocks * inverse[..., None]
    q = jnp.round(scaled)
    parts = [q]
    if residual:
        parts.append(jnp.round((scaled - q) * (2 * residual)))
    groups = [part.astype(jnp.int32).reshape(B, -1, layout.group) for part in parts]
    per = GROUP // layout.group
    step = jnp.repeat(step, per, axis=-1) if per > 1 else step
    return jnp.concatenate(groups), step


def multiply(x, w: CPUWeight, residual_wanted: bool):
    """x [B, K] f32 -> [B, out]"""
    dtype, x = x.dtype, x.astype(jnp.float32)
    layout = w.layout
    B, _ = x.shape
    once = jnp.where(x[0, 0] > np.float32(3e38), np.int32(2), np.int32(1))
    fence = make_fence(once)
    bound = layout.largest_sum
    residual = 0
    if residual_wanted:
        residual = INT8_MAX if bound is None else min(INT8_MAX, bound // layout.group)
    q, step = quantize(x, layout, residual)
    q, step = fence((q, step))
    f = layout.factors
    multipliers = q[..., f.weight] * f.unit - q[..., f.before] * f.carry
    start = -layout.middle * q.sum(-1)
    total = step * q[:B].sum(-1).astype(jnp.float32)
    if residual:
        total = total + step * q[B:].sum(-1).astype(jnp.float32) * np.float32(1/(2*residual))
    prepared = fence((multipliers.transpose(1, 2, 0).astype(jnp.uint16), start.T.astype(jnp.uint16), step.T, total.T))
    B2 = q.shape[0]
    tiles = w.words.shape[1]
    G = w.words.shape[0]
    if B2 <= 8:
        y = slab(w, prepared, residual, fence)
    else:
        y = rolled(w, prepared, residual, fence)
    return y[:, :w.out].astype(dtype)


def make_fence(once):
    def fence(tree):
        return lax.fori_loop(0, once, lambda _, t: lax.optimization_barrier(t), tree)
    return fence
import os
if os.environ.get('QF') == 'bar':
    def make_fence(once): return lax.optimization_barrier

TILES = int(os.environ.get('QT', 32))

def rolled(w, prepared, residual, fence):
    tiles = w.words.shape[1]
    B = prepared[2].shape[1]
    size = min(TILES, tiles)
    def body(i, y):
        start = jnp.minimum(i * size, tiles - size)
        part = lax.optimization_barrier(jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, axis=1), w))
        z = slab(part, prepared, residual, fence)
        return lax.dynamic_update_slice(y, fence(z), (np.int32(0), start * LANES))
    return lax.fori_loop(0, -(-tiles // size), body, jnp.zeros((B, tiles * LANES), jnp.float32))


def slab(w, prepared, residual, fence):
    layout = w.layout
    multipliers, start, step, total = prepared
    acc = start[:, None, :, None]
    f = layout.factors
    for i, (word, bit) in enumerate(zip(f.word, f.bit)):
        shifted = w.words[:, :, None, int(word)]
        if bit: shifted = shifted >> np.uint16(bit)
        acc = acc + shifted * multipliers[:, None, i, :, None]
    acc = fence(acc.astype(jnp.int16))
    return fence(scaled(w, acc, step, total, residual)).sum(0).transpose(1, 0, 2).reshape(step.shape[1], -1)


def scaled(w, acc, step, total, residual):
    G, tiles, _, L = acc.shape
    B = step.shape[1]
    layout = w.layout
    if w.super_scale is not None:
        R = G // w.super_scale.shape[0]
    else:
        R = next(r for r in (8, 7, 6, 5, 4, 3, 2, 1) if G % r == 0)
    def nth(a, r): return a.reshape(G // R, R, *a.shape[1:])[:, r]
    y = z = None
    for r in range(R):
        a = nth(acc, r)
        if residual:
            a = a[:, :, :B].astype(jnp.float32) + a[:, :, B:].astype(jnp.float32) * np.float32(1/(2*residual))
        else: a = a.astype(jnp.float32)
        s = nth(step, r)[:, None, :, None]; t = nth(total, r)[:, None, :, None]
        a = a * s
        if layout.excess: a = a + t * np.float32(layout.excess)
        a = a * nth(w.scale, r)[:, :, None].astype(jnp.float32)
        y = a if y is None else y + a
        if w.minimum is not None:
            m = nth(w.minimum, r)[:, :, None].astype(jnp.float32) * t
            z = m if z is None else z + m
    if w.super_scale is not None: y = y * w.super_scale[:, :, None].astype(jnp.float32)
    if w.super_minimum is not None: z = z * w.super_minimum[:, :, None].astype(jnp.float32)
    if z is not None: y = y - z if layout.subtracts_minimum else y + z
    return y
