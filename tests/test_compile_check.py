"""scripts/compile_check: models compiled for devices that are not there, from headers alone."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import qllama_jax as ql

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compile_check.py"
LAYERS = 2

#: Dimensions of `tiny_llama` with 8 kv heads, and the same as a JSON file has them.
TINY = {"embed": 512, "ffn": 4096, "heads": 8, "kv_heads": 8, "vocab": 512, "layers": LAYERS}
CONFIG = {
    "num_layers": LAYERS,
    "embed_dim": 512,
    "ffn_dim": 4096,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "vocab_size": 512,
    "context_length": 512,
    "rope_theta": 10_000.0,
}


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


TARGETS = [
    pytest.param("cpu:4", id="cpu:4"),
    pytest.param("v5e:2x2", marks=[pytest.mark.aot, needs("libtpu")], id="v5e:2x2"),
    pytest.param("v6e:2x2", marks=[pytest.mark.aot, needs("libtpu")], id="v6e:2x2"),
]
H100 = pytest.param("h100", marks=[pytest.mark.aot, needs("jax_cuda13_plugin")], id="h100")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def report(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports(tiny_llama: Callable[..., Path]) -> Callable[[str], dict[str, Any]]:
    """Function: target -> what is told of a Q4_0 file on it; each is compiled once."""
    told: dict[str, dict[str, Any]] = {}

    def of(target: str) -> dict[str, Any]:
        if target not in told:
            path = tiny_llama("Q4_0", **TINY)
            sizes = ["--prompt", "24", "--context", "96", "--new-tokens", "8"]
            told[target] = report(str(path), "--target", target, *sizes)
        return told[target]

    return of


@pytest.mark.parametrize("target", TARGETS)
def test_a_tensor_parallel_step_adds_up_twice_a_layer_and_gathers_the_logits_once(
    reports: Callable[[str], dict[str, Any]], target: str
):
    found = reports(target)["programs"]["decode"]["collectives"]
    # One sum more: the embedding's rows lie on several devices.
    assert found == {"all-reduce": 2 * LAYERS + 1, "all-gather": 1}


@pytest.mark.parametrize("target", [*TARGETS, H100])
def test_no_step_makes_a_weight_dense_or_needs_as_much_as_one_dense_layer(
    reports: Callable[[str], dict[str, Any]], target: str
):
    found = reports(target)
    assert set(found["programs"]) == {"prefill", "decode", "generate"}
    for name, program in found["programs"].items():
        if target == "h100" and name != "decode":
            # A GPU makes a weight dense for a prompt, one at a time.
            assert program["temp_bytes"] < 1.5 * 4 * 512 * 4096
        else:
            assert program["dense_weights"] == []
    temporaries = found["programs"]["decode"]["temp_bytes"]
    if target.startswith("v") and jax.__version_info__ < (0, 11):
        assert temporaries is None  # its libtpu does not count them
    else:
        assert 0 < temporaries < found["dense_layer_bytes"]
    # Nor is a packed one copied, of which the largest has half a byte a value and a scale.
    largest, _ = found["programs"]["decode"]["largest_buffer"]
    devices = math.prod(map(int, found["mesh"].split("x")))
    assert 0 < largest < 512 * 4096 // 2 // devices
    values = 512 * 512 * 4 + 3 * 512 * 4096  # a layer's
    assert found["dense_layer_bytes"] == 4 * values // devices


@pytest.mark.parametrize("target", TARGETS)
def test_a_device_holds_its_part_of_the_matrices_and_all_of_the_vectors(
    reports: Callable[[str], dict[str, Any]], target: str, tiny_llama: Callable[..., Path]
):
    tensors = ql.read_gguf(tiny_llama("Q4_0", **TINY)).tensors.values()
    matrices = sum(tensor.nbytes for tensor in tensors if len(tensor.shape) > 1)
    vectors = sum(tensor.nbytes for tensor in tensors if len(tensor.shape) == 1)
    rope = 2 * 4 * 32 + 4
    found = reports(target)
    assert found["mesh"] == "1x4"
    assert found["weights_bytes"] == matrices // 4 + vectors + rope
    assert found["cache_bytes"] == 2 * LAYERS * 96 * 8 * 64 * 4 // 4 + 4


def test_a_config_without_a_file_takes_what_its_file_takes(
    reports: Callable[[str], dict[str, Any]], tmp_path: Path
):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(CONFIG))
    sizes = ["--prompt", "24", "--context", "96", "--programs", ""]
    found = report(str(config), "--format", "Q4_0", "--target", "cpu:4", *sizes)
    wanted = reports("cpu:4")
    # The output is in Q6_K here, as llama.cpp has it: 6.5625 bits a weight against 4.5.
    more = 512 * 512 // 256 * 210 - 512 * 512 // 32 * 18
    assert found["weights_bytes"] - wanted["weights_bytes"] == more // 4
    for name in ("cache_bytes", "dense_layer_bytes"):
        assert found[name] == wanted[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-1.1b", "--target", "v9:1"), "expected one of v5e:2x2"),
        (("llama-9000b", "--target", "cpu:1"), "none of llama-1.1b, llama-8b"),
        (("llama-1.1b", "--target", "cpu:2", "--mesh", "1x4"), "cpu:2 has 2 devices"),
        # 22 blocks of 256 inputs over 4 devices.
        (("llama-1.1b", "--target", "cpu:4"), "5632 inputs in 22 blocks of 256, is not divided"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_line(arguments: tuple[str, ...], message: str):
    done = run(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_biases_are_shapes_too(target: str, tiny_llama: Callable[..., Path]):
    path = tiny_llama("Q4_0", **TINY, biases=True)
    report(str(path), "--target", target, "--prompt", "24", "--programs", "")


WITH_OPTIONS = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from compile_targets import devices_of

device, *_ = devices_of(sys.argv[1])
from qllama_jax.matmul import cpu
cpu.processor.has_undivided_512_bits = lambda: True
assert cpu.compiler_options()
x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
jax.jit(lambda x: 2 * x, compiler_options=cpu.compiler_options()).lower(x).compile()
"""


@pytest.mark.parametrize("target", [*TARGETS, H100])
def test_every_compiler_takes_the_options_of_a_decoding_loop(target: str):
    """A session compiles with those of its processor, on whichever device it decodes."""
    found = subprocess.run(
        [sys.executable, "-c", WITH_OPTIONS, target],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(SCRIPT.parent)},
    )
    assert found.returncode == 0, found.stderr[-2000:]
