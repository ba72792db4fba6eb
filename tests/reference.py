"""The Llama model once more, in float64 numpy: what the package's tests compare against.

Written to be read from top to bottom beside llama.cpp, not to be fast. It shares no code with the
package: the file is read and dequantized by gguf-py (through `blocks.dequantize`), and everything
else is here.

Shapes: T tokens, S key positions, D model, N query heads, K key-value heads, H head, F ffn, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from blocks import dequantize

Float64 = NDArray[np.float64]
#: Keys [S, K, H] and values [S, K, H] of the positions so far, one pair a layer.
Past = list[tuple[Float64, Float64]]

#: Weights are kept in float64 up to this many of them (2 GiB), and beyond it dequantized at each
#: use. SmolLM2-135M has 135 million.
KEEP_WEIGHTS = 2**28


class Reference:
    """A GGUF file of architecture "llama": Llama, Mistral, Mixtral and their like."""

    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("tokenizer.")
        }
        self.num_layers = self._key("block_count")
        self.num_heads = self._key("attention.head_count")
        self.num_kv_heads = self._key("attention.head_count_kv", self.num_heads)
        width = self._key("embedding_length") // self.num_heads
        self.key_length = self._key("attention.key_length", width)
        self.value_length = self._key("attention.value_length", width)
        self.eps = self._key("attention.layer_norm_rms_epsilon")
        self._weights: dict[str, Float64] = {}
        self._keep = sum(int(t.n_elements) for t in reader.tensors) <= KEEP_WEIGHTS
        self._frequencies, self._magnitude = self._rope()

    # What there is to ask.

    def logits(self, tokens: Sequence[int] | NDArray[np.integer]) -> Float64:
        """Logits [T, V] after each token of one sequence."""
        return self.unembed(self.hidden(tokens))

    def hidden(self, tokens: Sequence[int] | NDArray[np.integer]) -> Float64:
        """Final hidden states [T, D]: normalised, ready for the output matrix."""
        return self._forward(tokens, self._nothing())

    def unembed(self, hidden: Float64) -> Float64:
        """Logits [T, V] of final hidden states [T, D]."""
        # A file without an output matrix ties it to the embedding.
        name = "output" if "output.weight" in self.tensors else "token_embd"
        return self._linear(name, hidden)

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The n tokens that follow: at each step the one with the largest logit."""
        past = self._nothing()
        hidden = self._forward(tokens, past)
        generated = []
        for _ in range(n):
            generated.append(int(np.argmax(self.unembed(hidden[-1:]))))
            hidden = self._forward(generated[-1:], past)
        return generated

    # The model.

    def _forward(self, tokens: Sequence[int] | NDArray[np.integer], past: Past) -> Float64:
        """Hidden states [T, D] of tokens that come after `past`, which grows by them."""
        x = self._embed(np.asarray(tokens))
        for i in range(self.num_layers):
            x = x + self._attention(i, self._norm(f"blk.{i}.attn_norm", x), past)
            x = x + self._feed_forward(i, self._norm(f"blk.{i}.ffn_norm", x))
        return self._norm("output_norm", x)

    def _embed(self, tokens: NDArray[np.integer]) -> Float64:
        if tokens.ndim != 1 or tokens.min() < 0:
            raise ValueError(f"wanted a list of token ids, found {tokens!r}")
        tensor = self.tensors["token_embd.weight"]
        return dequantize(tensor.data[tokens], tensor.tensor_type).astype(np.float64)

    def _norm(self, name: str, x: Float64) -> Float64:
        """RMSNorm: x / sqrt(mean(x²) + eps) · w."""
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.eps) * self._weight(f"{name}.weight")

    def _attention(self, i: int, x: Float64, past: Past) -> Float64:
        """Causal attention; every N // K query heads share a key-value head."""
        T, N, K = len(x), self.num_heads, self.num_kv_heads
        old_keys, old_values = past[i]
        start = len(old_keys)
        positions = np.arange(start, start + T)

        q, k, v = self._query_key_value(i, x)
        q = q.reshape(T, N, self.key_length)
        k = k.reshape(T, K, self.key_length)
        v = v.reshape(T, K, self.value_length)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        keys, values = past[i] = np.concatenate([old_keys, k]), np.concatenate([old_values, v])

        attended = np.empty((T, N, self.value_length))
        for n in range(N):
            kv = n // (N // K)
            scores = q[:, n] @ keys[:, kv].T / math.sqrt(self.key_length)  # [T, S]
            future = np.arange(start + T)[None, :] > positions[:, None]
            attended[:, n] = softmax(np.where(future, -np.inf, scores)) @ values[:, kv]
        return self._linear(f"blk.{i}.attn_output", attended.reshape(T, -1))

    def _query_key_value(self, i: int, x: Float64) -> tuple[Float64, Float64, Float64]:
        """The three projections, from a matrix each or from one with all their rows."""
        if f"blk.{i}.attn_qkv.weight" in self.tensors:
            together = self._linear(f"blk.{i}.attn_qkv", x)
            end_q = self.num_heads * self.key_length
            end_k = end_q + self.num_kv_heads * self.key_length
            return together[:, :end_q], together[:, end_q:end_k], together[:, end_k:]
        q, k, v = (self._linear(f"blk.{i}.attn_{name}", x) for name in "qkv")
        return q, k, v

    def _feed_forward(self, i: int, x: Float64) -> Float64:
        if f"blk.{i}.ffn_gate_inp.weight" in self.tensors:
            return self._mixture_of_experts(i, x)
        gate = self._linear(f"blk.{i}.ffn_gate", x)
        up = self._linear(f"blk.{i}.ffn_up", x)
        return self._linear(f"blk.{i}.ffn_down", silu(gate) * up)

    def _mixture_of_experts(self, i: int, x: Float64) -> Float64:
        """Sum of the most probable experts' outputs, weighted by probability among themselves."""
        probabilities = softmax(self._linear(f"blk.{i}.ffn_gate_inp", x))  # over all experts
        out = np.zeros_like(x)
        for t in range(len(x)):
            # Stable, so that of equal probabilities the expert with the lower index comes first.
            chosen = np.argsort(-probabilities[t], kind="stable")[: self._key("expert_used_count")]
            total = probabilities[t, chosen].sum()
            for e in chosen:
                gate = self._expert(i, "ffn_gate", e, x[t])
                up = self._expert(i, "ffn_up", e, x[t])
                y = self._expert(i, "ffn_down", e, silu(gate) * up)
                out[t] += probabilities[t, e] / total * y
        return out

    # Rotary position embedding.

    def _rotate(self, x: Float64, positions: NDArray[np.integer]) -> Float64:
        """Turn each pair of neighbours (2j, 2j + 1) of a head, [T, *, H], by its angle.

        "llama" files order the rows of attn_q and attn_k for pairs of neighbours, unlike
        checkpoints whose pairs are half a head apart.
        """
        angles = positions[:, None, None] * self._frequencies  # [T, 1, pairs]
        cos, sin = np.cos(angles) * self._magnitude, np.sin(angles) * self._magnitude
        rotated = x.copy()  # dimensions beyond rope.dimension_count stay
        pairs = 2 * len(self._frequencies)
        even, odd = x[..., 0:pairs:2], x[..., 1:pairs:2]
        rotated[..., 0:pairs:2] = even * cos - odd * sin
        rotated[..., 1:pairs:2] = even * sin + odd * cos
        return rotated

    def _rope(self) -> tuple[Float64, float]:
        """Angle a position for each pair, and what cos and sin are multiplied by."""
        dims = self._key("rope.dimension_count", self.key_length)
        base = self._key("rope.freq_base", 10_000.0)
        pair = np.arange(dims // 2)
        frequencies = base ** (-2.0 * pair / dims)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self._weight("rope_freqs.weight")

        kind = self._key("rope.scaling.type", "linear")
        # 0 means 1; the second key is the first one's name until 2023.
        factor = self._key("rope.scaling.factor", self._key("rope.scale_linear", 0.0)) or 1.0
        magnitude = self._key("rope.scaling.attn_factor", 1.0)
        if kind == "none":
            return frequencies, magnitude
        if kind == "linear":
            return frequencies / factor, magnitude
        context = self._key("rope.scaling.original_context_length", self._key("context_length"))
        # 0 means the model's own context too, but longrope compares with the 0.
        if kind == "longrope":
            # One set of factors, by the context that the model is run at: here the file's.
            size = "long" if self._key("context_length") > context else "short"
            factors = self._weight(f"rope_factors_{size}.weight")
            return frequencies / factors / factor, magnitude
        if kind != "yarn":
            raise NotImplementedError(f"rope scaling {kind!r}")
        context = context or self._key("context_length")

        # YaRN: fast pairs keep their angle, slow ones are stretched, between them it is blended.
        # A pair is fast if it turns more than 32 times in the original context, slow below once.

        def pair_that_turns(times: float) -> float:
            return dims * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

        fast = max(0, math.floor(pair_that_turns(32)))
        slow = min(dims - 1, math.ceil(pair_that_turns(1)))
        keep = 1 - np.clip((pair - fast) / max(0.001, slow - fast), 0, 1)
        frequencies = frequencies * keep + frequencies / factor * (1 - keep)
        return frequencies, magnitude * (1 + 0.1 * math.log(factor) if factor > 1 else 1.0)

    # What the file holds.

    def _key(self, name: str, *default):
        """Value of metadata key llama.{name}, else the default, else a KeyError."""
        key = f"llama.{name}"
        return self.metadata.get(key, *default) if default else self.metadata[key]

    def _linear(self, name: str, x: Float64) -> Float64:
        """x @ w.T, and the bias if the file has one."""
        y = self._product(x, f"{name}.weight")
        return y + self._weight(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def _expert(self, i: int, name: str, e: int, x: Float64) -> Float64:
        """x @ w.T of one expert, from the merged tensor or, in older files, from its own."""
        merged = f"blk.{i}.{name}_exps.weight"
        if merged in self.tensors:
            return self._product(x, merged, e)
        return self._product(x, f"blk.{i}.{name}.{e}.weight")

    def _product(self, x: Float64, name: str, e: int | None = None) -> Float64:
        weight = self._weight(name)
        return x @ (weight if e is None else weight[e]).T

    def _weight(self, name: str) -> Float64:
        if name in self._weights:
            return self._weights[name]
        tensor = self.tensors[name]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if self._keep:
            self._weights[name] = weight
        return weight

    def _nothing(self) -> Past:
        """The past before the first token."""
        K = self.num_kv_heads
        keys, values = np.empty((0, K, self.key_length)), np.empty((0, K, self.value_length))
        return [(keys, values)] * self.num_layers


def softmax(x: Float64) -> Float64:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def silu(x: Float64) -> Float64:
    return x / (1 + np.exp(-x))
