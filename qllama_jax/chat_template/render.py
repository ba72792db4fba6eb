"""Messages -> the prompt of a chat model, by the Jinja template that came with the model.

A template is code out of a file that others made. It runs in `sandbox`, sees plain copies
of the messages, and only when a prompt is asked for. It can still put words into the prompt that
you did not write; no sandbox sees that, so read a template that you have reason to doubt.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qllama_jax.errors import quoted

MAX_SOURCE = 64 * 1024
#: What a template may add to what it was given: characters out, and units of work, about 1 us each.
MAX_OUTPUT = 1024 * 1024
MAX_WORK = 500_000

_OUTPUT_PER_CHARACTER = 4
_WORK_PER_CHARACTER = 16
_MAX_DEPTH = 32
_JINJA = (3, 1, 6)  # earlier ones have known ways out of the sandbox: CVE-2024-56326, -2025-27516


class ChatTemplateError(ValueError):
    """No chat template, or one that is broken, refuses the messages or does what it may not."""


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Text that a template makes of messages.

    `messages` and `variables` (`bos_token`, `eos_token`, `tools`, ...) are plain data: None, bool,
    int, float, str, lists and mappings with str keys. As in llama.cpp, `date_string` ("24 Nov
    2026") and `datetime` ("Nov 24 2026") are today's unless given.

    Raises ChatTemplateError for whatever goes wrong in the template, TypeError where the data is
    not plain, ImportError without Jinja 3.1.6.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise TypeError(f"messages are a list of mappings, found {type(messages).__name__}")
    now = datetime.now()
    given = {
        "date_string": now.strftime("%d %b %Y"),
        "datetime": now.strftime("%b %d %Y"),
        **variables,
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    size, context = 0, {}
    for name, value in given.items():
        context[name], length = _plain(value, name, 0)
        size += length
    for i, message in enumerate(context["messages"]):
        if not isinstance(message, dict):
            raise TypeError(f"messages[{i}] is a mapping, found {type(message).__name__}")
    if len(source) > MAX_SOURCE:
        raise ChatTemplateError(
            f"the chat template has {len(source)} characters, at most {MAX_SOURCE} are allowed"
        )
    _require_jinja()
    from qllama_jax.chat_template.sandbox import ChatSandbox

    try:
        sandbox = ChatSandbox(MAX_WORK + _WORK_PER_CHARACTER * size)
        return sandbox.render(source, context, MAX_OUTPUT + _OUTPUT_PER_CHARACTER * size)
    except Exception as error:
        # Whatever it is, it comes out of the file: one type, and a message that cannot be long.
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in line {line}"
        reason = quoted(getattr(error, "message", None) or str(error), 300)
        raise ChatTemplateError(
            f"the chat template failed{where}: {type(error).__name__}: {reason}"
        ) from None


def _plain(value: Any, name: str, depth: int) -> tuple[Any, int]:
    """Copy of plain data that holds nothing with methods of its own; its size in characters."""
    if depth > _MAX_DEPTH:
        raise TypeError(f"{name} is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool | int | float):
        return value, 1
    if isinstance(value, str):
        return str(value), 1 + len(value)
    if isinstance(value, Mapping):
        items = {}
        size = 1
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r:.80}, keys are strings")
            items[str(key)], length = _plain(item, f"{name}[{key!r:.80}]", depth + 1)
            size += 1 + len(key) + length
        return items, size
    if isinstance(value, list | tuple):
        pairs = [_plain(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
        return [item for item, _ in pairs], 1 + sum(length for _, length in pairs)
    raise TypeError(f"{name} is a {type(value).__name__}, messages hold plain data")


@functools.cache  # looking a version up reads folders
def _require_jinja() -> None:
    try:
        found = version("jinja2")
    except PackageNotFoundError:
        found = "no jinja2"
    parts = found.split(".")[:3]
    if not all(part.isdigit() for part in parts) or tuple(map(int, parts)) < _JINJA:
        raise ImportError(f"chat templates need jinja2 >= 3.1.6, found {found}")
