"""Say of each file whose path comes on standard input what one reader of GGUF files makes of it.

    echo m.gguf | python scripts/reader_verdicts.py gguf-py

A line for each: "accepted" and a hash of all tensors (names, types, shapes, numbers), or "refused"
and the kind of error. A file that takes three seconds of work ends the process by SIGPROF.
`compare_reliability.py` runs this, perhaps with another Python, so only "qllama_jax" imports it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

SECONDS = 3.0
MEMORY = 8 * 2**30  # of addresses; more than any of the files may need


def gguf_py() -> Callable[[str], Any]:
    import gguf

    def read(path: str) -> Any:
        reader = gguf.GGUFReader(path)
        for field in reader.fields.values():
            field.contents()
        return {
            t.name: (t.tensor_type.name, t.shape.tolist(), digest(t.data.tobytes()))
            for t in reader.tensors
        }

    return read


def qllama_jax() -> Callable[[str], Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import qllama_jax as ql

    def read(path: str) -> Any:
        tensors = {
            t.name: (t.qtype.name, list(t.shape), digest(t.data.tobytes()))
            for t in ql.read_gguf(path).tensors.values()
        }
        model = ql.load(path, layout="file")
        if model.has_tokenizer:
            _ = model.tokenizer
        return tensors

    return read


def candle() -> Callable[[str], Any]:
    from candle import utils  # pyright: ignore[reportMissingImports]

    def read(path: str) -> Any:
        tensors, _ = utils.load_gguf(path)
        return {
            name: (str(t.ggml_dtype), list(t.shape), digest(repr(t.dequantize().values()).encode()))
            for name, t in tensors.items()
        }

    return read


def llama_cpp() -> Callable[[str], Any]:
    import ctypes

    import llama_cpp as api  # pyright: ignore[reportMissingImports]

    silent = api.llama_log_callback(lambda *arguments: None)
    api.llama_log_set(silent, ctypes.c_void_p(0))
    api.llama_backend_init()

    def read(path: str) -> Any:
        _ = silent  # stays alive
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not model:
            raise ValueError("no model")
        api.llama_model_free(model)
        return {}  # it hands out no tensors

    return read


READERS = {"qllama_jax": qllama_jax, "gguf-py": gguf_py, "candle": candle, "llama.cpp": llama_cpp}


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def main() -> None:
    """Answer line by line until standard input ends."""
    read = READERS[sys.argv[1]]()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            tensors = read(line.rstrip("\n"))
            answer = "accepted " + digest(json.dumps(tensors, sort_keys=True).encode())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # candle's panics are no Exceptions
            answer = f"refused {type(error).__name__}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
