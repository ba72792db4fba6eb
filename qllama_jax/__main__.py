"""`python -m qllama_jax ...` is `qllama ...`."""

import sys

from qllama_jax.cli import main

sys.exit(main())
