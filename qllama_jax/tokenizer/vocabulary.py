"""Metadata -> the tokens of a file, checked: texts, types, special ids, and each token's bytes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qllama_jax.errors import quoted
from qllama_jax.metadata import Metadata
from qllama_jax.tokenizer.bpe import BYTE_OF, SPACE, ByteLevelBPE, ScoredBPE
from qllama_jax.tokenizer.pretokenizers import PRETOKENIZERS, PreTokenizer
from qllama_jax.tokenizer.special_tokens import SPLIT_TYPES, TokenType, resolve_types, token_id

MODELS = ("gpt2", "llama")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a file says of its tokens. `ids` is the inverse of `tokens`; `types` has one per token.

    `special` holds the ids whose texts are cut out of the input, in the order in which that is
    done; white space after those in `rstrip` goes with them. `add_space_prefix` (SentencePiece
    only): text after a special token, or at the start, gets a space in front. `bpe` is None where
    the pre-tokenizer is not known: then `unknown_pre` says so, and no text can be encoded.
    """

    tokens: Sequence[str]
    ids: Mapping[str, int]
    types: Sequence[TokenType]
    bpe: ByteLevelBPE | ScoredBPE | None
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    special: Sequence[int]
    rstrip: frozenset[int]
    unknown_pre: str

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for; of a special one the bytes of its text."""
        text, kind = self.tokens[token], self.types[token]
        if kind in SPLIT_TYPES:
            return text.encode()
        if kind == TokenType.BYTE:
            return bytes.fromhex(text[3:5])
        if kind == TokenType.UNUSED:
            return b""
        if isinstance(self.bpe, ScoredBPE):
            return text.replace(SPACE, " ").encode()
        try:
            return bytes([BYTE_OF[character] for character in text])
        except KeyError:  # a plain text, which llama.cpp would show as [UNK_BYTE_0x...]
            return text.encode()


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Vocabulary of a file's `tokenizer.ggml.*` keys. Raises GGUFError where they contradict."""
    model = metadata.get_str("tokenizer.ggml.model")
    if model not in MODELS:
        wanted = f"one of the supported tokenizers: {', '.join(MODELS)}"
        raise metadata.error("tokenizer.ggml.model", quoted(model), wanted)
    tokens = _tokens(metadata)
    ids = {text: i for i, text in enumerate(tokens)}
    _refuse_duplicates(metadata, tokens, ids)
    types = _types(metadata, tokens)
    scores = _scores(metadata, len(tokens), required=model == "llama")

    name = "default" if model == "llama" else metadata.get_str("tokenizer.ggml.pre", "default")
    pre = PRETOKENIZERS.get(name)
    unknown_pre = ""
    if pre is None:
        wanted = f"one of the supported pre-tokenizers: {', '.join(sorted(PRETOKENIZERS))}"
        unknown_pre = str(metadata.error("tokenizer.ggml.pre", quoted(name), wanted))
    # What an unknown one implies nobody can tell: then there is only what the file says.
    switches = pre or PreTokenizer((), has_bos=False)
    defaults = (1, 2) if model == "llama" else (11 if switches.has_bos else None, 11)
    bos_id = token_id(metadata, "bos_token_id", len(tokens), defaults[0])
    eos_id = token_id(metadata, "eos_token_id", len(tokens), defaults[1])
    eog_ids = resolve_types(metadata, ids, types, eos_id)
    add_bos = model == "llama" or switches.add_bos
    add_bos = metadata.get_bool("tokenizer.ggml.add_bos_token", add_bos)
    add_eos = metadata.get_bool("tokenizer.ggml.add_eos_token", False)
    for key, wanted_id, special_id in (("bos", add_bos, bos_id), ("eos", add_eos, eos_id)):
        if wanted_id and special_id is None:
            what = f"a file that names the {key} token"
            raise metadata.error(f"tokenizer.ggml.add_{key}_token", "true", what)

    special = [i for i, kind in enumerate(types) if kind in SPLIT_TYPES]
    special.sort(key=lambda i: -len(tokens[i].encode()))
    bpe = None
    if model == "llama":
        bpe = ScoredBPE(ids, scores)
    elif pre is not None:
        bpe = ByteLevelBPE(ids, _merges(metadata, ids), pre)
    return Vocabulary(
        tokens=tokens,
        ids=ids,
        types=types,
        bpe=bpe,
        bos_id=bos_id,
        eos_id=eos_id,
        eog_ids=eog_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=model == "llama"
        and metadata.get_bool("tokenizer.ggml.add_space_prefix", True),
        special=special,
        rstrip=_rstrip(metadata, ids, special),
        unknown_pre=unknown_pre,
    )


