"""What does not fit is refused before it is allocated, with the numbers; what fits is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax import layerwise, memory, session
from qllama_jax.cache import resize_cache
from qllama_jax.free_memory import free_bytes, host_free_bytes
from qllama_jax.memory import workspace_bytes
from qllama_jax.tensor_file import GGUFTensor
from qllama_jax.weight_bytes import weight_bytes

TinyLlama = Callable[..., Path]
UNLIMITED = 9223372036854771712  # as version 1 writes it
MIB = 2**20


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture
def set_free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    return lambda free: monkeypatch.setattr(memory, "free_bytes", lambda _: free)


# What is free


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def meminfo(available: int, swap: int = 0) -> dict[str, str]:
    lines = f"MemTotal: 99999999 kB\nMemFree: 5 kB\nMemAvailable:  {available // 1024} kB\n"
    return {"proc/meminfo": lines + f"HugePages_Free: 0\nSwapFree: {swap // 1024} kB\n"}


def v2(folder: str, limit: Any, used: int, files: int = 0, swap: Any = None) -> dict[str, str]:
    stat = f"anon 77\nfile {files + 1}\ninactive_file {files - files // 3}\n"
    made = {"memory.max": limit, "memory.current": used}
    made["memory.stat"] = stat + f"active_file {files // 3}"
    if swap is not None:
        made |= {"memory.swap.max": swap[0], "memory.swap.current": swap[1]}
    return {f"cgroup/{folder}/{name}": f"{value}\n" for name, value in made.items()}


def v1(folder: str, limit: int, used: int, files: int = 0, both: Any = None) -> dict[str, str]:
    made: dict[str, Any] = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
    made["memory.stat"] = f"inactive_file 3\ntotal_inactive_file {files}\ntotal_active_file 0"
    if both is not None:
        made |= {"memory.memsw.limit_in_bytes": both[0], "memory.memsw.usage_in_bytes": both[1]}
    return {f"cgroup/memory/{folder}/{name}": f"{value}\n" for name, value in made.items()}


NEW, OLD = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "9:pids:/\n4:cpu,memory:/a/b\n"}
SYSTEMS: dict[str, tuple[dict[str, str], int | None]] = {
    "no Linux": ({}, None),
    "a machine": (meminfo(700 * MIB), 700 * MIB),
    "swap": (meminfo(700 * MIB, 40 * MIB), 740 * MIB),
    "2, no limit": (meminfo(700 * MIB) | NEW | v2("a/b", "max", 5), 700 * MIB),
    "2, its own": (meminfo(700 * MIB) | NEW | v2("a/b", 90 * MIB, 30 * MIB), 60 * MIB),
    "2, the machine's is less": (meminfo(7 * MIB) | NEW | v2("a/b", 90 * MIB, 30 * MIB), 7 * MIB),
    "2, files can go": (NEW | v2("a/b", 90 * MIB, 80 * MIB, 63), 10 * MIB + 63),
    "2, its parent's": (NEW | v2("a/b", 90, 5) | v2("a", 60, 40), 20),
    "2, the root's, in a container": (NEW | v2("", 60, 40), 20),
    "2, no swap allowed": (meminfo(700, 40 * MIB) | NEW | v2("a", 9, 2, swap=(0, 0)), 7),
    "2, some swap": (meminfo(MIB, 40 * MIB) | NEW | v2("a", 9, 2, swap=(MIB, 96)), MIB - 96 + 7),
    "2, any swap": (meminfo(MIB, MIB) | NEW | v2("a", 9, 2, swap=("max", 96)), MIB + 7),
    "2, more used than allowed": (NEW | v2("a/b", 10, 11), 0),
    "2 beside 1": (
        NEW
        | {k.replace("cgroup/a", "cgroup/unified/a"): t for k, t in v2("a", 9, 2).items()}
        | NEW,
        7,
    ),
    "1, no limit": (meminfo(700 * MIB) | OLD | v1("a/b", UNLIMITED, 5), 700 * MIB),
    "1, its own": (OLD | v1("a/b", 90, 30, 8), 68),
    "1, its parent's": (OLD | v1("a/b", UNLIMITED, 30) | v1("a", 60, 40), 20),
    "1, the root's, in a container": (OLD | v1("", 60, 40), 20),
    "1, with swap": (meminfo(MIB, MIB) | OLD | v1("a", 60, 40), MIB + 20),
    "1, both together": (meminfo(MIB, MIB) | OLD | v1("a", 60, 40, 1, both=(90, 45)), 46),
    "other controllers": (meminfo(MIB) | {"proc/self/cgroup": "9:pids:/a\n"} | v1("a", 6, 1), MIB),
    "nonsense": (meminfo(MIB) | NEW | v2("a/b", "?", 5), MIB),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_free_is_the_least_that_the_machine_and_each_group_leave(tmp_path: Path, name: str):
    files, wanted = SYSTEMS[name]
    write_files(tmp_path, files)
    assert host_free_bytes(tmp_path / "proc", tmp_path / "cgroup") == wanted


def device(stats: Any, platform: str = "gpu") -> Any:
    def memory_stats() -> Any:
        if isinstance(stats, Exception):
            raise stats
        return stats

    return SimpleNamespace(platform=platform, memory_stats=memory_stats)


def test_an_accelerator_says_itself_what_is_free_or_nothing_is_known():
    assert free_bytes(device({"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert free_bytes(device({"bytes_limit": 100, "bytes_in_use": 130})) == 0
    for stats in (None, {}, {"bytes_in_use": 3}, NotImplementedError(), RuntimeError("no")):
        assert free_bytes(device(stats)) is None
    assert free_bytes(device(RuntimeError("not asked"), "cpu")) == pytest.approx(
        host_free_bytes(), rel=0.2
    )


def test_nothing_is_refused_where_nobody_knows_what_is_free(tiny_llama: TinyLlama, set_free: Any):
    set_free(None)
    model = ql.load(tiny_llama("Q4_0", context_length=4096))
    ql.init_cache(model.config, 1, 64)
    ql.generate(model, [5, 6], max_new_tokens=2)


# What is needed

MIXED = {
    "*": "Q4_K",
    "token_embd.weight": "Q8_0",
    "output.weight": "Q6_K",
    "blk.1.ffn_up.weight": "IQ2_XS",
}
FILES: dict[str, dict[str, Any]] = {
    **{qtype: {"qtype": qtype} for qtype in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    **{qtype: {"qtype": qtype} for qtype in ("Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")},
    "odd rows": {"qtype": "Q4_0", "vocab": 389, "tied": True},
    "mixed": {"qtype": MIXED, "biases": True, "rope_freqs": True},
    "mixture": {"qtype": "Q5_K", "experts": 3, "experts_used": 2},
    "experts apart": {"qtype": "Q4_0", "experts": 3, "experts_used": 2, "merged": False},
    "fused": {"qtype": "Q4_0", "fused_qkv": True},
}


@pytest.mark.parametrize("layout", ["auto", "file"])
@pytest.mark.parametrize("name", FILES)
def test_bytes_told_from_the_tensor_table_are_those_of_the_loaded_weights(
    tiny_llama: TinyLlama, name: str, layout: Any
):
    path = tiny_llama(**FILES[name])
    params = ql.load(path, layout=layout).params
    factors = 4 * sum(t.shape[0] for n, t in ql.read_gguf(path).tensors.items() if "rope" in n)
    wanted = nbytes(params) - nbytes(params.rope) + factors
    assert weight_bytes(ql.read_gguf(path), layout) == wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts": 8, "experts_used": 2},
        # 8 rows with a residual have as many sums as are stored of a weight in one piece.
        {"layers": 1, "embed": 2048, "ffn": 6112, "heads": 32, "kv_heads": 4, "head_dim": 64},
    ],
    ids=["dense", "mixture", "wide"],
)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 8), (1, 64), (3, 512)])
def test_what_two_layers_and_a_choice_take_stays_below_the_bound(
    tiny_llama: TinyLlama, options: dict[str, Any], rows: int, tokens: int
):
    model = ql.load(tiny_llama("Q4_0", **options))
    config, V = model.config, model.config.vocab_size

    def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = jax.eval_shape(lambda: ql.init_cache(config, rows, tokens))
    lengths, ids = of((rows,), jnp.int32), of((rows, tokens), jnp.int32)
    static: dict[str, Any] = {"config": config}
    x, entry = jax.eval_shape(
        lambda *a: layerwise.enter(*a, max_length=tokens, **static),
        model.params, ids, lengths, lengths,
    )  # fmt: skip
    arguments = model.params.blk[0], x, cache.k[0], cache.v[0], entry
    layer = layerwise._layer.lower(*arguments, activations="int8x2", **static).compile()
    keys = ql.row_keys(jax.random.key(0), rows)
    sampling = jax.tree.map(jnp.asarray, ql.Sampling(temperature=1.0, top_p=0.5).per_row(rows))
    recent, stop = of((rows, 64), jnp.int32), of((1,), jnp.int32)
    start = session._start.lower(of((rows, V)), cache, recent, keys, sampling, stop).compile()
    bound = workspace_bytes(config, rows, tokens)
    of_layer, of_start = layer.memory_analysis(), start.memory_analysis()
    assert of_layer is not None
    assert of_start is not None
    assert 2 * of_layer.temp_size_in_bytes <= bound
    assert of_start.temp_size_in_bytes <= bound


# Refusals


@pytest.fixture(scope="module")
def model(tiny_llama: TinyLlama) -> ql.Model:
    return ql.load(tiny_llama("Q4_0", context_length=4096))


def test_a_model_that_does_not_fit_is_refused_before_a_byte_of_it_is_read(
    tiny_llama: TinyLlama, set_free: Any, monkeypatch: pytest.MonkeyPatch
):
    path = tiny_llama("Q6_K", context_length=4096)
    loaded = ql.load(path)
    weights = nbytes(loaded.params) - nbytes(loaded.params.rope)
    cache = ql.init_cache(loaded.config, 1, 128)
    total = weights + nbytes((cache.k, cache.v)) + workspace_bytes(loaded.config, 1, 128)
    set_free(total)
    ql.load(path)
    set_free(total - 1)
    with monkeypatch.context() as patch:
        patch.setattr(GGUFTensor, "data", property(lambda _: pytest.fail("a tensor was read")))
        with pytest.raises(ql.OutOfMemoryError) as caught:
            ql.load(path)
    error = caught.value
    assert isinstance(error, MemoryError)
    assert (error.weights, error.cache) == (weights, nbytes((cache.k, cache.v)))
    assert error.weights + error.cache + error.workspace == total
    assert (error.free, error.longest_context) == (total - 1, 0)
    shown = str(error)
    assert str(path) in shown
    for size in (weights, error.cache, error.workspace, total, total - 1):
        assert f"{size / 1e6:,.1f} MB" in shown
    assert "no context fits" in shown


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_longest_cache_named_is_accepted_and_one_position_more_refused(
    model: ql.Model, set_free: Any, dtype: Any
):
    few = ql.init_cache(model.config, 3, 10, dtype)
    set_free(nbytes((few.k, few.v)) * 7 + 5)
    with pytest.raises(
        ql.OutOfMemoryError, match=r"the longest max_length that fits is 70$"
    ) as caught:
        ql.init_cache(model.config, 3, 4000, dtype)
    assert caught.value.cache == nbytes((few.k, few.v)) * 400
    assert caught.value.longest_context == 70
    assert ql.init_cache(model.config, 3, 70, dtype).max_length == 70
    with pytest.raises(ql.OutOfMemoryError):
        ql.init_cache(model.config, 3, 71, dtype)
    assert resize_cache(few, 70).max_length == 70
    with pytest.raises(ql.OutOfMemoryError, match=r"resize_cache.* that fits is 70$"):
        resize_cache(few, 71)


def test_a_trace_allocates_nothing_and_is_refused_nothing(model: ql.Model, set_free: Any):
    cache = ql.init_cache(model.config, 1, 8)
    set_free(1)
    shapes = jax.eval_shape(lambda: ql.init_cache(model.config, 64, 2**20))
    assert shapes.k[0].shape[3] == 2**20
    assert jax.eval_shape(lambda c: ql.resize_cache(c, 2**20), cache).v[0].shape[2] == 2**20


@pytest.mark.parametrize(("rows", "kind"), [(1, "float16"), (2, "float16"), (1, "float32")])
def test_the_longest_generation_named_is_accepted_and_one_token_more_refused(
    model: ql.Model, set_free: Any, rows: int, kind: str
):
    prompt = np.arange(1, 251, dtype=np.int32)
    prompts = [prompt] * rows if rows > 1 else prompt
    cache = ql.init_cache(model.config, rows, 256, jnp.dtype(kind))
    set_free(workspace_bytes(model.config, rows, 256) + nbytes((cache.k, cache.v)))

    def run(new: int) -> Any:
        return ql.generate(model, prompts, max_new_tokens=new, ignore_eos=True, cache_dtype=kind)

    with pytest.raises(ql.OutOfMemoryError) as caught:
        run(2000)
    error = caught.value
    assert str(error).endswith("the longest context that fits is 257")
    assert error.longest_context == 257  # the last token is not stored
    assert error.weights == nbytes(model.params)
    assert error.cache == nbytes((cache.k, cache.v)) * 4096 // 256
    assert error.workspace >= workspace_bytes(model.config, rows, 512)
    longest = run(7)
    assert len((longest if rows > 1 else [longest])[0].tokens) == 7
    for refused in (
        lambda: run(8),
        lambda: ql.stream(model, prompt, max_new_tokens=3000, cache_dtype=kind),
    ):
        with pytest.raises(ql.OutOfMemoryError):
            refused()


def test_the_longest_score_named_is_accepted_and_one_token_more_refused(
    model: ql.Model, set_free: Any
):
    ids = np.arange(1, 380, dtype=np.int32)
    room = ql.init_cache(model.config, 1, 128)
    logits = 12 * 128 * model.config.vocab_size
    set_free(nbytes((room.k, room.v)) + workspace_bytes(model.config, 1, 128) + logits)
    with pytest.raises(ql.OutOfMemoryError, match=r"that fits is 128$"):
        ql.score(model, [ids[:3], ids])
    assert len(ql.score(model, ids[:128]).tokens) == 128
    with pytest.raises(ql.OutOfMemoryError):
        ql.score(model, ids[:129])
    with pytest.raises(ql.OutOfMemoryError, match=r"context=256: .*that fits is 128$"):
        ql.perplexity(model, ids, context=256)
