"""Text <-> token ids from a GGUF file's own vocabulary, with llama.cpp's ids.

    fragments = text cut at special tokens;  ids = [bos] + special or bpe(fragment) ...  [+ eos]

Byte-level BPE ("gpt2") and SentencePiece's BPE ("llama") are supported; see `bpe`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from qllama_jax.chat_template import ChatTemplateError, render_chat
from qllama_jax.errors import GGUFError
from qllama_jax.metadata import Metadata
from qllama_jax.model_file import read_model_file
from qllama_jax.tokenizer.bpe import SPACE, ScoredBPE
from qllama_jax.tokenizer.special_tokens import HIDDEN_TYPES
from qllama_jax.tokenizer.stream_decoder import StreamDecoder
from qllama_jax.tokenizer.vocabulary import Vocabulary, read_vocabulary

_C_SPACE = " \t\n\v\f\r"


class Tokenizer:
    """Encodes, decodes and formats chats. Immutable: one may serve any number of threads.

    Attributes:
        bos_id, eos_id: `int`, or None where the file has no such token.
        eog_ids: `frozenset[int]`, every token that ends a generation; stop on all of them.
        vocab_size: number of tokens; ids are 0..vocab_size-1.
        add_bos, add_eos: what the file says of texts; `add_bos` is `encode`'s default.
        chat_template: Jinja source out of the file or given instead, or None. It is code that came
            with the file: it is rendered in a sandbox, and only when asked for.
    """

    def __init__(self, vocabulary: Vocabulary, chat_template: str | None = None) -> None:
        """Use `from_gguf` or `from_metadata`."""
        self._vocabulary = vocabulary
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.vocab_size = len(vocabulary.tokens)
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.chat_template = chat_template

    @classmethod
    def from_gguf(
        cls, path: str | os.PathLike[str], *, chat_template: str | None = None
    ) -> Tokenizer:
        """Tokenizer of a model file, which may hold no weights. Errors: as `from_metadata`."""
        return cls.from_metadata(read_model_file(path).metadata, chat_template=chat_template)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], *, chat_template: str | None = None
    ) -> Tokenizer:
        """Tokenizer of a GGUF file's key-value section.

        `chat_template` takes the place of the file's. Raises GGUFError naming the key where the
        vocabulary is broken or its model is not supported, TypeError for a template that is no
        text. A pre-tokenizer that is not supported is an error of `encode` alone.
        """
        check_chat_template(chat_template)
        if not isinstance(metadata, Metadata):
            metadata = Metadata(metadata)
        if chat_template is None:
            chat_template = metadata.get_str("tokenizer.chat_template", None)
        return cls(read_vocabulary(metadata), chat_template)

    def encode(
        self,
        text: str,
        add_bos: bool | None = None,
        parse_special: bool = True,
        *,
        add_eos: bool = False,
    ) -> list[int]:
        """Ids of a text.

        `add_bos=None` puts BOS in front where the file says so. `parse_special=False` reads the
        text of control tokens as plain text: use it for text that others wrote. EOS is added only
        on request, whatever the file says, since a prompt that ends in EOS is finished.

        Raises TypeError for anything but a string; ValueError for a lone surrogate, and for BOS or
        EOS where the vocabulary has none; GGUFError where the file's pre-tokenizer is unknown.
        """
        _check_text(text)
        bpe = self._vocabulary.bpe
        if bpe is None:
            raise GGUFError(self._vocabulary.unknown_pre)
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            ids.append(_required(self.bos_id, "BOS"))
        vocabulary = self._vocabulary
        scored = isinstance(bpe, ScoredBPE)
        at_start = True
        for fragment in _cut(vocabulary, text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
                at_start = True
                continue
            if scored:
                prefix = " " if vocabulary.add_space_prefix and at_start else ""
                fragment = (prefix + fragment).replace(" ", SPACE)
            ids += bpe.encode(fragment)
            at_start = False
        if add_eos:
            ids.append(_required(self.eos_id, "EOS"))
        return ids

    def decode(
        self, ids: Iterable[SupportsIndex], *, skip_special: bool = True, continues: bool = False
    ) -> str:
        """Text of ids; a broken UTF-8 sequence becomes U+FFFD.

        `skip_special` leaves out control tokens such as `<|im_end|>`, which otherwise show their
        text; tokens that the file calls user-defined always show. A SentencePiece vocabulary
        encodes a text with a space in front, which is taken off again, but not where the ids
        continue an earlier text: say so with `continues`. Nothing else is changed.

        Raises TypeError for ids that are no integers, ValueError for those not in 0..vocab_size-1.
        """
        decoder = self.stream_decoder(skip_special=skip_special, continues=continues)
        return "".join(decoder.step(token) for token in _items(ids)) + decoder.flush()

    def stream_decoder(
        self, *, skip_special: bool = True, continues: bool = False
    ) -> StreamDecoder:
        """Decoder for ids as they come; all that it returns, joined, is `decode` of all ids."""
        strip = self._vocabulary.add_space_prefix and not continues
        return StreamDecoder(self._shown_bytes if skip_special else self.token_bytes, strip)

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """Bytes of one token, special ones shown: llama.cpp's `llama_token_to_piece`.

        Raises TypeError for what is no integer, ValueError for an id not in 0..vocab_size-1.
        """
        return self._vocabulary.token_bytes(self._checked(token))

    def is_hidden(self, token: SupportsIndex) -> bool:
        """Whether `skip_special` leaves a token out: a control token or the unknown one."""
        return self._vocabulary.types[self._checked(token)] in HIDDEN_TYPES

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Prompt for messages like {"role": "user", "content": "hi"}; `encode` it as it is.

        `variables` reach the template, such as `tools` or `enable_thinking`. Where `encode` adds
        BOS, a BOS that the template puts in front is taken off. The text of control tokens in a
        message turns into control tokens, as in llama.cpp, unless you take it out before.

        Raises ChatTemplateError (a ValueError) where there is no template, or it fails, refuses
        the messages, or does what a template may not; TypeError where messages are no plain data.
        """
        if not self.chat_template:
            raise ChatTemplateError(
                "the file has no chat template: give one as chat_template= (--chat-template)"
            )
        bos = "" if self.bos_id is None else self._vocabulary.tokens[self.bos_id]
        eos = "" if self.eos_id is None else self._vocabulary.tokens[self.eos_id]
        text = render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **{"bos_token": bos, "eos_token": eos, **variables},
        )
        return text.removeprefix(bos) if self.add_bos else text

    def _shown_bytes(self, token: SupportsIndex) -> bytes:
        index = self._checked(token)
        hidden = self._vocabulary.types[index] in HIDDEN_TYPES
        return b"" if hidden else self._vocabulary.token_bytes(index)

    def _checked(self, token: SupportsIndex) -> int:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"a token id is an integer, found {type(token).__name__}")
        index = token.__index__()
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is not in 0..{self.vocab_size - 1}")
        return index


