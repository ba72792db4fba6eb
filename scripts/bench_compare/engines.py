"""The engines that are compared: a process each, which works only while it is asked something."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("llama-cpp-python==0.3.36", "rust-ai-serving-engine==0.1.6", "mistralrs==0.9.5")
PATIENCE = 600  # seconds that an answer may take


class EngineError(Exception):
    """An engine could not do what it was asked."""


@dataclass(frozen=True)
class Engine:
    """How one is started: the file of its worker, and a Python that has it."""

    name: str
    script: str
    python: str


OURS, LLAMA_CPP, CANDLE, MISTRALRS = "qllama_jax", "llama.cpp", "candle", "mistral.rs"


def engines(llama_python: str, candle_python: str, old_python: str | None) -> list[Engine]:
    """Ours first; `old_python` has qllama_jax with an older JAX."""
    found = [
        Engine(OURS, "with_qllama.py", sys.executable),
        Engine(LLAMA_CPP, "with_llama_cpp.py", llama_python),
        Engine(CANDLE, "with_candle.py", candle_python),
        Engine(MISTRALRS, "with_mistralrs.py", candle_python),
    ]
    if old_python is not None:
        found.append(Engine(f"{OURS}, older JAX", "with_qllama.py", old_python))
    return found


def make_environment(folder: Path) -> str:
    """Return the Python of an environment with all other engines; it takes minutes to make once."""
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        print(f"making {folder} with {', '.join(PACKAGES)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.touch()
    return str(python)


class Worker:
    """A running engine; a context manager, which ends it."""

    def __init__(self, engine: Engine, log: IO[str]) -> None:
        self.engine = engine
        self._process = subprocess.Popen(
            [engine.python, str(HERE / engine.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return what the worker's function returns; EngineError where it raises, dies or hangs."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        patience = threading.Timer(PATIENCE, process.kill)
        patience.start()
        try:
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            patience.cancel()
        if not line:
            raise EngineError(f"{self.engine.name}: {do} {arguments}: the process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.engine.name}: {do} {arguments}: {answer['error']}")
        return answer["value"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
