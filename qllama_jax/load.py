"""A GGUF file -> a model: reads, checks, packs and places every tensor of the file.

Field names are tensor names, so there is no table of names. The exceptions are two: a missing
`output.weight` means that the embedding serves as output too, and `rope_freqs.weight` goes into
the rotary frequencies.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qllama_jax.config import ModelConfig
from qllama_jax.errors import GGUFError, quoted
from qllama_jax.metadata import Metadata
from qllama_jax.model_file import read_model_file
from qllama_jax.params import DenseBlock, Linear, Params
from qllama_jax.quants import F32, FORMATS
from qllama_jax.rope import RopeFrequencies, rope_frequencies
from qllama_jax.tensor_file import GGUFFile, GGUFTensor
from qllama_jax.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: `params` and `config` for the pure functions, `tokenizer` for text."""

    params: Params
    config: ModelConfig
    metadata: Metadata
    path: Path
    chat_template: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer, built when it is first asked for; GGUFError if it has none."""
        return Tokenizer.from_metadata(self.metadata, chat_template=self.chat_template)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has a vocabulary; without one the model takes and gives token ids."""
        return self.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")

    def __repr__(self) -> str:
        """Sizes, not arrays."""
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        return f"Model({self.path.name!r}, {weight_bytes / 1e6:.1f} MB of weights, {self.config})"


