"""Token ids -> text while they come, never cutting a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import SupportsIndex


class StreamDecoder:
    """Ids, one at a time -> text as soon as its UTF-8 is complete. See `Tokenizer.decode`."""

    def __init__(self, token_bytes: Callable[[SupportsIndex], bytes], strip_space: bool) -> None:
        """Use `Tokenizer.stream_decoder`."""
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: SupportsIndex) -> str:
        """Text that a token completes, often of earlier ones too; "" where a character is open.

        Raises TypeError for what is no integer, ValueError for an id that is not in the vocabulary.
        """
        return self._shown(self._utf8.decode(self._token_bytes(token)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text
