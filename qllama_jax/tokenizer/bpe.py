"""The two ways in which GGUF vocabularies merge text into tokens; none of them knows special ones.

`ByteLevelBPE` merges by a list of merges (tokenizer model "gpt2"), `ScoredBPE` by the scores of the
tokens, as SentencePiece does (tokenizer model "llama"). Both give llama.cpp's ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from qllama_jax.tokenizer.pretokenizers import PreTokenizer

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
#: GPT-2's printable character -> the byte that it stands for in a token's text.
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}

SPACE = "▁"  # SentencePiece's U+2581, which stands for a space in a token's text
_MAX_CACHED = 65_536


class ByteLevelBPE:
    """Words by regexes, words into bytes, bytes merged in the order of `merges` (rank, then left).

    `ids` maps a token's text, in GPT-2's characters for bytes, to its id in 0..len(ids)-1. Each
    pair in `merges`, and what it makes, must be in `ids` or a byte's character.
    """

    def __init__(
        self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer
    ) -> None:
        """Build the tables: about 0.5 s for 128,256 tokens and 280,147 merges."""
        # A byte without a token gets an id past the vocabulary: `tokenizers` drops what it does not
        # know before it merges, so that the neighbours of such a byte would merge across it.
        missing = [c for c in BYTE_OF if c not in ids]
        vocab = {**ids, **{c: len(ids) + i for i, c in enumerate(missing)}}
        self._tokenizer = Tokenizer(BPE(vocab, list(merges), ignore_merges=pre.ignore_merges))
        words = [Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        self._tokenizer.pre_tokenizer = PreTokenizers(
            [*words, ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._limit = len(ids) if missing else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Bytes that the vocabulary lacks are left out, as in llama.cpp."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self._limit is None else [i for i in ids if i < self._limit]


class ScoredBPE:
    """The neighbours whose text together is the token of highest score merge first, then leftmost.

    `ids` maps a token's text to its id, `scores` has one per id. A character that ends up in no
    token becomes its UTF-8 bytes' tokens `<0xXX>`, or, where one is missing, the byte's own text.

    Written out here because the BPE of `tokenizers` ranks merges in a strict order: where scores
    tie it cannot merge leftmost first (30 % of texts differ on vocabularies with many ties). It is
    as fast on text, since most pairs of characters occur in no token: no merge crosses such a pair,
    so the text is cut there, and the pieces, which are mostly words, repeat.
    """

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float]) -> None:
        """Build the set of character pairs: about 0.03 s for 32,000 tokens."""
        self._ids = ids
        self._scores = scores
        self._pairs = {text[i : i + 2] for text in ids for i in range(len(text) - 1)}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose spaces are already U+2581.

        Raises ValueError where a byte has no token: llama.cpp throws there too.
        """
        ids: list[int] = []
        start = 0
        for end in range(1, len(text)):
            if text[end - 1 : end + 1] not in self._pairs:
                ids += self._piece(text[start:end])
                start = end
        return ids + self._piece(text[start:]) if text else ids

    def _piece(self, piece: str) -> list[int]:
        known = self._cache.get(piece)
        if known is None:
            known = self._merge(piece)
            if len(piece) <= 64 and len(self._cache) < _MAX_CACHED:
                self._cache[piece] = known
        return known

    def _merge(self, piece: str) -> list[int]:
        n = len(piece)
        # Symbols are spans of `piece`, named by where they start; a merged one has end 0.
        end = list(range(1, n + 1))
        previous = list(range(-1, n - 1))
        queue: list[tuple[float, int, int, int]] = []
        neighbours = [(right - 1, right) for right in range(1, n)]
        while neighbours or queue:
            for left, right in neighbours:
                token = self._ids.get(piece[left : end[right]])
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, end[right]))
            neighbours = []
            if not queue:
                break
            _, left, right, stop = heapq.heappop(queue)
            if end[left] != right or end[right] != stop:
                continue  # one of the two has merged since
            end[left], end[right] = stop, 0
            if stop < n:
                previous[stop] = left
                neighbours.append((left, stop))
            if left > 0:
                neighbours.append((previous[left], left))
        ids: list[int] = []
        start = 0
        while start < n:
            ids += self._symbol(piece[start : end[start]])
            start = end[start]
        return ids

    def _symbol(self, text: str) -> list[int]:
        token = self._ids.get(text)
        if token is not None:
            return [token]
        return [self._byte(byte) for byte in text.encode()]

    def _byte(self, byte: int) -> int:
        token = self._ids.get(f"<0x{byte:02X}>")
        if token is None and byte < 0x80:
            token = self._ids.get(chr(byte))
        if token is None:
            raise ValueError(f"the vocabulary has no token for the byte 0x{byte:02X}")
        return token
