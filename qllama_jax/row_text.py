"""What one row of a generation has said so far: its tokens, its text, and where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qllama_jax.decoding import Finish
from qllama_jax.session import Event
from qllama_jax.tokenizer import Tokenizer


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts that end a row, checked: no text is empty. None means that there is none."""
    if stop is None:
        return ()
    if isinstance(stop, bytes) or not isinstance(stop, Iterable):
        raise TypeError(f"stop: expected a text or several, found {type(stop).__name__}")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop: expected texts, found {type(string).__name__}")
        if not string:
            raise ValueError("stop: a text is empty")
    return strings


class RowText:
    """Turns the events of a row into text; holds back what may yet become a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...], continues: bool) -> None:
        """`tokenizer` None: no text, for a file without a vocabulary."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.text = ""
        self.finish = Finish.RUNNING
        self._decoder = tokenizer and tokenizer.stream_decoder(continues=continues)
        self._stop = stop
        self._held = ""

    def add(self, event: Event) -> str:
        """Take the row's next token; return the text that is certain now."""
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.top_logprobs.append(event.top_logprobs)
        self.finish = event.finish
        text = self._held
        if self._decoder is not None:
            text += self._decoder.step(event.token)
            if event.finish != Finish.RUNNING:
                text += self._decoder.flush()
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            text = text[: min(ends)]
            self.finish = Finish.STOP
        held = 0 if self.finish != Finish.RUNNING else self._could_be_stop(text)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += shown
        return shown

    def _could_be_stop(self, text: str) -> int:
        """Return how many characters at the end of `text` begin one of the stop strings."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
