"""Model files from before GGUF, written byte by byte from a tiny GGUF file of the same model."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from blocks import dequantize, quantize
from gguf_bytes import read_with_gguf_py
from qllama_jax.tensor_types import OldType, TensorType
from tiny import write_tiny_llama

LAYERS, EMBED, FFN, HEADS, KV_HEADS, VOCAB = 2, 256, 256, 4, 2, 320
SIZES: dict[str, Any] = {
    "layers": LAYERS,
    "embed": EMBED,
    "ffn": FFN,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "vocab": VOCAB,
}

QType = gguf.GGMLQuantizationType

#: Kind of file -> magic and version; None: the kind has no version.
KINDS: dict[str, tuple[bytes, int | None]] = {
    "GGML": (b"lmgg", None),
    "GGMF v1": (b"fmgg", 1),
    "GGJT v1": (b"tjgg", 1),
    "GGJT v2": (b"tjgg", 2),
    "GGJT v3": (b"tjgg", 3),
}

_V1 = {
    "F32": QType.F32,
    "F16": QType.F16,
    "Q4_0": OldType.Q4_0_V1,
    "Q4_1": OldType.Q4_1_V1,
    "Q4_2": OldType.Q4_2_V1,
    "Q5_0": OldType.Q5_0_V1,
    "Q5_1": OldType.Q5_1_V1,
    "Q8_0": OldType.Q8_0_V2,
}
_V2 = {
    "F32": QType.F32,
    "F16": QType.F16,
    "Q4_0": OldType.Q4_0_V2,
    "Q4_1": OldType.Q4_1_V2,
    "Q5_0": QType.Q5_0,
    "Q5_1": QType.Q5_1,
    "Q8_0": OldType.Q8_0_V2,
}
_V3_NAMES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_K_NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K")
_V3 = {name: QType[name] for name in (*_V3_NAMES, *_K_NAMES)}

#: Kind of file -> name of a type -> what it means there.
TYPES: dict[str, dict[str, TensorType]] = {
    **{kind: dict(_V1) for kind in ("GGML", "GGMF v1", "GGJT v1")},
    "GGJT v2": dict(_V2),
    "GGJT v3": dict(_V3),
}
#: Name of a type -> its number in these files.
NUMBERS = {"Q4_2": 4} | {name: int(QType[name]) for name in _V3}

_OLD_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def old_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attention.wq.weight."""
    *layer, kind, _ = name.split(".")
    prefix = f"layers.{layer[1]}." if layer else ""
    return f"{prefix}{_OLD_NAMES[kind]}.weight"


@dataclass
class Row:
    """A tensor as it stands in the file; `shape` innermost first."""

    name: bytes
    shape: tuple[int, ...]
    number: int
    data: bytes
    n_dims: int | None = None
    length: int | None = None

    def header(self) -> bytes:
        n_dims = len(self.shape) if self.n_dims is None else self.n_dims
        length = len(self.name) if self.length is None else self.length
        words = (n_dims, length, self.number, *self.shape)
        return struct.pack(f"<{len(words)}I", *words) + self.name


@dataclass
class LegacyFile:
    """Everything in a file; `pieces` are its bytes, in order, each with what it is."""

    kind: str
    sizes: dict[str, int]
    tokens: list[tuple[bytes, float]]
    rows: list[Row]
    magic: bytes | None = None
    version: int | None = None
    end: bytes = b""
    count: dict[str, int] = field(default_factory=dict)  # sizes that are a lie

    def pieces(self) -> Iterator[tuple[str, bytes]]:
        magic, version = KINDS[self.kind]
        yield "magic", self.magic or magic
        if version is not None:
            yield "version", struct.pack("<I", self.version or version)
        for name, value in (self.sizes | self.count).items():
            yield name, struct.pack("<I", value)
        for i, (token, score) in enumerate(self.tokens):
            raw = struct.pack("<I", len(token)) + token
            yield f"token {i}", raw + (b"" if self.kind == "GGML" else struct.pack("<f", score))
        position = sum(len(raw) for _, raw in self.prefix())
        for row in self.rows:
            header = row.header()
            padding = -(position + len(header)) % 32 if self.kind.startswith("GGJT") else 0
            yield f"header of {row.name!r}", header
            # Whatever was in memory.
            yield f"padding of {row.name!r}", b"\xa5" * padding
            yield f"data of {row.name!r}", row.data
            position += len(header) + padding + len(row.data)
        yield "end", self.end

    def prefix(self) -> Iterator[tuple[str, bytes]]:
        """The pieces before the tensors."""
        without = LegacyFile(
            self.kind, self.sizes, self.tokens, [], self.magic, self.version, b"", self.count
        )
        return without.pieces() if self.rows else iter(())

    def encode(self) -> bytes:
        return b"".join(raw for _, raw in self.pieces())

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name.encode())


def legacy_file(source: Path, kind: str, type_name: str) -> LegacyFile:
    """The model of a GGUF file with F32 tensors, its matrices in a type as `kind` has it."""
    reader = read_with_gguf_py(source)
    keys = {name: item.contents() for name, item in reader.fields.items()}
    heads = keys["llama.attention.head_count"]
    sizes = {
        "n_vocab": len(keys["tokenizer.ggml.tokens"]),
        "n_embd": keys["llama.embedding_length"],
        "n_mult": 256,
        "n_head": heads,
        "n_layer": keys["llama.block_count"],
        "n_rot": keys["llama.embedding_length"] // heads,
        "ftype": 2,
    }
    rows = []
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        name = type_name if matrix else "F32"
        raw = quantize(np.asarray(tensor.data), TYPES[kind][name])
        shape = tuple(tensor.shape.tolist())
        rows.append(Row(old_name(tensor.name).encode(), shape, NUMBERS[name], raw.tobytes()))
    return LegacyFile(kind, sizes, old_tokens(keys), rows)


def old_tokens(keys: dict[str, Any]) -> list[tuple[bytes, float]]:
    """Texts as convert.py of 2023 wrote them, with the scores."""
    tokens = []
    lists = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
    for text, score, kind in zip(*(keys[name] for name in lists), strict=True):
        if kind == gguf.TokenType.UNKNOWN:
            raw = " \u2047 ".encode()
        elif kind == gguf.TokenType.CONTROL:
            raw = b""
        elif kind == gguf.TokenType.BYTE:
            raw = bytes([int(text[3:-1], 16)])
        else:
            raw = text.replace("\u2581", " ").encode()
        tokens.append((raw, score))
    return tokens


def write_equivalent(path: Path, source: Path, kind: str, type_name: str) -> Path:
    """GGUF file like `source` whose matrices are F32: those of the legacy file, dequantized."""
    reader = read_with_gguf_py(source)
    writer = gguf.GGUFWriter(path, "llama")
    for name, item in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            value, types = item.contents(), item.types
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        weights = np.asarray(tensor.data)
        if weights.ndim == 2:
            weights = through(weights, TYPES[kind][type_name])
        writer.add_tensor(tensor.name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def through(weights: NDArray[np.float32], qtype: TensorType) -> NDArray[np.float32]:
    """The weights that a type makes of `weights`."""
    return dequantize(quantize(weights, qtype), qtype)


def write_source(path: Path, **changes: Any) -> Path:
    """Write the model that old files are made of, as GGUF with F32 tensors."""
    return write_tiny_llama(path, "F32", **SIZES | changes)
