"""The exceptions of the package, and the one way to show text that a file controls."""

from __future__ import annotations


class GGUFError(ValueError):
    """A model file that cannot be used: names file, tensor or key, what was found and wanted."""


class ContextOverflowError(ValueError):
    """More positions were asked for than the cache or the model's context holds."""


class NumericalError(ArithmeticError):
    """A computation gave NaN or infinity where a finite value was promised."""


def quoted(text: str | bytes, limit: int = 80) -> str:
    """`repr(text)` cut at `limit` characters: safe to print, whatever a file put into it."""
    shown = repr(text[:limit])  # cut before repr too: the text may be 64 MiB long
    return shown if len(shown) <= limit else shown[:limit] + "..."