def load(
    path: str | os.PathLike[str],
    *,
    gqa: int | None = None,
    chat_template: str | None = None,
    check_tensors: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Load a Llama GGUF file; weights go to the default device packed as they are in the file.

    GGML, GGMF and GGJT files, from before GGUF, are loaded alike.

    Args:
        path: the file, or any part of a split one.
        gqa: query heads a key-value head, for files from before GGUF alone: their tensors tell it,
            and a number given here must agree.
        chat_template: a Jinja template to use in place of the file's.
        check_tensors: refuse NaN and infinity among the weights and the scales of blocks.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        GGUFError: the file is damaged, of another architecture, has a tensor too few, too many or
            of another shape than its metadata say, or a weight that is not finite.
        ValueError: `gqa` is given for a GGUF file.
    """
    file = read_model_file(path, gqa=gqa)
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[1] if embedding is not None and len(embedding.shape) == 2 else None
    config = ModelConfig.from_metadata(file.metadata, vocab_size=rows)
    if config.num_experts > 1:
        raise file.metadata.error(
            "llama.expert_count", str(config.num_experts), "0 or 1: mixtures are not supported yet"
        )
    params = _Loader(file, check_tensors, progress).params(config)
    return Model(params, config, file.metadata, file.path, chat_template)


class _Loader:
    """Takes tensors out of a file by name, each once, and knows what is left."""

    def __init__(self, file: GGUFFile, check_tensors: bool, progress: Progress | None) -> None:
        self.file = file
        self.left = dict(file.tensors)
        self.check_tensors = check_tensors
        self.progress = progress
        self.bytes_total = sum(tensor.nbytes for tensor in file.tensors.values())
        self.bytes_done = 0

    def params(self, config: ModelConfig) -> Params:
        V, D = config.vocab_size, config.embed_dim
        tied = "output.weight" not in self.left
        rope = self.rope(config)
        params = Params(
            token_embd=Linear(weight=self.matrix("token_embd.weight", (V, D))),
            blk=tuple(self.block(f"blk.{i}.", config) for i in range(config.num_layers)),
            output_norm=Linear(weight=self.place(self.vector("output_norm.weight", D))),
            output=None if tied else Linear(weight=self.matrix("output.weight", (V, D))),
            rope=jax.tree.map(self.place, rope),
        )
        if self.left:
            names = ", ".join(quoted(name) for name in list(self.left)[:5])
            raise GGUFError(
                f"{self.file.path}: {len(self.left)} tensors that no part of the architecture"
                f" 'llama' uses: {names}"
            )
        return params

    def rope(self, config: ModelConfig) -> RopeFrequencies:
        """Rotary frequencies, divided by the factors of `rope_freqs.weight` if the file has it."""
        factors = self.optional_vector("rope_freqs.weight", config.rope_dim // 2)
        if factors is not None and not (factors > 0).all():  # NaN is not
            raise GGUFError(
                f"{self.file.path}: tensor 'rope_freqs.weight': found {factors.min()}, wanted"
                " numbers above 0, by which frequencies are divided"
            )
        try:
            return rope_frequencies(config, factors)
        except GGUFError as error:
            raise GGUFError(f"{self.file.path}: {error}") from None

    def block(self, prefix: str, config: ModelConfig) -> DenseBlock:
        D, F = config.embed_dim, config.ffn_dim
        NH, KH = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (D,),
            "attn_q": (NH, D),
            "attn_k": (KH, D),
            "attn_v": (KH, D),
            "attn_output": (D, NH),
            "ffn_norm": (D,),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }
        assert list(shapes) == [field.name for field in dataclasses.fields(DenseBlock)]
        return DenseBlock(
            **{name: self.layer(prefix + name, shape) for name, shape in shapes.items()}
        )

    def layer(self, name: str, shape: tuple[int, ...]) -> Linear:
        if len(shape) == 1:
            return Linear(weight=self.place(self.vector(f"{name}.weight", shape[0])))
        bias = self.optional_vector(f"{name}.bias", shape[0])
        return Linear(
            weight=self.matrix(f"{name}.weight", shape),
            bias=None if bias is None else self.place(bias),
        )

    def matrix(self, name: str, shape: tuple[int, ...]) -> Any:
        """A weight `[out, in]`: packed; float32 as a plain array, which it is already."""
        packed = self.read(name, shape)
        return jax.tree.map(self.place, packed.w if isinstance(packed, F32) else packed)

    def optional_vector(self, name: str, size: int) -> np.ndarray | None:
        """A bias or frequency factor as `vector`, None where the file has none."""
        return self.vector(name, size) if name in self.left else None

    def vector(self, name: str, size: int) -> np.ndarray:
        """A norm, bias or frequency factor, float32 `[size]` on the host."""
        return np.asarray(jax.tree.map(self.place, self.read(name, (size,))).dequantize())

    def read(self, name: str, shape: tuple[int, ...]) -> Any:
        """Take a tensor of the file as a Block of numpy arrays."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise GGUFError(f"{self.file.path}: tensor {quoted(name)} is missing")
        if tensor.shape[::-1] != shape:
            found, wanted = list(tensor.shape), list(shape[::-1])
            raise GGUFError(
                f"{self.file.path}: tensor {quoted(name)}: shape {found}, wanted {wanted}"
            )
        packed = self.format_of(tensor).from_bytes(tensor.data)
        if self.check_tensors:
            self.check_finite(tensor, packed)
        self.bytes_done += tensor.nbytes
        if self.progress is not None:
            self.progress(self.bytes_done, self.bytes_total)
        return packed

    def format_of(self, tensor: GGUFTensor) -> Any:
        if tensor.qtype not in FORMATS:
            known = ", ".join(
                qtype.name for qtype in sorted(FORMATS) if type(qtype) is type(tensor.qtype)
            )
            raise GGUFError(
                f"{self.file.path}: tensor {quoted(tensor.name)}: type {tensor.qtype.name} is not"
                f" supported; supported are {known}"
            )
        return FORMATS[tensor.qtype]

    def check_finite(self, tensor: GGUFTensor, packed: Any) -> None:
        for field in packed.layout.names:
            values = getattr(packed, field)
            bad = _not_finite(values, tensor.qtype.name == "BF16")
            if bad.any():
                raise GGUFError(
                    f"{self.file.path}: tensor {quoted(tensor.name)}: {int(bad.sum())} of its"
                    f" {values.size} {tensor.qtype.name} field {field!r} are NaN or infinite, the"
                    f" first at index {list(map(int, np.argwhere(bad)[0]))}; check_tensors=False"
                    " loads it all the same"
                )

    @staticmethod
    def place(array: np.ndarray | np.generic) -> jax.Array:
        return jax.device_put(array)


def _not_finite(values: np.ndarray, bfloat16: bool) -> np.ndarray:
    if values.dtype.kind == "f":
        return ~np.isfinite(values)
    if bfloat16:
        return (values & 0x7F80) == 0x7F80
    return np.zeros((), bool)
