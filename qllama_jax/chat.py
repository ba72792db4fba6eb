"""A conversation on the terminal: lines in, answers out, the history kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from qllama_jax.chat_template import ChatTemplateError
from qllama_jax.errors import ContextOverflowError, OutOfMemoryError
from qllama_jax.generate import Piece, stream
from qllama_jax.load import Model
from qllama_jax.progress_bars import bar

Message = dict[str, str]


def converse(
    model: Model,
    system: str | None,
    options: dict[str, Any],
    closing_line: Callable[[Piece], str],
    complain: Callable[[Exception], None],
) -> None:
    """Answer lines of stdin until "/exit" or its end; "/clear" forgets all but `system`.

    `options` are `stream`'s. Ctrl-C stops an answer, which stays in the history as far as it got.

    Raises:
        ChatTemplateError: there is no template, or it refuses even one message.
        GGUFError: the file's tokenizer cannot encode.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    # Before anybody has typed: is there a template, does it take a system message, and can what
    # comes of it be encoded?
    question = [*opening, {"role": "user", "content": "?"}]
    model.tokenizer.encode(model.tokenizer.apply_chat_template(question))
    messages = list(opening)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/clear":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(model, messages, options, closing_line)
        except (ContextOverflowError, OutOfMemoryError, ChatTemplateError) as error:
            complain(error)
            print("/clear forgets the conversation; another message may do", file=sys.stderr)
            answer = None
        if answer is None:
            messages.pop()  # templates want users and assistants to take turns
        else:
            messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Yield the lines of stdin that say something; a terminal gets a prompt and line editing."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  (input() edits lines once it is there)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(
    model: Model,
    messages: list[Message],
    options: dict[str, Any],
    closing_line: Callable[[Piece], str],
) -> str | None:
    """Print the model's answer as it comes and return it; None where Ctrl-C came before its start.

    An answer has the tokens that were asked for or, where the context has fewer left, those.
    """
    tokenizer = model.tokenizer
    said: list[str] = []
    try:
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages), parse_special=True)
        room = max(model.config.context_length - len(ids), 1)
        limit = min(options["max_new_tokens"], room)
        with bar("prompt") as progress:
            changed = {"max_new_tokens": limit, "progress": progress}
            last = show(stream(model, ids, **{**options, **changed}), said)
        print(closing_line(last), file=sys.stderr)
    except KeyboardInterrupt:
        if not said:
            print(flush=True)
            return None
    return "".join(said)


def show(pieces: Iterator[Piece], said: list[str]) -> Piece:
    """Print pieces of text as they come and append them to `said`; return the last piece."""
    piece = None
    try:
        for piece in pieces:
            if piece.text:
                said.append(piece.text)
                print(piece.text, end="", flush=True)
    finally:
        if said or piece is not None:
            print(flush=True)
    assert piece is not None  # a generation has a token at least
    return piece
