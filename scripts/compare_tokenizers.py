"""Print how many of 10,000 texts get llama.cpp's token ids, for every vocabulary at hand.

    pip install . llama-cpp-python==0.3.36
    python scripts/compare_tokenizers.py SmolLM2-135M-Instruct.Q4_1.gguf VOCABS

VOCABS is the folder with llama.cpp's ggml-vocab-*.gguf, as for make_tokenizer_vectors.py, whose
texts these are with another seed. A row is a vocabulary whose tokenizer model is supported, or
gpt-2's with another `tokenizer.ggml.pre`, each that is supported. Texts are compared twice, with
special tokens read as text and as tokens; the pieces are those of every token of the vocabulary,
special ones shown and hidden. Exit status 1 where anything differs but for the pieces that
llama.cpp does not know; the first differences go to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports]

from make_tokenizer_vectors import load, make_texts
from qllama_jax.gguf_file import read_gguf
from qllama_jax.tokenizer import Tokenizer
from qllama_jax.tokenizer.pretokenizers import PRETOKENIZERS
from qllama_jax.tokenizer.vocabulary import MODELS

SHOWN = 3


def equal_ids(
    tokenizer: Tokenizer, model: llama_cpp.Llama, texts: list[str], parse_special: bool
) -> int:
    """How many texts get the same ids."""
    equal, shown = 0, 0
    for text in texts:
        wanted = model.tokenize(text.encode(), add_bos=False, special=parse_special)
        found = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        equal += found == wanted
        if found != wanted and shown < SHOWN:
            shown += 1
            print(f"{parse_special=} {text!r}:\n  {wanted}\n  {found}", file=sys.stderr)
    return equal


def equal_pieces(tokenizer: Tokenizer, model: llama_cpp.Llama) -> tuple[int, int]:
    """How many tokens stand for the same bytes, shown and hidden; how many it does not know.

    A token that is not written in GPT-2's characters for bytes shows as [UNK_BYTE_0x...] there.
    """
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    buffer = ctypes.create_string_buffer(4096)
    equal, unknown, shown = 0, 0, 0
    for token in range(tokenizer.vocab_size):
        wanted = []
        for special in (True, False):
            n = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, special)
            wanted.append(buffer.raw[:n])
        piece = tokenizer.token_bytes(token)
        found = [piece, b"" if tokenizer.is_hidden(token) else piece]
        equal += found == wanted
        if found == wanted:
            continue
        if wanted[0].startswith(b"[UNK_BYTE_0x") and piece in wanted[0]:
            unknown += 1
        elif shown < SHOWN:
            shown += 1
            print(f"token {token}: {wanted} {found}", file=sys.stderr)
    return equal, unknown


def compare(path: Path, texts: list[str], pre: str | None = None) -> bool:
    """Print a row, and return whether all in it are equal."""
    metadata = dict(read_gguf(path).metadata)
    model = load(path, **({"pre": pre} if pre else {}))
    if pre:
        metadata["tokenizer.ggml.pre"] = pre
    tokenizer = Tokenizer.from_metadata(metadata)
    plain = equal_ids(tokenizer, model, texts, parse_special=False)
    special = equal_ids(tokenizer, model, texts, parse_special=True)
    pieces, right = "", True
    if not pre:  # another way to cut texts changes no token
        equal, unknown = equal_pieces(tokenizer, model)
        pieces = f"{equal:,} of {tokenizer.vocab_size:,}"
        right = equal + unknown == tokenizer.vocab_size
    kind = metadata["tokenizer.ggml.model"]
    named = metadata.get("tokenizer.ggml.pre", "none") if kind == "gpt2" else "SentencePiece"
    name = path.stem.removeprefix("ggml-vocab-")
    print(f"| {name} | {named} | {len(texts):,} | {plain:,} | {special:,} | {pieces} |", flush=True)
    return right and plain == special == len(texts)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("vocabs", type=Path)
    parser.add_argument("-n", "--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    texts = make_texts(args.count, args.seed)
    files = [args.smollm2, *sorted(args.vocabs.glob("ggml-vocab-*.gguf"))]
    files = [path for path in files if read_gguf(path).metadata["tokenizer.ggml.model"] in MODELS]
    gpt2 = args.vocabs / "ggml-vocab-gpt-2.gguf"
    print("| vocabulary | pre | texts | equal | equal, special parsed | equal pieces |")
    print("|---|---|---|---|---|---|")
    equal = [compare(path, texts) for path in files]
    equal += [compare(gpt2, texts, pre) for pre in PRETOKENIZERS]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
