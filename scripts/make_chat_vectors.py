"""Write tests/data/chat_vectors.json.gz: what transformers renders from chat templates.

    pip install transformers==5.23.0
    python scripts/make_chat_vectors.py LLAMA_CPP

LLAMA_CPP is llama.cpp's source: vendor/llama.cpp in the source distribution of llama-cpp-python
(the committed file: 0.3.36). The templates are its models/templates/*.jinja and those inside its
tests/test-chat-template.cpp.

The file holds, as JSON, `conversations`, a list of messages and other variables; `renderings`,
template name -> for each conversation the SHA-256 of the text, or null where an error came out; and
`templates`, name -> source of those that are no file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers.utils import (  # pyright: ignore[reportMissingImports]
    chat_template_utils,
)

#: Given to each rendering, so that none depends on the day.
FIXED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "date_string": "24 Nov 2026",
    "datetime": "Nov 24 2026",
}


class FixedDay(datetime):
    """Takes the place of transformers' clock, for templates that ask for the time themselves."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        """The day of FIXED."""
        return cls(2026, 11, 24, 12, tzinfo=tz)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get <b>weather</b> & more",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City"},
                "n": {"type": "integer", "enum": [1, 2]},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_1abcde",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Paris", "n": 1}},
}


def said(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of a user and an assistant in turn, behind one of the system."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


def conversations() -> list[dict[str, Any]]:
    """Messages, and the variables that come with them."""
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {
        "role": "tool",
        "tool_call_id": "call_1abcde",
        "name": "get_weather",
        "content": '{"t": 20}',
    }
    told = "You are a helpful assistant"
    talk = ("Hello", "Hi there", "Who are you", "   I am an assistant   ", "Another question")
    old_tool = {
        "name": "get_weather",
        "description": "Get weather",
        "parameter_definitions": {
            "city": {"description": "City", "type": "str", "required": True},
            "n": {"description": "Days", "type": "int", "required": False},
        },
    }
    odd = "what's <x> & 'y' \n\n \U0001f642 \u4e2d\u6587?"
    return [
        {"messages": said("hi")},
        {"messages": said("hi", system="You are terse.")},
        {"messages": said("hi", "hello", "bye", system="You are terse.")},
        {"messages": said("hi", "hello"), "add_generation_prompt": False},
        {"messages": said(odd, " spaces ", "", system="You are terse.")},
        {"messages": said("a", "<think>hm</think>\nyes", "b")},
        {"messages": said("hi"), "tools": [TOOL]},
        {"messages": said("hi", system="You are terse."), "tools": [TOOL]},
        {"messages": [*said("weather?"), answer, result], "tools": [TOOL]},
        {"messages": said("hi"), "enable_thinking": False},
        {"messages": said("a", "x", "b", "y", "c")},
        {"messages": said(*talk, system=told)},
        {
            "messages": said(*talk),
            "additional_special_tokens": ["<|a|>", "<|b|>", "<|c|>", "<|d|>"],
        },
        {"messages": said("hi", "hello", "bye"), "functions": json.dumps([TOOL])},
        {"messages": said("hi", system=told), "tools": [old_tool | TOOL["function"]]},
        {
            "messages": [
                *said("Weather?", system=told),
                {"role": "assistant_tool_call", "content": '[{"name": "get_weather"}]'},
                {"role": "tool_response", "content": '{"temperature": 72}'},
            ]
        },
    ]


def inline_templates(source: str) -> dict[str, str]:
    """Name -> template of the cases in the source text of test-chat-template.cpp."""
    literal = r'"((?:[^"\\]|\\.)*)"'
    name, text = r"/\* \.name\s*=? ?\*/ ", r"/\* \.template_str\s*=? ?\*/ (?:U8C\()?"
    pattern = rf"{name}{literal},\s*(?://[^\n]*\s*)*{text}{literal}"
    # A literal of C++ is one of JSON but for the apostrophe and the tab.
    return {
        "inline: " + name: json.loads('"' + text.replace("\\'", "'").replace("\t", "\\t") + '"')
        for name, text in re.findall(pattern, source)
    }


def rendering(source: str, conversation: dict[str, Any]) -> str | None:
    """SHA-256 of the text."""
    variables = {"add_generation_prompt": True, "tools": None, **FIXED, **conversation}
    messages = variables.pop("messages")
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, **variables
        )
    except Exception:
        return None
    return hashlib.sha256(texts[0].encode()).hexdigest()


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Make the chat templates' test vectors.")
    parser.add_argument("llama_cpp", type=Path)
    default = Path(__file__).parent.parent / "tests" / "data" / "chat_vectors.json.gz"
    parser.add_argument("-o", "--output", type=Path, default=default)
    args = parser.parse_args()

    chat_template_utils.datetime = FixedDay
    paths = sorted((args.llama_cpp / "models" / "templates").glob("*.jinja"))
    inline = inline_templates((args.llama_cpp / "tests" / "test-chat-template.cpp").read_text())
    sources = {path.name: path.read_text("utf-8") for path in paths} | inline
    document = {
        "variables": FIXED,
        "conversations": conversations(),
        "renderings": {
            name: [rendering(source, chat) for chat in conversations()]
            for name, source in sources.items()
        },
        "templates": inline,
    }
    data = json.dumps(document, separators=(",", ":")).encode()
    # mtime=0: the same content gives the same file.
    args.output.write_bytes(gzip.compress(data, compresslevel=9, mtime=0))
    print(f"{args.output}: {args.output.stat().st_size} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
