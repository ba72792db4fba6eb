"""JAX's persistent compilation cache. Only the command line turns it on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax


def set_compilation_cache(on: bool) -> None:
    """Keep what XLA compiles for the next run, unless the user has a cache of their own or none.

    Compiled code is run as it is found, so only a folder that nobody else can write to will do.
    """
    if not on:
        jax.config.update("jax_enable_compilation_cache", False)
    if not on or jax.config.jax_compilation_cache_dir is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
        folder = root / "qllama_jax" / "xla"
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # a home that is read-only, or none: compile every time
        return
    if status.st_mode & 0o022 or status.st_uid != os.getuid():
        print(f"qllama: {folder} is not yours alone: nothing is cached", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
