"""The command line as a process: what it imports, where it keeps what is compiled, how it ends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import jax
import pytest

import qllama_jax as ql
from qllama_jax.cli import main
from qllama_jax.compilation_cache import set_compilation_cache
from typed_lines import NO_CACHE, ROOT, python


def test_help_and_version_are_exit_code_0(capsys):
    for line in (["--help"], ["generate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit_:
            main(line)
        assert exit_.value.code == 0
    assert capsys.readouterr().out.endswith(f"qllama_jax {ql.__version__}\n")


NO_JAX = """
import sys, types
package = types.ModuleType("qllama_jax")  # its own __init__ may import what it likes
package.__path__, package.__version__ = ["qllama_jax"], "1"
sys.modules["qllama_jax"] = package
from qllama_jax.cli import main
codes = main(["info", sys.argv[1]]), main(["generate", "-n", "0"])
assert codes == (0, 2), codes
assert "jax" not in sys.modules
"""


def test_the_modules_of_info_and_bad_flags_import_no_jax(path):
    done = python("-c", NO_JAX, path)
    assert done.returncode == 0, done.stderr


def test_module_and_command_line_are_the_same_and_fill_the_cache(path, tmp_path, capsys):
    line = ["generate", path, "hello", "-n", "4", "--seed", "1"]
    assert main([*line, NO_CACHE]) == 0
    text = capsys.readouterr().out
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = python("-m", "qllama_jax", *line, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == text
    folder = tmp_path / "qllama_jax" / "xla"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(folder.iterdir())


def test_cache_goes_where_it_may(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "qllama_jax" / "xla"
    set_compilation_cache(False)
    assert not folder.exists()
    assert jax.config.jax_enable_compilation_cache is False

    jax.config.update("jax_compilation_cache_dir", "/the/users/own")
    set_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir == "/the/users/own"
    assert not folder.exists()

    jax.config.update("jax_compilation_cache_dir", None)
    folder.mkdir(parents=True)
    folder.chmod(0o777)  # anybody could put code there
    set_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr().err.count("\n") == 1

    folder.chmod(0o700)
    set_compilation_cache(True)
    assert jax.config.jax_compilation_cache_dir == str(folder)

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    set_compilation_cache(True)
    expected = tmp_path / "home" / ".cache" / "qllama_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(expected)


def test_control_c_ends_a_run_at_once_also_while_it_compiles(path):
    script = (
        "import os, signal, sys, threading, time\n"
        "from qllama_jax import cli, generate\n"
        "def stream(*_, **__):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    import jax, jax.numpy as jnp\n"
        "    while True:\n"  # busy outside of Python, where a KeyboardInterrupt can be lost
        "        try:\n"
        "            jax.jit(lambda x: jnp.linalg.svd(x))(jnp.ones((3, 3))).S.block_until_ready()\n"
        "            time.sleep(0.01)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "sys.modules['qllama_jax.generate'].stream = stream\n"
        "sys.exit(cli.main(['generate', sys.argv[1], 'x', '--no-compilation-cache']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def test_a_reader_that_goes_away_is_no_error(path):
    command = [sys.executable, "-m", "qllama_jax", "info", path]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
