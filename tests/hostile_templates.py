"""Chat templates such as a hostile file could carry: name -> source."""

from __future__ import annotations

import re

#: Ways that have led, or were tried to lead, out of Jinja templates. {marker} is a path to write.
INJECTIONS = {
    "subclasses_of_object": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "os_through_a_function": "{{ raise_exception.__globals__['os'].system('touch {marker}') }}",
    "open_through_namespace": (
        "{{ namespace.__init__.__globals__['__builtins__']['open']('{marker}', 'w') }}"
    ),
    "os_through_cycler": "{{ cycler.__init__.__globals__.os.popen('touch {marker}').read() }}",
    "os_through_lipsum": "{{ lipsum.__globals__['os'].popen('touch {marker}').read() }}",
    "open_through_a_macro": (
        "{% macro m() %}{% endmacro %}"
        "{{ m.__call__.__globals__['__builtins__']['open']('{marker}', 'w') }}"
    ),
    "open_through_the_loop": (
        "{% for m in messages %}"
        "{{ loop.__init__.__globals__['__builtins__']['open']('{marker}', 'w') }}{% endfor %}"
    ),
    "attributes_through_attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attributes_through_map": "{{ [messages]|map(attribute='__class__.__mro__')|list }}",
    "attributes_through_format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attributes_through_a_reference_to_format": (
        "{% set f = ['{0.__class__.__mro__[1]}'.format]|first %}{{ f('') }}{{ f.__globals__ }}"
    ),
}

_SIXTY_TIMES = "{% for i in range(60) %}"
_TEN_TIMES = "{% for i in range(10) %}"

#: Sources that would take memory or time without end.
EXHAUSTIONS = {
    "nested_loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "loop_with_a_large_body": (
        "{% for a in range(99999) %}" + "{% if a %}{% endif %}" * 2500 + "{% endfor %}"
    ),
    "long_range": "{{ range(1000000000)|list }}",
    "long_text": "{{ 'x' * 1000000000 }}",
    "long_list": "{{ [1] * 1000000000 }}",
    "text_doubled_by_plus": (
        "{% set ns = namespace(s='x') %}" + _SIXTY_TIMES
        + "{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "text_doubled_by_tilde": (
        "{% set ns = namespace(s='x') %}" + _SIXTY_TIMES
        + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "text_doubled_in_a_set_block": (
        "{% set ns = namespace(s='x') %}" + _SIXTY_TIMES
        + "{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}{% endfor %}"
    ),
    "text_grown_by_the_replace_filter": (
        "{% set ns = namespace(s='xxxxxxxxxx') %}" + _TEN_TIMES
        + "{% set ns.s = ns.s|replace('x', ns.s) %}{% endfor %}"
    ),
    "text_grown_by_str_replace": (
        "{% set ns = namespace(s='xxxxxxxxxx') %}" + _TEN_TIMES
        + "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}"
    ),
    "text_grown_by_the_join_filter": (
        "{% set ns = namespace(s='xxxxxxxxxx') %}" + _TEN_TIMES
        + "{% set ns.s = ns.s|join(ns.s) %}{% endfor %}"
    ),
    "text_grown_by_str_join": (
        "{% set ns = namespace(s='xxxxxxxxxx') %}" + _TEN_TIMES
        + "{% set ns.s = ns.s.join(ns.s) %}{% endfor %}"
    ),
    "list_whose_text_doubles": (
        "{% set ns = namespace(l=[1]) %}" + _SIXTY_TIMES
        + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}"
    ),
    "lists_slow_to_compare": (
        "{% set ns = namespace(a=[1], b=[1]) %}" + _SIXTY_TIMES
        + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
    ),
    "power": "{{ 9 ** 999999999 }}",
    "width_in_percent": "{{ '%1000000000d' % 1 }}",
    "width_in_format": "{{ '{:1000000000}'.format(1) }}",
    "indentation": "{{ 'x\ny'|indent(1000000000) }}",
    "macro_without_end": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
}  # fmt: skip

#: Broken or forbidden in other ways.
REFUSED = {
    "too_long_a_source": "{# #}" * 20_000,
    "unclosed_tag": "{% for m in messages %}",
    "unknown_filter": "{{ messages|shuffle }}",
    "unknown_method": "{{ 'x'.zfill(3) }}",
    "file_of_the_machine": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "inheritance": "{% extends 'x' %}",
    "deep_nesting": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "recursive_loop": "{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}",
    "changed_messages": "{{ messages.append(1) }}",
    "division_by_zero": "{{ 1 // 0 }}",
    "item_of_nothing": "{{ nothing.item }}",
    "work_given_back": (
        "{% set x = [-99999999]|map('#spend')|list %}" + "{{ 'x'|indent(-999999) }}"
    ),
    "large_output": "{% for a in range(99999) %}" + "x" * 60_000 + "{% endfor %}",
}


def through(filters: str, source: str) -> str:
    """A source whose expressions `{{ x }}` are `{{ (x)|filter }}`."""
    return re.sub(r"{{ (.*?) }}", rf"{{{{ (\1){filters} }}}}", source) if filters else source