def check_chat_template(chat_template: Any) -> None:
    """Raise TypeError unless a template that is given is a text."""
    if not isinstance(chat_template, str | None):
        found = type(chat_template).__name__
        raise TypeError(f"chat_template: expected a Jinja template as a str, found {found}")


def _cut(vocabulary: Vocabulary, text: str, parse_special: bool) -> list[str | int]:
    """Text cut at special tokens, the longest token first over the whole text, as in llama.cpp."""
    fragments: list[str | int] = [text] if text else []
    for token in vocabulary.special:
        special = vocabulary.tokens[token]
        if special not in text or not (
            parse_special or vocabulary.types[token] not in HIDDEN_TYPES
        ):
            continue
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                cut.append(fragment)
                continue
            first, *rest = fragment.split(special)
            cut += [first] if first else []
            for part in rest:
                cut.append(token)
                part = part.lstrip(_C_SPACE) if token in vocabulary.rstrip else part
                cut += [part] if part else []
        fragments = cut
    return fragments


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text is a str, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"text holds a lone surrogate, U+{code:04X}, at {error.start}: it has no UTF-8"
        ) from None


def _required(token: int | None, name: str) -> int:
    if token is None:
        raise ValueError(f"the vocabulary has no {name} token")
    return token


def _items(ids: Iterable[SupportsIndex]) -> Iterable[SupportsIndex]:
    """Ids one by one; of an array, a numpy or JAX one, as Python ints."""
    return ids.tolist() if hasattr(ids, "tolist") else ids  # pyright: ignore
