"""The exceptions of the package, and the one way to show text that a file controls."""

from __future__ import annotations


class GGUFError(ValueError):
    """A model file that cannot be used: names file, tensor or key, what was found and wanted."""


class ContextOverflowError(ValueError):
    """More positions were asked for than the cache or the model's context holds."""


class OutOfMemoryError(MemoryError):
    """A model, or a context for it, that does not fit what is free; nothing of it was allocated.

    In bytes: `weights` (0: not known), `cache` and `workspace` are what it needs, `free` is what
    there is. `longest_context` is the most positions that would fit, 0 if none do.
    """

    def __init__(
        self,
        message: str,
        *,
        weights: int = 0,
        cache: int = 0,
        workspace: int = 0,
        free: int = 0,
        longest_context: int = 0,
    ) -> None:
        super().__init__(message)
        self.weights = weights
        self.cache = cache
        self.workspace = workspace
        self.free = free
        self.longest_context = longest_context


class NumericalError(ArithmeticError):
    """A computation gave NaN or infinity where a finite value was promised."""


def quoted(text: str | bytes, limit: int = 80) -> str:
    """`repr(text)` cut at `limit` characters: safe to print, whatever a file put into it."""
    shown = repr(text[:limit])  # cut before repr too: the text may be 64 MiB long
    return shown if len(shown) <= limit else shown[:limit] + "..."