def _tokens(metadata: Metadata) -> list[str]:
    tokens = metadata.get_strings("tokenizer.ggml.tokens")
    if not tokens:
        raise metadata.error("tokenizer.ggml.tokens", "no tokens", "a vocabulary")
    return [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]  # llama.cpp's name for ""


def _refuse_duplicates(metadata: Metadata, tokens: list[str], ids: Mapping[str, int]) -> None:
    if len(ids) == len(tokens):
        return
    first = next(i for i, text in enumerate(tokens) if ids[text] != i)
    found = f"the token {quoted(tokens[first])} twice, at {first} and {ids[tokens[first]]}"
    raise metadata.error("tokenizer.ggml.tokens", found, "every token once")


def _types(metadata: Metadata, tokens: list[str]) -> list[TokenType]:
    key = "tokenizer.ggml.token_type"
    values = metadata.get_ints(key, None)
    if values is None:
        return [TokenType.NORMAL] * len(tokens)
    _same_length(metadata, key, len(values), len(tokens))
    bad = np.flatnonzero((values < 1) | (values > 6))
    if bad.size:
        found = f"the type {values[bad[0]]} for token {bad[0]}"
        raise metadata.error(key, found, "types 1..6")
    kinds = [None, *TokenType]
    types: list[TokenType] = [kinds[value] for value in values.tolist()]  # pyright: ignore
    for i in np.flatnonzero(values == TokenType.BYTE):
        if not _is_byte(tokens[i]):
            found = f"the type 6 for token {i}, {quoted(tokens[i])}"
            raise metadata.error(key, found, "it for texts like <0x0A> alone")
    return types


def _is_byte(text: str) -> bool:
    digits = text[3:5]
    return text == f"<0x{digits}>" and all(c in "0123456789abcdefABCDEF" for c in digits)


def _scores(metadata: Metadata, size: int, required: bool) -> list[float]:
    key = "tokenizer.ggml.scores"
    values = metadata.get_floats(key) if required else metadata.get_floats(key, None)
    if values is None:
        return []
    _same_length(metadata, key, len(values), size)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        found = f"the score {values[bad[0]]} for token {bad[0]}"
        raise metadata.error(key, found, "finite scores")
    return values.tolist()


def _same_length(metadata: Metadata, key: str, found: int, size: int) -> None:
    if found != size:
        raise metadata.error(key, f"{found} values", f"one for each of {size} tokens")


def _merges(metadata: Metadata, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in order of rank, each once: llama.cpp keeps the first of duplicates."""
    key = "tokenizer.ggml.merges"
    pairs: dict[tuple[str, str], None] = {}
    for i, merge in enumerate(metadata.get_strings(key)):
        at = merge.find(" ", 1)  # from 1: the left part may itself start with a space
        left, right = merge[:at], merge[at + 1 :]
        known = (left in ids or left in BYTE_OF) and (right in ids or right in BYTE_OF)
        if at < 0 or not known or left + right not in ids:
            found = f"the merge {quoted(merge)} at {i}"
            raise metadata.error(key, found, "two tokens that together are a token")
        pairs[left, right] = None
    return list(pairs)


def _rstrip(metadata: Metadata, ids: Mapping[str, int], special: list[int]) -> frozenset[int]:
    """Special tokens that take the white space after them along: Phi-3's, by the model's name."""
    name = metadata.get_str("general.name", "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    exempt = {ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
    return frozenset(itertools.filterfalse(exempt.__contains__, special))
