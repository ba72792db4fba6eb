"""Two processes on loopback, of four CPU devices each, are one mesh: nothing else is different."""

from __future__ import annotations

import os
import pty
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qllama_jax as ql
from host import TOKENS
from reference import Reference

ROOT = Path(__file__).resolve().parent.parent
#: So large that half of the weights and the MiB in which a header is read are below 0.55 of them.
LARGE = {"layers": 1, "embed": 1024, "heads": 8, "kv_heads": 8}
FILES = {
    # The process of a device is its place along "model".
    "2,model,4,data": LARGE
    | {"qtype": {"blk.0.attn_output.weight": "Q4_K", "*": "Q8_0"}, "ffn": 8192},
    "1,data,8,model": LARGE | {"qtype": "Q8_0", "ffn": 1024, "experts": 8, "experts_used": 2},
}
SECONDS = 600  # a machine may be busy; a process whose companion died waits for ever


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment() -> dict[str, str]:
    """Without pytest's: the processes choose their own devices."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    # A device may wait for one whose turn on a busy machine has not come.
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def wait_for_all(processes):
    try:
        return [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def found(tiny_llama, tmp_path_factory):
    """By mesh: the file, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("hosts")
    paths = {mesh: tiny_llama(**options) for mesh, options in FILES.items()}
    models = [f"{mesh}={path}" for mesh, path in paths.items()]
    command = [sys.executable, str(ROOT / "tests" / "host.py"), str(free_port())]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(folder), *models],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process, (_, errors) in zip(processes, wait_for_all(processes), strict=True):
        assert process.returncode == 0, errors
    return {
        mesh: (path, [np.load(folder / f"{i}.{process}.npz") for process in range(2)])
        for i, (mesh, path) in enumerate(paths.items())
    }


@pytest.mark.parametrize("mesh", FILES)
def test_logits_and_scores_on_two_processes_are_those_of_float64(found, mesh):
    path, results = found[mesh]
    reference = Reference(path)
    wanted = np.stack([reference.logits(row) for row in TOKENS])
    log_softmax = wanted[0] - np.log(np.exp(wanted[0]).sum(-1, keepdims=True))
    chosen = log_softmax[np.arange(TOKENS.shape[1] - 1), TOKENS[0, 1:]]
    for result in results:
        assert np.abs(result["logits"] - wanted).max() / np.abs(wanted).max() <= 1e-5
        np.testing.assert_allclose(result["logprobs"], chosen, atol=3e-5)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
@pytest.mark.parametrize("mesh", FILES)
def test_each_process_reads_the_bytes_of_its_own_parts(found, mesh):
    path, results = found[mesh]
    for result in results:
        assert result["read"] <= 0.55 * path.stat().st_size


def documented_commands() -> list[str]:
    """The commands that docs/sharding.md gives for a try on one machine, one a process."""
    text = (ROOT / "docs" / "sharding.md").read_text()
    section = text[text.index("## Several hosts") :]
    lines = section[: section.index("\n## ")].splitlines()
    return [line for line in lines if "--coordinator localhost" in line]


def without_gloo(out: bytes) -> bytes:
    """Leave out what Gloo says on stdout, from several threads, whose lines come in pieces."""
    word = rb"(\[Gloo\]|Rank|is|connected|to|peer|ranks\.?|Expected|number|of)"
    # A piece without a word is a rank or a number of ranks, no id of a token.
    piece = rb"[\d:\s]*(%b[\d:\s]*)+|[0-7:\s]{1,2}" % word
    return b"\n".join(line for line in out.split(b"\n") if not re.fullmatch(piece, line))


def test_the_documented_commands_print_the_text_once_and_draw_bars_once(tiny_llama):
    options = {"heads": 8, "kv_heads": 8, "layers": 1}
    path = tiny_llama("Q4_0", **options)
    commands = documented_commands()
    assert len(commands) == 2
    processes, terminals = [], []
    port = str(free_port())
    for command in commands:
        words = shlex.split(command.replace("MODEL.gguf", str(path)).replace("12345", port))
        assert words[0] == "python"
        terminal, their_end = pty.openpty()
        processes.append(
            subprocess.Popen(
                [sys.executable, *words[1:]],
                cwd=ROOT,
                env=environment() | {"TERM": "xterm"},
                stdout=subprocess.PIPE,
                stderr=their_end,
            )
        )
        os.close(their_end)
        terminals.append(terminal)
    said = [without_gloo(out) for out, _ in wait_for_all(processes)]
    drawn = [read_all(terminal) for terminal in terminals]
    assert [process.returncode for process in processes] == [0, 0], drawn
    model = ql.load(path, layout="file")
    wanted = ql.generate(model, "Once upon a time", max_new_tokens=16).text
    assert [out.strip(b"\n") for out in said] == [wanted.encode().strip(b"\n"), b""]
    for words in (b"loading", b"tok/s"):
        assert [words in lines for lines in drawn] == [True, False], drawn


def read_all(terminal: int) -> bytes:
    """Read what was written to a terminal that nothing writes to any more."""
    parts = []
    try:
        while part := os.read(terminal, 2**16):
            parts.append(part)
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    return b"".join(parts)
