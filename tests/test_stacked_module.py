"""What XLA compiles of a loop over layers: no copies, no scalar kernels, no layer of its own."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax import decoding, session
from qllama_jax.cache_tiles import TILE
from qllama_jax.matmul.cpu import LAYOUTS
from qllama_jax.matmul.cpu.weight import lanes_of
from stacked_models import loader, looped

pytestmark = pytest.mark.usefixtures("on_a_cpu")
#: The types of packed weights, as XLA writes them.
KINDS = {"uint16": "u16", "int8": "s8", "uint8": "u8", "float16": "f16", "bfloat16": "bf16"}


@pytest.fixture(scope="module")
def load_model(tiny_llama):
    return loader(tiny_llama)


def compiled_loop(model: ql.Model, room: int = 128) -> str:
    """The text of the compiled decoding loop of one row."""
    row = jnp.zeros((1,), jnp.int32)
    state = decoding.DecodeState(
        cache=ql.init_cache(model.config, 1, room, stacked=True),
        token=row,
        recent=jnp.zeros((1, 64), jnp.int32),
        keys=ql.row_keys(jax.random.key(0), 1),
        finish=row,
        generated=row,
    )
    arguments = looped(model), state, ql.Sampling(), jnp.zeros((0,), jnp.int32), 3
    static = {"config": model.config, "max_steps": 4, "activations": "auto", "top_logprobs": 0}
    lowered = session._decode.lower(*arguments, **static, dtype=jnp.float32)
    text = lowered.compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize("name", ["Q4_0", "two formats", "experts"])
def test_a_loop_is_as_large_for_many_layers_as_for_few(load_model, name: str):
    texts = [compiled_loop(load_model(name, layers=layers)[1]) for layers in (6, 12)]
    # Of constants there are fewer where a number of layers equals another number.
    sizes = [text.count(" = ") - text.count(" constant(") for text in texts]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("name", "room"), [("Q4_0", 1024), ("Q8_0", 128), ("two formats", 128), ("experts", 1024)]
)
def test_a_loop_copies_neither_weights_nor_the_cache(load_model, name: str, room: int):
    _, model = load_model(name)
    text = compiled_loop(model, room)
    kept = {
        (KINDS[leaf.dtype.name], size)
        for leaf in jax.tree.leaves(looped(model).blk)
        if leaf.dtype.name in KINDS
        for size in (leaf.size, leaf[0].size)
    }
    within = "\n\n".join(part for part in text.split("\n\n") if "%fused" not in part[:10])
    made = re.findall(r"= (\w+)\[([\d,]+)\]\S* (?:copy|fusion|transpose|convert|call)\(", within)
    sizes = {(kind, int(np.prod([int(n) for n in shape.split(",")]))) for kind, shape in made}
    assert kept
    assert not kept & sizes
    config = model.config
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    # Written in place: what gives the whole cache is the update of it.
    tiles = f"{L},1,{room // TILE},{K}"
    tile = f"(?:{TILE},{H}|{H},{TILE})"
    whole = re.findall(rf"%(\S+) = f32\[{tiles},{tile}\]\S* (\w+)\(", within)
    names = {name for name, kind in whole if kind in {"copy", "fusion", "transpose"}}
    assert names
    assert all("dynamic-update-slice" in name or "dynamic_update_slice" in name for name in names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_find_the_numbers_of_rows_stored(load_model, name: str):
    # Where a kernel computes them of the layer's number, LLVM's code is scalar.
    _, model = load_model(name)
    gathers = 0
    for part in compiled_loop(model).split("\n\n"):
        if "%fused" not in part[:10]:
            continue
        made = dict(re.findall(r"%(\S+) = \S+ ([\w-]+)\(", part))
        takes = dict(re.findall(r"%(\S+) = \S+ (?:bitcast|broadcast)\(%([^\s,)]+)", part))
        lanes = "|".join({str(lanes_of(name)) for name in ("Q4_0", "Q8_0")})
        packed = rf"= (?:{'|'.join(KINDS.values())})\[[\d,]+,(?:{lanes})\]\S* "
        for numbers in re.findall(packed + r"gather\(%\S+, %([^\s,)]+)\)", part):
            while made[numbers] in {"bitcast", "broadcast"}:
                numbers = takes[numbers]
            assert made[numbers] == "parameter"
            gathers += 1
    assert gathers >= 7


@pytest.mark.parametrize("room", [128, 512, 1024])
def test_attention_reads_keys_and_values_where_they_lie(load_model, room: int):
    # A kernel takes what it needs of all tiles by number. One whose result is of another form than
    # the tiles' is scalar, and takes twenty times as long.
    _, model = load_model("Q4_0")
    config = model.config
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    every = config.num_layers * room // TILE * K
    kernels = 0
    for part in compiled_loop(model, room).split("\n\n"):
        gathers = len(re.findall(r"= f32\[[\d,]+\]\S* gather\(", part))
        if "%fused" in part[:10] and f"f32[{every}," in part and gathers >= min(H, TILE):
            root = re.findall(r"ROOT %\S+ = f32\[([\d,]+)\]", part)[-1]
            assert re.fullmatch(rf"\d+,{N},(?:{TILE}|{H})", root)
            kernels += 1
    branches = {128: 1, 512: 2, 1024: 5}[room]
    assert kernels == 2 * branches
