"""Chat templates render as in transformers and llama.cpp, and can do nothing else."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from hostile_templates import EXHAUSTIONS, INJECTIONS, REFUSED, through
from qllama_jax.chat_template import ChatTemplateError, names, render, render_chat

VECTORS = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "chat_vectors.json.gz").read_bytes())
)
#: transformers renders some templates for no conversation without tools of another form.
RENDERINGS = {name: texts for name, texts in VECTORS["renderings"].items() if any(texts)}
HELLO = [{"role": "user", "content": "hi"}]


class DayOfTheVectors(datetime):
    """The day on which transformers rendered them: some templates write today's date."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 24, 12, tzinfo=tz)


@pytest.mark.parametrize("name", RENDERINGS)
def test_template_renders_as_in_transformers(name, vocab_path, monkeypatch):
    monkeypatch.setattr(names, "datetime", DayOfTheVectors)
    source = VECTORS["templates"].get(name)
    if source is None:
        path = vocab_path("llama-spm").parent / "templates" / name
        if not path.exists():
            pytest.skip(f"no {path}")
        source = path.read_text("utf-8")
    for chat, wanted in zip(VECTORS["conversations"], RENDERINGS[name], strict=True):
        if wanted is not None:
            text = render_chat(source, **{"tools": None, **VECTORS["variables"], **chat})
            assert hashlib.sha256(text.encode()).hexdigest() == wanted, text


def test_every_template_renders_for_some_conversation():
    assert len(RENDERINGS) == len(VECTORS["renderings"]) == 106
    assert len(VECTORS["templates"]) == 36


#: Filters that a hostile expression is piped through, so that what they are given is theirs too.
FILTERS = ("", "|replace('a', 'b')", "|join(', ')")


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", INJECTIONS)
def test_injection_reaches_nothing(name, filters, tmp_path):
    marker = tmp_path / "marker"
    opened = []

    def hook(event, args):
        if watching and event.startswith(("open", "os.", "subprocess.", "socket.", "ctypes.")):
            opened.append((event, args))

    watching = False
    with pytest.raises(ChatTemplateError):  # imports what it imports, for errors too
        render_chat("{{ nothing.item }}", HELLO)
    sys.addaudithook(hook)
    source = through(filters, INJECTIONS[name]).replace("{marker}", str(marker))
    watching = True
    try:
        text = render_chat(source, HELLO)
    except ChatTemplateError:
        text = ""
    finally:
        watching = False
    assert text == ""
    assert not marker.exists()
    assert opened == []


@pytest.mark.parametrize("name", EXHAUSTIONS)
def test_exhaustion_is_refused(name):
    with pytest.raises(ChatTemplateError, match="the chat template failed"):
        render_chat(EXHAUSTIONS[name], HELLO)


# In an interpreter of its own: here every call has its types checked, which takes longer.
WITHIN_LIMITS = """
import sys
from hostile_templates import EXHAUSTIONS, INJECTIONS, through
from mutations.guard import limited
from qllama_jax.chat_template import ChatTemplateError, render_chat

for name, source in {**INJECTIONS, **EXHAUSTIONS}.items():
    for filters in sys.argv[1:]:
        try:
            with limited(0):
                try:
                    render_chat(through(filters, source), [{"role": "user", "content": "hi"}])
                except ChatTemplateError:
                    pass
        except BaseException as error:
            print(name, filters, type(error).__name__, error)
"""


def test_a_hostile_template_takes_at_most_2_seconds_of_work_and_64_mib():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_LIMITS, *FILTERS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_bad_template_has_one_error_type(name):
    with pytest.raises(ChatTemplateError) as caught:
        render_chat(REFUSED[name], HELLO)
    assert len(str(caught.value)) < 500


def test_template_does_not_change_the_messages():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(ChatTemplateError):
        render_chat("{{ messages[0].content.append('b') }}", messages)
    with pytest.raises(ChatTemplateError):
        render_chat("{% set messages[0].content = 'b' %}", messages)
    assert messages == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% if %}", "{# x #}", "<b>&'\"", "\\n"])
def test_user_text_is_not_executed(text):
    template = "[{{ messages[0].content }}|{{ messages[0].content|trim }}]"
    assert render_chat(template, [{"role": "user", "content": text}]) == f"[{text}|{text}]"


def test_work_allowed_grows_with_the_messages(monkeypatch):
    monkeypatch.setattr(render, "MAX_WORK", 0)
    template = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is string %}"
        "{{ m.content|trim + '\n' }}{% endif %}{% endfor %}"
    )
    for count in (1, 10, 1000):
        messages = [{"role": "user", "content": "x"}] * count
        assert render_chat(template, messages) == "x\n" * count


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages|tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': '<é>'}|tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, indent=1) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ [1, 2]|tojson(separators=(',', ':')) }}", "[1,2]"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ bos_token ~ 1 ~ none ~ missing }}", "<s>1None"),
        ("{% for k, v in {'a': 1}|dictsort %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ ['b', 'a']|sort|join(', ') }}", "a, b"),
        ("{{ [{'k': 1}, {'k': 2}]|map(attribute='k')|join('+') }}", "1+2"),
        ("{{ 'a b'.split(' ')[-1] }}{{ 'abc'[1:] }}", "bbc"),
        ("{{ '{} {x}'.format(1, x=2) }}", "1 2"),
        ("{{ 'a-b-c'|replace('-', '+', 1) }}{{ 'a-b'.replace('-', '') }}", "a+b-cab"),
        ("{{ 'x\ny'|indent(2) }}", "x\n  y"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ m(2)|upper }}", "<1><2>"),
        ("{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}{% endfor %}"
         "{{ ns.n }}", "3"),
        ("{{ messages[0].get('name', 'none') }}{{ 'role' in messages[0] }}", "noneTrue"),
        ("{{ dict(a=1).a }}{{ add_generation_prompt }}", "1True"),
        ("{% for i in [1, 2, 3] %}{{ loop.index }}{{ ',' if not loop.last }}{% endfor %}", "1,2,3"),
    ],
)  # fmt: skip
def test_what_templates_need_works(template, text):
    assert render_chat(template, HELLO, bos_token="<s>") == text


def test_dates_are_todays_unless_given():
    template = "{{ date_string }}|{{ datetime }}|{{ strftime_now('%Y') }}"
    before = datetime.now()
    text = render_chat(template, HELLO)
    formats = ("%d %b %Y", "%b %d %Y", "%Y")
    both = {"|".join(map(day.strftime, formats)) for day in (before, datetime.now())}
    assert text in both  # midnight may pass between
    assert render_chat("{{ date_string }}", HELLO, date_string="1 May 1999") == "1 May 1999"


def test_what_a_template_says_reaches_the_caller():
    with pytest.raises(ChatTemplateError, match="no system messages here"):
        render_chat("{{ raise_exception('no system messages here') }}", HELLO)


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [5],
        [{"role": "user", "content": b"hi"}],
        [{"role": "user", "content": os}],
        [{1: "user"}],
    ],
)
def test_messages_are_plain_data(messages):
    with pytest.raises(TypeError):
        render_chat("{{ messages }}", messages)


def test_messages_that_hold_themselves_are_refused():
    message: dict = {"role": "user"}
    message["content"] = message
    with pytest.raises(TypeError, match="nested deeper than 32"):
        render_chat("{{ messages }}", [message])
