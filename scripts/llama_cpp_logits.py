"""Write a text's token ids and the logits of each chunk to the output, by llama.cpp.

    pip install llama-cpp-python
    python scripts/llama_cpp_logits.py MODEL.gguf TEXT [-c 512] [--chunks N]

What its tools/perplexity computes: chunks of `c` tokens, BOS in place of the first where the
vocabulary begins texts with it, logits of the tokens from the middle on but for the last.
`compare_perplexity.py` runs this, perhaps with another Python, so it imports nothing of
qllama_jax.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

try:
    import llama_cpp  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit(f"{sys.executable} has no llama_cpp: pip install llama-cpp-python")


def main() -> None:
    """Write a line {"tokens": [id], "shape": [N, V]}, then float32 [N, V] for each chunk."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=2**31, help="default: all")
    args = parser.parse_args()
    c = args.context
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what else is printed is none of it
        model = llama_cpp.Llama(
            args.model,
            n_ctx=c,
            n_batch=c,
            n_ubatch=c,
            logits_all=True,
            flash_attn=True,  # as the tool has it by default, over float16 keys and values
            verbose=False,
        )
        # add_bos=True: where the vocabulary says so. Text that looks like a control token is text.
        tokens = model.tokenize(args.text.read_bytes(), add_bos=True, special=False)
        header = {"tokens": tokens, "shape": [c - 1 - c // 2, model.n_vocab()]}
        out.write(json.dumps(header).encode() + b"\n")
        vocabulary = model._model.vocab
        add_bos = llama_cpp.llama_vocab_get_add_bos(vocabulary)
        for i in range(min(args.chunks, len(tokens) // c)):
            chunk = tokens[i * c : (i + 1) * c]
            if add_bos:
                chunk[0] = llama_cpp.llama_vocab_bos(vocabulary)
            model.reset()
            model.eval(chunk)
            out.write(np.ascontiguousarray(model.scores[c // 2 : c - 1], np.float32).tobytes())


if __name__ == "__main__":
    main()
