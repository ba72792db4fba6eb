"""What makes text in a chat template, paid for before it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import do_indent

from qllama_jax.chat_template.budget import ITEMS_PER_UNIT, TEXT_PER_UNIT, Budget

_MAX_INDENT = 64
_MAX_JSON_INDENT = 8


class TextFilters:
    """The filters `string`, `join`, `replace`, `indent` and `tojson`, and what else makes text.

    All methods raise SecurityError where the budget is spent. `item` looks up an item or an
    attribute as the template's environment does.
    """

    def __init__(self, budget: Budget, item: Callable[[Any, str | int], Any]) -> None:
        """Filters that spend from `budget`."""
        self._budget = budget
        self._item = item

    def string(self, value: Any) -> str:
        """Text of a value."""
        text = str(self._budget.shown(value))
        self._budget.spend(len(text) // TEXT_PER_UNIT)
        return text

    def concat(self, pieces: Iterable[str]) -> str:
        """Output of a macro or a block, whose pieces are paid for, in one."""
        pieces = list(pieces)
        self._budget.spend(1 + sum(map(len, pieces)) // TEXT_PER_UNIT)
        return "".join(pieces)

    def join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        """Texts of the items of `value`, or of an attribute of theirs, with `d` between."""
        items = list(self._budget.counted(value, 1))
        if attribute is not None:
            items = [self._item(item, attribute) for item in items]
        texts = [self.string(item) for item in items]
        between = self.string(d)
        length = len(between) * len(texts) + sum(map(len, texts))
        self._budget.spend(length // TEXT_PER_UNIT)
        return between.join(texts)

    def replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        """`s` with the first `count` of `old`, or all, replaced by `new`."""
        text, old, new = self.string(s), self.string(old), self.string(new)
        times = text.count(old)
        if count is not None and count >= 0:
            times = min(times, count)
        self._budget.spend((len(text) + times * len(new)) // TEXT_PER_UNIT)
        return text.replace(old, new, times)

    def indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """Lines of `s`, but not the `first` nor `blank` ones, behind `width` spaces or a text."""
        text = self.string(s)
        step = len(width) if isinstance(width, str) else width
        if not 0 <= step <= _MAX_INDENT:
            raise SecurityError(f"a text is indented by more than {_MAX_INDENT}")
        lines = 1 + len(text.splitlines())
        self._budget.spend(lines // ITEMS_PER_UNIT + (len(text) + lines * step) // TEXT_PER_UNIT)
        return do_indent(text, width, first, blank)

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Sequence[str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON of a value. Jinja's own filter escapes HTML, which no model has seen."""
        if indent is not None and not 0 <= indent <= _MAX_JSON_INDENT:
            raise SecurityError(f"JSON is indented by more than {_MAX_JSON_INDENT}")
        item, key = (None, None) if separators is None else separators
        if len(item or "") > _MAX_JSON_INDENT or len(key or "") > _MAX_JSON_INDENT:
            raise SecurityError(f"JSON has separators of more than {_MAX_JSON_INDENT} characters")
        value = self._budget.shown(value)
        self._budget.spend(self._budget.measure(value) * (1 + (indent or 0)))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=None if item is None or key is None else (item, key),
            sort_keys=sort_keys,
        )
        return self._budget.made(text)

    def bounded_format(self, template: str, wrapped: Callable[..., str]) -> Callable[..., str]:
        """`template.format`, as `wrapped` does it safely, for bare fields like {} and {name}.

        Raises SecurityError for a width or a conversion: they are a way to texts of any size.
        """
        # (literal, field, spec, conversion) of each part; no field after the last literal.
        parts = list(Formatter().parse(template))
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise SecurityError("str.format has a field with a width or a conversion")

        def bounded(*args: Any, **kwargs: Any) -> str:
            values = [self._budget.shown(value) for value in (*args, *kwargs.values())]
            self._budget.spend(len(parts) * sum(map(self._budget.measure, values)))
            return wrapped(*args, **kwargs)

        return bounded
