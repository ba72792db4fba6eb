"""What the tests of loading share: formats, files with a change, tensors and leaves by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

import qllama_jax as ql
from gguf_bytes import read_with_gguf_py
from qllama_jax.quants import Block

FORMATS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0"),
)
TinyLlama = Callable[..., Path]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in read_with_gguf_py(path).tensors}


def leaves_by_name(params: ql.Params) -> dict[str, Any]:
    """Every weight by its path in the pytree, written as a tensor's name."""
    found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, Block))
    named = {}
    for path, leaf in found:
        name = jax.tree_util.keystr(path)[1:].replace("[", ".").replace("]", "")
        if not name.startswith("rope."):
            named[name] = leaf
    return named


def edited(
    base: Path,
    out: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    drop: str | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a copy of a file with other keys, without a tensor, or with other (float32) tensors.

    A key whose value is None is left out.
    """
    reader = read_with_gguf_py(base)
    changed = dict(keys or {})
    architecture = changed.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(out, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changed.pop(key, field.contents())
        sub_type = field.types[-1] if len(field.types) > 1 else None
        if value is not None:
            writer.add_key_value(key, value, field.types[0], sub_type)
    assert not changed
    new = dict(tensors or {})
    for tensor in reader.tensors:
        if tensor.name in new:
            writer.add_tensor(tensor.name, new.pop(tensor.name))
        elif tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in new.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def patched(base: Path, out: Path, tensor: str, at: int, new: bytes) -> Path:
    """Write a copy of a file with some bytes of a tensor replaced."""
    raw = bytearray(base.read_bytes())
    offset = tensors_of(base)[tensor].data_offset + at
    raw[offset : offset + len(new)] = new
    out.write_bytes(raw)
    return out
