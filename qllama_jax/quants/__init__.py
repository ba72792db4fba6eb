"""What each ggml format means: its block struct, its formula, and the exact `dequantize`."""

from qllama_jax.quants.block import FORMATS, Block, Leaf, take
from qllama_jax.quants.codebook import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from qllama_jax.quants.floats import BF16, F16, F32
from qllama_jax.quants.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K
from qllama_jax.quants.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from qllama_jax.quants.nonlinear import IQ4_NL, IQ4_XS, MXFP4, NVFP4
from qllama_jax.quants.old_layouts import (
    Q4_0_V1,
    Q4_0_V2,
    Q4_1_V1,
    Q4_1_V2,
    Q4_2_V1,
    Q5_0_V1,
    Q5_1_V1,
    Q8_0_V2,
)
from qllama_jax.quants.ternary import Q1_0, TQ1_0, TQ2_0

__all__ = [
    "BF16",
    "F16",
    "F32",
    "FORMATS",
    "IQ1_M",
    "IQ1_S",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ3_S",
    "IQ3_XXS",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
    "Q1_0",
    "Q2_K",
    "Q3_K",
    "Q4_0",
    "Q4_0_V1",
    "Q4_0_V2",
    "Q4_1",
    "Q4_1_V1",
    "Q4_1_V2",
    "Q4_2_V1",
    "Q4_K",
    "Q5_0",
    "Q5_0_V1",
    "Q5_1",
    "Q5_1_V1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "Q8_0_V2",
    "Q8_K",
    "TQ1_0",
    "TQ2_0",
    "Block",
    "Leaf",
    "take",
]
