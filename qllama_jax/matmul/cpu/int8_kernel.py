"""x @ w.T with x in 8 bits and a sign, w in 16-bit words of integers: the CPU's own kernel.

Three stages, kept apart by fences, since what XLA fuses loses half of the vector width or all of
it: the integer products of a group, summed in int16; some groups' sums, scaled, in float32; and
the sum of those. One row of x times Q4_0 [2048, 2048] takes 100 to 118 us that way, ggml's kernel
86 to 95; the same in one loop 194 to 354 us (jax 0.12, two cores of an EPYC Milan).
"""

from __future__ import annotations

import functools
import sys

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int16

from qllama_jax.carries import varying
from qllama_jax.matmul.cpu import processor, rounding
from qllama_jax.matmul.cpu.fence import BARRIER_HOLDS, Fence, fence_for
from qllama_jax.matmul.cpu.layouts import GROUP, MOST_GROUPS
from qllama_jax.matmul.cpu.rounding import Rounded
from qllama_jax.matmul.cpu.weight import CPUWeight

# Rows of x, two for each with a residual, up to which any weight is gone through in one piece.
WHOLE_ROWS = 8
# With more rows a weight is too, where no more sums of groups are stored than these; else it is cut
# into slabs of some tiles, each of which is copied. 16 rows times Q4_0 [2048, 2048] take 0.78 of
# the time in one piece, Q4_K [2048, 5632] 0.72, and XLA half as long. A layer holds the sums of two
# products at once, of small ones three: above 32 MiB glibc asks the system for that memory anew for
# each layer, and a layer takes 1.5 to 1.9 times as long (jax 0.12, an EPYC Turin). With 0.10.2 16
# rows of Q4_0 take 1.2 to 1.7 times as long from 2 million sums on.
WHOLE_SUMS = 6 * 2**20 if BARRIER_HOLDS else 2**20
# Sums of a slab. Before 0.11 XLA makes no use of large ones: 128 rows times Q4_0 [2048, 2048] take
# 9 ms there, and 28 with 2**22 sums; from 0.11 on 10.3 and 9.5.
ACCUMULATORS = 2**22 if BARRIER_HOLDS else 2**20
# More rows of x go through the weight in parts: of 512 rows 128 at a time are the fastest, with
# 158 to 175 billion operations a second in Q4_0 and Q4_K, dequantized tiles 148 to 162 before they
# were wide (two cores of an EPYC Milan).
PART_ROWS = 128
# Parts that meet a slab of the weight one after the other, while it lies in the caches: 512 rows
# take 5 % less time than with a copy of each slab for each part.
SLAB_PARTS = 4
# Rows and columns of a weight from which on, with AVX2, this kernel is the fastest for any rows.
LARGE = 2048
# Rows times sums of each, up to which stage three adds these in one kernel with what follows, and
# not by a reduction. That takes 3.7 us for 6 sums of 1,536 columns and 65 us for 16 of 32,000;
# with it 2 and 4 rows times Q4_K [5632, 2048] take 1.1 to 1.2 times as long in all, a row times
# Q4_0 [2048, 5632], of 22 sums, 1.04 times, but 8 rows of those 0.93 (EPYCs, Genoa and Turin).
ADDED_ONE_BY_ONE = 96


