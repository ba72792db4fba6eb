"""Path -> metadata and tensor bytes of the files before GGUF: GGML, GGMF and GGJT, read strictly.

Layout: magic u32, version u32 (GGML: none), n_vocab n_embd n_mult n_head n_layer n_rot ftype u32,
then n_vocab times (length u32, bytes, score f32; GGML: no score), then to the end of the file
tensors: n_dims u32, length of the name u32, type u32, dims u32[n_dims] innermost first, name, zero
to 31 bytes up to a multiple of 32 (GGJT alone), data.

The result has the keys and tensor names that a conversion to GGUF gives, so that nothing else in
the package has to know these files. What they do not say is what candle's reader takes: norms with
an epsilon of 1e-5, a rope base of 10,000, a context of 4,096 tokens. The number of key-value heads
follows from the rows of the keys' weights.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from qllama_jax.errors import quoted
from qllama_jax.ggml_cursor import GGMLCursor
from qllama_jax.ggml_vocabulary import read_ggml_vocabulary
from qllama_jax.metadata import Metadata
from qllama_jax.tensor_file import Container, GGUFFile, GGUFTensor, Source, open_regular
from qllama_jax.tensor_types import BLOCK_SIZES, TYPE_NUMBERS, TensorType

CONTAINERS: dict[bytes, Container] = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT"}
#: What has such a magic and is no model.
NO_MODELS = {
    b"algg": "a LoRA adapter (ggla), which changes another model",
    b"nsgg": "a saved llama.cpp session (ggsn)",
}
_VERSIONS: dict[Container, tuple[int, ...]] = {"GGML": (0,), "GGMF": (1,), "GGJT": (1, 2, 3)}
CONTEXT_LENGTH, ROPE_BASE, NORM_EPS = 4096, 10_000.0, 1e-5
MAX_LAYERS, MAX_HEADS, MAX_EMBED = 1024, 2**16, 2**20

_REMOVED = {4: " (Q4_2)", 5: " (Q4_3)"}

_FIELD_OF = {
    "llama.vocab_size": "n_vocab",
    "llama.embedding_length": "n_embd",
    "llama.block_count": "n_layer",
    "llama.attention.head_count": "n_head",
    "llama.rope.dimension_count": "n_rot",
    "general.file_type": "ftype",
}
_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


class Sizes(NamedTuple):
    """The seven numbers of the header. `n_mult` rounded the feed-forward size, once."""

    n_vocab: int
    n_embd: int
    n_mult: int
    n_head: int
    n_layer: int
    n_rot: int
    ftype: int


def read_ggml(path: str | os.PathLike[str], *, gqa: int | None = None) -> GGUFFile:
    """Open a GGML, GGMF or GGJT file of a Llama; `gqa` is query heads a key-value head, if known.

    Reads headers alone. Raises `GGUFError`, which names the file, the tensor, the byte offset, what
    was found and what was wanted: for any file that is cut short, has bytes too many or a tensor
    too few, too many, twice, of an unknown type or of sizes that contradict each other or `gqa`.
    """
    name = os.path.abspath(os.fsdecode(path))
    with open_regular(name) as (file, source):
        cursor = GGMLCursor(file, name, source.size)
        container, version = _read_preamble(cursor)
        at = cursor.pos
        sizes = _read_sizes(cursor)
        vocabulary = read_ggml_vocabulary(cursor, sizes.n_vocab, with_scores=container != "GGML")
        types = TYPE_NUMBERS[max(version, 1)]
        tensors = _read_tensors(cursor, sizes, types, source, padded=container == "GGJT")
        if (now := Source.of(name, os.fstat(file.fileno()))) != source:
            raise source.changed(now)
    values = _model_keys(cursor, sizes, tensors, gqa) | vocabulary
    offsets = {key: at + 4 * Sizes._fields.index(field) for key, field in _FIELD_OF.items()}
    return GGUFFile(Path(name), version, Metadata(values, name, offsets), tensors, container)


def _read_preamble(cursor: GGMLCursor) -> tuple[Container, int]:
    """Kind and version of what is indeed a model."""
    magic = cursor.take(4, "magic")
    if magic in NO_MODELS:
        cursor.fail(f"it is {NO_MODELS[magic]}; wanted a model")
    if magic not in CONTAINERS:
        cursor.fail(f"not a GGML file: it starts with {quoted(magic)}")
    container = CONTAINERS[magic]
    version = 0 if container == "GGML" else cursor.integer("version")
    if version not in _VERSIONS[container]:
        wanted = " or ".join(map(str, _VERSIONS[container]))
        cursor.fail(f"{container} version {version} at byte 4 is not supported, wanted {wanted}")
    return container, version


def _read_sizes(cursor: GGMLCursor) -> Sizes:
    at = cursor.pos
    sizes = Sizes(*(cursor.integer(field) for field in Sizes._fields))
    limits = {"n_vocab": (3, 2**31 - 1), "n_embd": (1, MAX_EMBED), "n_head": (1, MAX_HEADS)}
    limits["n_layer"] = (1, MAX_LAYERS)
    for field, (lo, hi) in limits.items():
        if not lo <= (value := getattr(sizes, field)) <= hi:
            where = at + 4 * Sizes._fields.index(field)
            cursor.fail(f"{field} at byte {where} is {value}, wanted {lo}..{hi}")
    if sizes.n_embd % sizes.n_head:
        cursor.fail(f"n_embd is {sizes.n_embd}, wanted a multiple of the {sizes.n_head} heads")
    return sizes


def _read_tensors(
    cursor: GGMLCursor, sizes: Sizes, types: dict[int, TensorType], source: Source, *, padded: bool
) -> dict[str, GGUFTensor]:
    """All tensors that a Llama has, in file order under their GGUF names, and nothing after."""
    names = _gguf_names(sizes.n_layer)
    tensors: dict[str, GGUFTensor] = {}
    while cursor.pos < cursor.size and len(tensors) < len(names):
        offset = cursor.pos
        cursor.where = f"tensor {len(tensors)} (offset {offset})"
        n_dims, length = cursor.integer("number of dimensions"), cursor.integer("length of name")
        number = cursor.integer("type")
        if n_dims not in (1, 2):
            cursor.fail(f"it has {n_dims} dimensions, wanted 1 or 2")
        if not 1 <= length <= 63:
            cursor.fail(f"the name has {length} bytes, wanted 1..63")
        shape = tuple(cursor.integer("dimension") for _ in range(n_dims))
        raw = cursor.take(length, "name")
        cursor.where = f"tensor {quoted(raw)[1:]} (offset {offset})"
        name = names.get(raw.decode("ascii", "replace"))
        if name is None:
            cursor.fail(f"no tensor of a Llama with {sizes.n_layer} layers has this name")
        if name in tensors:
            cursor.fail(f"it occurs twice; its data is at byte {tensors[name].offset}, too")
        qtype = types.get(number)
        if qtype is None:
            known = ", ".join(f"{i} ({known.name})" for i, known in types.items())
            cursor.fail(f"type {number}{_REMOVED.get(number, '')}, wanted one of {known}")
        nbytes = _tensor_bytes(cursor, shape, qtype)
        _refuse_part(cursor, name, shape, sizes)
        if padded:
            cursor.pos += -cursor.pos % 32
        tensors[name] = GGUFTensor(name, shape, qtype, nbytes, cursor.pos, source)
        cursor.skip(nbytes, f"data of {nbytes} bytes")
    cursor.where = "tensors"
    if missing := names.keys() - {old for old, new in names.items() if new in tensors}:
        first = next(name for name in names if name in missing)
        cursor.fail(
            f"the file ends at byte {cursor.size} after {len(tensors)} of {len(names)} tensors,"
            f" {quoted(first)} is missing; it is truncated or corrupt"
        )
    if cursor.pos < cursor.size:
        cursor.fail(f"{cursor.size - cursor.pos} bytes follow the last one, from byte {cursor.pos}")
    return tensors


def _tensor_bytes(cursor: GGMLCursor, shape: tuple[int, ...], qtype: TensorType) -> int:
    block, block_bytes = BLOCK_SIZES[qtype]
    if min(shape) < 1:
        cursor.fail(f"shape {list(shape)}, wanted dimensions from 1")
    if shape[0] % block:
        cursor.fail(f"row of {shape[0]} values is not a multiple of {qtype.name}'s {block}")
    return math.prod(shape) // block * block_bytes


def _refuse_part(cursor: GGMLCursor, name: str, shape: tuple[int, ...], sizes: Sizes) -> None:
    """Refuse one of the files that a large model was cut into before GGJT: .bin, .bin.1, ..."""
    if name == "token_embd.weight" and shape[0] < sizes.n_embd and sizes.n_embd % shape[0] == 0:
        parts = sizes.n_embd // shape[0]
        cursor.fail(
            f"rows of {shape[0]} values, wanted {sizes.n_embd}: this file is one of {parts} parts"
            " of a model, and those are not supported"
        )


def _gguf_names(n_layer: int) -> dict[str, str]:
    """Name in the file -> name in GGUF, of every tensor."""
    names = {f"{old}.weight": f"{new}.weight" for old, new in _NAMES.items()}
    for i in range(n_layer):
        for old, new in _LAYER_NAMES.items():
            names[f"layers.{i}.{old}.weight"] = f"blk.{i}.{new}.weight"
    return names


def _model_keys(
    cursor: GGMLCursor, sizes: Sizes, tensors: dict[str, GGUFTensor], gqa: int | None
) -> dict[str, Any]:
    """The keys besides the vocabulary's that a conversion to GGUF gives."""
    keys: dict[str, Any] = {key: getattr(sizes, field) for key, field in _FIELD_OF.items()}
    return keys | {
        "general.architecture": "llama",
        "llama.context_length": CONTEXT_LENGTH,
        "llama.feed_forward_length": _rows(cursor, tensors["blk.0.ffn_gate.weight"]),
        "llama.attention.head_count_kv": _kv_heads(cursor, sizes, tensors, gqa),
        "llama.attention.layer_norm_rms_epsilon": NORM_EPS,
        "llama.rope.freq_base": ROPE_BASE,
    }


def _kv_heads(
    cursor: GGMLCursor, sizes: Sizes, tensors: dict[str, GGUFTensor], gqa: int | None
) -> int:
    """Number of key-value heads, from the rows of the keys' weights."""
    head_dim = sizes.n_embd // sizes.n_head
    rows = _rows(cursor, tensors["blk.0.attn_k.weight"])
    kv_heads = rows // head_dim
    if rows % head_dim or sizes.n_head % kv_heads:
        cursor.fail(
            f"{rows} rows, wanted {head_dim}, the dimension of a head, times a divisor of the"
            f" {sizes.n_head} heads"
        )
    if gqa is not None and gqa * kv_heads != sizes.n_head:
        cursor.fail(
            f"its {rows} rows are {kv_heads} key-value heads, so {sizes.n_head // kv_heads} of"
            f" {sizes.n_head} query heads share one, but gqa={gqa}"
        )
    return kv_heads


def _rows(cursor: GGMLCursor, tensor: GGUFTensor) -> int:
    cursor.where = f"tensor {quoted(tensor.name)}"
    if len(tensor.shape) != 2:
        cursor.fail(f"shape {list(tensor.shape)}, wanted two dimensions")
    return tensor.shape[1]
