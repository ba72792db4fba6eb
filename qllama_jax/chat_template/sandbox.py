"""Jinja for chat templates: no way out of the template, and a budget for all that it does.

Jinja's own sandbox keeps a template away from Python's internals, but bounds neither time nor
memory. Here every operation that can be repeated or can grow spends from a budget of work before it
is done: loop iterations and macro calls (by the size of their bodies), calls, filters, tests,
comparisons, arithmetic, and whatever makes or shows a text or a list (by its length). The same
template and messages therefore always come to the same end, on any machine, and there is no clock.

The language is the part of Jinja that real chat templates use; everything else is refused by name:
an unknown tag, filter, method or kind of node is an error, never a hole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context

from qllama_jax.chat_template.budget import ITEMS_PER_UNIT, TEXT_PER_UNIT, Budget, check_int
from qllama_jax.chat_template.names import (
    ATTRIBUTES,
    DEEP_FILTERS,
    DEEP_TESTS,
    GLOBALS,
    SHALLOW_FILTERS,
    TYPE_TESTS,
)
from qllama_jax.chat_template.nodes import COUNTED, MADE, MEASURED, SPEND, Generation, rewrite
from qllama_jax.chat_template.text import TextFilters

_SCOPES = frozenset({"_loop_vars", "_block_vars"})  # what Jinja itself adds to a call's arguments
_CUTTING = frozenset({"split", "rsplit", "splitlines"})  # methods that make many small texts


class ChatSandbox(ImmutableSandboxedEnvironment):
    """One rendering: it starts with a budget of `work` units, about a microsecond each.

    What a template may not do raises a Jinja or Python exception out of `render`.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%"})

    def __init__(self, work: int) -> None:
        """Make the environment; it costs well under a millisecond."""
        budget = Budget(work)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, Generation],
            optimized=False,  # no folding of constants: it would run filters ahead of the budget
            finalize=pass_context(lambda _, value: budget.shown(value)),
        )
        self._budget = budget
        self._text = TextFilters(budget, self.getitem)
        self.concat = self._text.concat
        self.tests = {name: self._guard(TESTS[name], budget.one) for name in TYPE_TESTS}
        self.tests |= {name: self._guard(TESTS[name], budget.walked) for name in DEEP_TESTS}
        self.filters = {
            name: self._guard(FILTERS[name], budget.touched) for name in SHALLOW_FILTERS
        }
        self.filters |= {name: self._guard(FILTERS[name], budget.walked) for name in DEEP_FILTERS}
        self.filters |= {
            "indent": self._text.indent,
            "join": self._text.join,
            "replace": self._text.replace,
            "string": self._text.string,
            "tojson": self._text.tojson,
            COUNTED: budget.counted,
            MADE: budget.made,
            MEASURED: budget.walked,
            SPEND: budget.spend,
        }
        self.globals = dict(GLOBALS)

    def render(self, source: str, variables: Mapping[str, Any], limit: int) -> str:
        """Text of a template; at most `limit` characters."""
        template = self.template_class.from_code(self, _compiled(source), self.make_globals(None))
        pieces, length = [], 0
        for piece in template.generate(variables):
            length += len(piece)
            if length > limit:
                raise SecurityError(f"more than {limit} characters come out")
            pieces.append(piece)
        return "".join(pieces)

    def _guard(self, function: Callable[..., Any], pay: Callable[[Any], Any]) -> Callable[..., Any]:
        """A filter or test of Jinja's that pays for its arguments and for its result."""
        guarded = functools.partial(self._paid, function, pay)
        return functools.update_wrapper(guarded, function)  # with Jinja's mark for a context

    def _paid(
        self, function: Callable[..., Any], pay: Callable[[Any], Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        values = [pay(value) for value in args]
        named = {name: pay(value) for name, value in kwargs.items()}
        return self._budget.made(function(*values, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation: its result is paid for before it is made."""
        self._budget.spend()
        for side in (left, right):
            if isinstance(side, int):
                check_int(side)
        sized = [side for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator == "%" and sized:
            raise SecurityError("a text is formatted by %")
        length = sum(len(side) for side in sized)
        if operator == "*" and sized:
            times = right if sized[0] is left else left
            length *= max(times, 0) if isinstance(times, int) else 1
        text = all(isinstance(side, str) for side in sized)
        self._budget.spend(length // (TEXT_PER_UNIT if text else ITEMS_PER_UNIT))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro (its body spends), of a global, or of a method of a text or mapping."""
        self._budget.spend()
        given = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        if not isinstance(obj, Macro):
            for value in (*args, *given.values()):
                self._budget.measure(value)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            if name == "join":
                (items,) = args
                return self._text.join(items, owner)
            if name == "replace":
                return self._text.replace(owner, *args, **given)
            self._budget.spend(
                len(owner) // (ITEMS_PER_UNIT if name in _CUTTING else TEXT_PER_UNIT)
            )
        # Jinja's own parameters have names that hide what they are from type checkers.
        result = super().call(context, obj, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        return self._budget.made(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether an attribute is on the list for its object's type. Items of mappings always."""
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in ATTRIBUTES.items())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` for bare fields, {} and {name}; widths are a way to texts of any size."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        return self._text.bounded_format(value.__self__, wrapped)


@functools.lru_cache(maxsize=8)  # a chat renders the same template on every turn
def _compiled(source: str) -> CodeType:
    environment = ChatSandbox(work=0)  # compiling runs nothing of the template
    return environment.compile(rewrite(environment.parse(source)), filename="<chat template>")
