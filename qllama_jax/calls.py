"""Calls that XLA's CPU compiler may not inline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def apart_on_a_cpu(function: Callable[..., Any], static_argnames: tuple[str, ...]) -> Any:
    """Return `function` as a call: traced once for equal shapes and, on a CPU, compiled by itself.

    What is static goes by name, arrays by position. XLA's GPU compiler fuses nothing in a call that
    it may not inline, and that for TPUs inlines it all the same, so they are given a plain one.
    """

    @functools.partial(jax.jit, static_argnames=static_argnames)
    @functools.wraps(function)
    def shared(*arrays: Any, **static: Any) -> Any:
        # The calls within it (`jnp.where` is one) are inlined all the same.
        with set_xla_metadata(inlineable=None):
            return function(*arrays, **static)

    @functools.wraps(function)
    def call(*arrays: Any, **static: Any) -> Any:
        together = functools.partial(shared, **static)

        def apart(*arrays: Any) -> Any:
            with set_xla_metadata(inlineable="false"):
                return together(*arrays)

        return lax.platform_dependent(*arrays, cpu=apart, default=together)

    return call
