"""Small tokenizers for tiny GGUF files: complete enough that any text goes in and comes out."""

from __future__ import annotations

import gguf
from gguf import TokenType

#: Pieces that the small vocabularies can build, shorter first, each from two that come before it.
_MERGES = (
    ("h", "e"), ("i", "n"), ("r", "e"), ("o", "n"), ("e", "r"), ("a", "n"), ("t", "h"),
    ("o", "r"), ("l", "l"), ("th", "e"), ("in", "g"), ("an", "d"), ("l", "o"), ("he", "ll"),
    ("hell", "o"), ("w", "or"), ("wor", "ld"), ("l", "d"),
)  # fmt: skip


def add_tokenizer(writer: gguf.GGUFWriter, model: str | None, size: int) -> None:
    """Add a vocabulary of `size` tokens of a tokenizer model: "llama", "gpt2" or None for none."""
    if model is None:
        writer.add_tokenizer_model("no_vocab")
    elif model == "llama":
        _add_spm(writer, size)
    elif model == "gpt2":
        _add_bpe(writer, size)
    else:
        raise ValueError(f"no such tokenizer: {model!r}")


def _add_spm(writer: gguf.GGUFWriter, size: int) -> None:
    """SentencePiece: <unk> <s> </s>, the 256 bytes, then pieces; a higher score merges first."""
    letters = ["▁", *"etaoinshrdlucmfwypvbgkjqxz", *"ETAOINSHRDLUCMFWYPVBGKJQXZ", *".,!?'-"]
    merged = [a + b for a, b in _MERGES]
    spaced = ["▁t", "▁a", "▁the", "▁and", "▁w", "▁wor", "▁world", "▁h", "▁he", "▁hello"]
    tokens = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    tokens += [(piece, TokenType.NORMAL) for piece in (*merged, *spaced, *letters)]
    _add_tokens(writer, "llama", tokens, size)
    # Pieces in order of score, from -0 down; the special tokens and bytes have 0, as in real files.
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(size - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _add_bpe(writer: gguf.GGUFWriter, size: int) -> None:
    """Byte-level BPE: <|endoftext|> <|im_start|> <|im_end|>, the 256 bytes, then merges."""
    merges = [*_MERGES, ("Ġ", "the"), ("Ġ", "world"), ("Ġ", "and")]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokens = [(token, TokenType.CONTROL) for token in special]
    tokens += [(character, TokenType.NORMAL) for character in _byte_characters()]
    tokens += [(a + b, TokenType.NORMAL) for a, b in merges]
    _add_tokens(writer, "gpt2", tokens, size)
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _add_tokens(
    writer: gguf.GGUFWriter, model: str, tokens: list[tuple[str, TokenType]], size: int
) -> None:
    """The first tokens, filled up to `size` with unused ones."""
    if size < 259:
        raise ValueError(f"a vocabulary of {size} cannot hold 256 bytes and 3 special tokens")
    unused = [(f"<unused{i}>", TokenType.UNUSED) for i in range(size - len(tokens))]
    chosen = [*tokens, *unused][:size]
    writer.add_tokenizer_model(model)
    writer.add_token_list([token for token, _ in chosen])
    writer.add_token_types([kind for _, kind in chosen])


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)
    ]
