"""Importing the package does nothing but define names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What runs in a fresh interpreter; {imports} is replaced.
PROGRAM = """
import os, sys
import jax
from jax._src import xla_bridge

environment, config = dict(os.environ), dict(jax.config.values)

import qllama_jax
assert qllama_jax.__file__, "qllama_jax is a folder without __init__.py"
{imports}

assert not xla_bridge.backends_are_initialized(), "a backend was started"
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
# Other libraries may define options of their own; none that jax has may change.
after = jax.config.values
changed = {{key: (config[key], after[key]) for key in config if after[key] != config[key]}}
assert not changed, changed
"""

EVERY_MODULE = """
import importlib, pkgutil
for module in pkgutil.walk_packages(qllama_jax.__path__, "qllama_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("imports", ["", EVERY_MODULE], ids=["package", "every_module"])
def test_import_starts_no_backend_and_changes_no_setting(imports):
    program = PROGRAM.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
