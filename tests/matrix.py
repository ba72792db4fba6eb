"""The matrix of tiny files: every format, and every variant of a model, in a file of its own.

`MATRIX` holds the arguments of `write_tiny_llama` for each; tests compare logits for TOKENS with
the float64 reference and with llama.cpp's, which scripts/make_reference_goldens.py writes down.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: An odd vocabulary; the small model's feed-forward is no power of two either.
V = 389
SMALL: dict[str, Any] = {"embed": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": V}

FORMATS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "Q1_0", "MXFP4", "NVFP4"),
)
LLAMA3 = {"llama.rope.freq_base": 500_000.0}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 64,
}
LONGROPE = {
    "llama.rope.scaling.type": "longrope",
    "llama.rope.scaling.attn_factor": 1.19,
    "llama.rope.scaling.original_context_length": 64,
}
# llama.cpp goes by the context that it runs, never below 256 tokens, where this library goes by
# the file's: both are within 512.
LONGROPE_SHORT = LONGROPE | {"llama.rope.scaling.original_context_length": 512}
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "multi_head": {"kv_heads": 4},
    "multi_query": {"kv_heads": 1},
    "long_heads": {"head_dim": 32},
    "short_heads": {"head_dim": 8},
    "partly_rotated": {"metadata": {"llama.rope.dimension_count": 8}},
    "biases": {"biases": True},
    "rope_freqs": {"rope_freqs": True, "metadata": LLAMA3},
    "linear": {"metadata": LINEAR},
    "yarn": {"metadata": YARN},
    "longrope_long": {"longrope": True, "metadata": LONGROPE},
    "longrope_short": {"longrope": True, "metadata": LONGROPE_SHORT},
    "fused": {"fused_qkv": True, "seed": 1},
    "fused_with_biases": {"fused_qkv": True, "biases": True},
    "experts": {"experts": 4, "experts_used": 2},
    "experts_apart": {"experts": 4, "experts_used": 2, "merged": False, "seed": 1},
    "top_1": {"experts": 8, "experts_used": 1},
    "all_experts": {"experts": 3, "experts_used": 3},
    "one_expert": {"seed": 2, "metadata": {"llama.expert_count": 1}},
    "large_eps": {"metadata": {"llama.attention.layer_norm_rms_epsilon": 0.5}},
    "three_layers": {"layers": 3},
}

MATRIX: dict[str, dict[str, Any]] = {
    **{name: {"qtype": name, "layers": 1, "vocab": V} for name in FORMATS},
    **{
        name: {"qtype": "Q4_0", **SMALL, "layers": 1, **options}
        for name, options in VARIANTS.items()
    },
}
TOKENS: list[int] = np.random.default_rng(1).integers(0, V, 24).tolist()

#: What llama.cpp does with the files that it cannot run.
NOT_IN_LLAMA_CPP = {
    "Q8_K": "aborts: it has no product and no row gather for weights of the type",
    "partly_rotated": "refuses: a Llama turns whole heads there",
    "experts_apart": "refuses: it no longer joins tensors of one expert each",
    "one_expert": "aborts: an expert count without a number of experts used",
}