def multiply(x: Float[Array, "B in"], w: CPUWeight, with_residual: bool) -> Float32[Array, "B out"]:
    """Compute x' @ w.dequantize().T, x' = x as `rounding.round_activations` rounds it."""
    B, width = x.shape
    chunks = -(-B // (PART_ROWS * SLAB_PARTS))
    parts = -(-B // (PART_ROWS * chunks))
    rows = -(-B // (chunks * parts))
    x = jnp.pad(x, ((0, chunks * parts * rows - B), (0, 0)))
    if chunks > 1:
        x = x.reshape(chunks, parts * rows, width)
        y = lax.map(lambda chunk: multiply(chunk, w, with_residual), x)
        return y.reshape(-1, w.out)[:B]
    fence = fence_for(x)
    rounded = [
        fence(rounding.to_integers(part, w.layout, with_residual, fence))
        for part in jnp.split(x, parts)
    ]
    G, P, _ = rounded[0].factors.shape
    if P <= WHOLE_ROWS or (len(rounded) == 1 and G * P * w.padded <= WHOLE_SUMS):
        return _product(w, rounded[0], fence, with_offsets=True)[:, : w.out]
    return _in_slabs(w, rounded, fence)[:B, : w.out]


def _in_slabs(w: CPUWeight, x: list[Rounded], fence: Fence) -> Float32[Array, "B padded"]:
    """Multiply with some tiles of w at a time."""
    G, rows, _ = x[0].factors.shape
    *_, tiles, _, lanes = w.words.shape
    # Two slabs at least: a loop of one trip is inlined, and its stages fused.
    size = max(1, min(-(-tiles // 2), ACCUMULATORS // (G * rows * lanes)))
    B = x[0].step.shape[1]

    def write_tiles(i: Array, y: Array) -> Array:
        # Where `size` does not divide the tiles, the last slab repeats some.
        first = jnp.minimum(i.astype(jnp.int32) * size, tiles - size)  # int64 with jax_enable_x64
        slab = fence(w.slice_tiles(first, size))
        for j, part in enumerate(x):
            # The fence keeps XLA from storing words that it shifts once for all parts: 512 rows
            # of Q4_K [5632, 2048] take 112 instead of 81 ms without it.
            slab = fence(slab)
            product = fence(_product(slab, part, fence, with_offsets=False))
            y = lax.dynamic_update_slice(y, product, (np.int32(j * B), first * lanes))
        return y

    y = varying(jnp.zeros((len(x) * B, w.padded), jnp.float32), x, w)
    y = lax.fori_loop(0, -(-tiles // size), write_tiles, y)
    if w.minimum is not None or w.layout.excess:
        # Of many rows the offsets' part is faster as a product of its own: 128 rows times Q4_K
        # [4096, 2048] take 14.4 ms so, 16.2 ms with it in stage two.
        total = jnp.concatenate([rounding.steps(part, w.layout)[1] for part in x], axis=1)
        offsets = w.offsets().reshape(G, w.padded)
        y = y + jnp.dot(total.T, offsets, precision=lax.Precision.HIGHEST)
    return y


def most_rows(w: CPUWeight, with_residual: bool, *, beside_bfloat16: bool) -> int:
    """Return up to how many rows of x this kernel is faster than a dequantized weight.

    `beside_bfloat16`: than one that is multiplied in bfloat16, by a processor that does that, else
    in float32. The rows at which two take as long, times [5632, 2048] and [2048, 5632] (jax 0.12,
    two cores of an EPYC Genoa; the last column with `--xla_cpu_max_isa=AVX2`, which limits what XLA
    compiles and not its products):

        Q4_0, Q4_K         28 to 36 beside bfloat16, 48 to 100 beside float32, AVX2 100 to 512
        Q6_K, Q3_K, Q2_K   16 to 28                  24 to 40                  24 to 36
        Q5_0, Q5_K         16                        16                        16 to 20

    A residual doubles the work of this kernel and not that of float32's: in Q4_0 16 rows with one,
    as many as 32 without, take 6.0 ms, and tiles 4.9. Not measured since tiles are wide: large
    weights on an EPYC Milan, with AVX2, where this kernel was the faster at 512 rows too; and two
    products of bfloat16 on AMX, which met it at 40 rows, at 32 in five bits.
    """
    layout = w.layout
    if with_residual:
        return 8
    if layout.factors.fields >= 2 * layout.group:  # two fields a weight
        return 16
    if beside_bfloat16 or layout.group < GROUP:
        return 24
    if processor.has_512_bits():
        return 64
    return sys.maxsize if min(w.shape[-2:]) >= LARGE else PART_ROWS


def _product(
    w: CPUWeight, x: Rounded, fence: Fence, *, with_offsets: bool
) -> Float32[Array, "B padded"]:
    B = x.step.shape[1]
    sums = fence(_integer_sums(w, x))
    # In the order of groups again, in which the fence would have stored them.
    sums = jnp.moveaxis(sums, 3, 0).reshape(-1, *sums.shape[1:3], sums.shape[-1])
    parts = fence(_scaled_sums(w, x, sums, with_offsets))
    few = B * len(parts) <= ADDED_ONE_BY_ONE
    y = functools.reduce(lax.add, parts) if few else parts.sum(0)
    return y.reshape(B, -1)


def _streams(groups: int, rows: int) -> int:
    """Return into how many parts a weight's groups are cut that are read side by side.

    An Intel Xeon waits for the first bytes of each page of memory, up to which it reads ahead: of
    four pages one is waited for while others are worked on. A weight out of memory and not out of a
    cache, stage one alone: 14.3 GB/s in one stream, 17.0, 19.8 and 19.4 in 2, 4 and 8; 1.1B in Q4_0
    decodes at 23.1 instead of 20.9 tokens a second. An EPYC Genoa reads one stream the fastest:
    18.0 GB/s of Q4_0, 20.0 of Q4_K and 22.5 of Q6_K, in four 16.9, 16.6 and 17.2; 1.1B decodes 1.25
    (Q4_0) and 1.06 times as fast so (medians of 8 rounds by turns). Others were not measured.

    So many that two cores have equal parts of each. More rows of x, a row and its residual too, are
    bound by arithmetic, and XLA would store their sums twice.
    """
    if processor.vendor() != "GenuineIntel":
        return 1
    if rows > 1:
        return 1
    return next((n for n in (4, 2) if groups % (2 * n) == 0), 1)


def _integer_sums(w: CPUWeight, x: Rounded) -> Int16[Array, "G_S P tiles S lanes"]:
    """Stage one: the sum over a group of (q - middle) times x in steps, by S streams of groups.

    With the tiles inside of the rows LLVM keeps a row's factors, each in all lanes, in registers
    and the first cache: 128 rows of x take 12.4 instead of 13.5 ms (Q4_0 [4096, 2048], an EPYC
    Milan). For 2 to 6 rows the order makes no difference, but out of a stack they took up to 1.4
    times as long with the tiles outside, into which XLA transposed the sums.
    """
    *_, G, tiles, _, lanes = w.words.shape
    _, rows, fields = x.factors.shape
    S = _streams(G, rows)
    shape = (G // S, rows, tiles, S, lanes)
    factors = x.factors.reshape(S, G // S, rows, fields).transpose(1, 2, 0, 3)
    total = x.total.reshape(S, G // S, rows).transpose(1, 2, 0)
    # Takes the integers' middle out.
    start = (np.float32(-w.layout.middle) * total).astype(jnp.int32).astype(jnp.uint16)
    sums = lax.broadcast_in_dim(start, shape, (0, 1, 3))
    first = 0
    for words, bits in w.layout.factors.alike:
        # Words that are alike are one operand, and XLA unrolls the sum over them: the same code as
        # of an operation a field, out of 44 instructions instead of 210 (Q4_0). XLA's passes over a
        # module of many layers take most of the time that it needs to compile.
        operand = lax.slice_in_dim(w.words, words.start, words.stop, words.step, axis=-2)
        wide = (*shape[:-1], len(words), lanes)
        operand = w.take(operand, rows)
        operand = operand.reshape(S, G // S, rows, *operand.shape[1:]).transpose(1, 2, 3, 0, 4, 5)
        products = []
        for bit in bits:
            factor = lax.slice_in_dim(factors, first, first + len(words), axis=-1)
            factor = lax.broadcast_in_dim(factor, wide, (0, 1, 3, 4))
            shifted = operand
            if bit:
                shifted = lax.shift_right_logical(operand, jnp.full(wide, bit, jnp.uint16))
            products.append(lax.mul(shifted, factor))
            first += len(words)
        product = functools.reduce(lax.add, products)
        sums = lax.add(sums, lax.reduce(product, np.uint16(0), lax.add, (4,)))
    return sums.astype(jnp.int16)


def _scaled_sums(
    w: CPUWeight, x: Rounded, sums: Int16[Array, "G P tiles lanes"], with_offsets: bool
) -> Float32[Array, "parts B tiles lanes"]:
    """Stage two: the sum over groups whose scales lie side by side; of many rows over more."""
    G, B = x.step.shape
    rows = sums.shape[1]
    layout = w.layout
    *_, sums_of_weight, tiles, count, lanes = w.scale.shape
    if rows > 1:
        more = range(1, MOST_GROUPS // count + 1)
        count *= max(n for n in more if sums_of_weight % n == 0)

    def split(leaf: Array) -> Array:
        return leaf.reshape(G // count, count, *leaf.shape[1:])

    def of_weight(leaf: Array) -> Array:
        leaf = w.take(leaf, B).reshape(-1, B, tiles, leaf.shape[-2], lanes)
        leaf = leaf.transpose(0, 3, 1, 2, 4).reshape(G // count, count, B, tiles, lanes)
        return leaf.astype(jnp.float32)

    def of_rows(leaf: Array) -> Array:
        return split(leaf)[..., None, None]

    def of_super_block(leaf: Array) -> Array:
        leaf = w.take(leaf, G // count // leaf.shape[-3] * B)
        return leaf.reshape(G // count, B, tiles, lanes).astype(jnp.float32)

    step, total = rounding.steps(x, layout)
    # Cut before it is converted: what is converted first XLA stores, and this stage takes eight
    # times as long for four rows with a residual.
    exact = sums[:, :B].astype(jnp.float32)
    if rows > B:
        finer = sums[:, B:].astype(jnp.float32)
        exact = exact + finer * np.float32(0.5 / rounding.residual_steps(layout))
    product = split(exact) * of_rows(step)
    if with_offsets and layout.excess:
        product = product + np.float32(layout.excess) * of_rows(total)
    y = _sum_of_groups(of_weight(w.scale) * product)
    if w.super_scale is not None:
        y = y * of_super_block(w.super_scale)
    if not with_offsets or w.minimum is None:
        return y
    z = _sum_of_groups(of_weight(w.minimum) * of_rows(total))
    if w.super_minimum is not None:
        z = z * of_super_block(w.super_minimum)
    return y - z if layout.subtracts_minimum else y + z


def _sum_of_groups(terms: Float32[Array, "n groups _ _ lanes"]) -> Array:
    """Sum over groups, one by one: XLA's code for a reduction would leave the lanes empty."""
    return functools.reduce(lax.add, (terms[:, i] for i in range(terms.shape[1])))
