"""Path or hub name -> opened model file of whichever kind: the one place that reads the magic."""

from __future__ import annotations

import os

from qllama_jax import hub
from qllama_jax.ggml_file import CONTAINERS, NO_MODELS, read_ggml
from qllama_jax.gguf_file import read_gguf
from qllama_jax.tensor_file import GGUFFile, open_regular


def read_model_file(path: str | os.PathLike[str], *, gqa: int | None = None) -> GGUFFile:
    """Open a GGUF file, or a GGML, GGMF or GGJT file from before GGUF; reads headers alone.

    A name on the Hugging Face hub (see `hub`) is fetched first.

    `gqa` is the number of query heads that share a key-value head, which the older files do not
    say: it is inferred from their tensors, and one that is given must agree. Raises `GGUFError`
    for a bad file, ValueError where `gqa` is given for a GGUF file, TypeError where it is no
    integer.
    """
    if gqa is not None and (isinstance(gqa, bool) or not hasattr(gqa, "__index__")):
        raise TypeError(f"gqa={gqa!r}: expected an integer")
    if hub.is_hub_name(path):
        path = hub.fetch(os.fspath(path))
    hub.check_no_hub_name(path)
    name = os.path.abspath(os.fsdecode(path))
    with open_regular(name) as (file, _):
        magic = file.read(4)
    if magic in CONTAINERS or magic in NO_MODELS:
        return read_ggml(name, gqa=gqa)
    opened = read_gguf(name)
    if gqa is not None:
        raise ValueError(f"gqa={gqa} for {name}: a GGUF file says it itself; leave gqa out")
    return opened
