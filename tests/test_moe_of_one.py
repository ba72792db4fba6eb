"""A mixture of one expert is one, however its file says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qllama_jax as ql
from qllama_jax.params import DenseBlock, MoEBlock
from reference import Reference

Array = np.ndarray
TinyLlama = Callable[..., Path]
D = 64
SMALL: dict[str, Any] = {"layers": 1, "embed": D, "ffn": 96, "heads": 4, "kv_heads": 2}
ROUNDING = 2e-6

ONE: dict[str, Any] = SMALL | {"layers": 2, "experts": 1, "experts_used": 1}


@pytest.mark.parametrize("layout", ["file", "auto"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_a_mixture_of_one_expert_equals_the_reference(
    tiny_llama: TinyLlama, merged: bool, layout: Any
):
    path = tiny_llama("Q8_0", **ONE, merged=merged)
    model = ql.load(path, layout=layout)
    assert all(isinstance(block, MoEBlock) for block in model.params.blk)
    tokens = list(range(5, 25))
    logits, _ = ql.forward(
        model.params,
        jnp.asarray([tokens], jnp.int32),
        ql.init_cache(model.config, 1, 20),
        config=model.config,
    )
    wanted = Reference(path).logits(tokens)
    np.testing.assert_allclose(logits[0], wanted, atol=ROUNDING * np.abs(wanted).max(), rtol=0)


def test_a_stack_of_one_may_lack_the_1_of_its_shape(tiny_llama: TinyLlama, tmp_path: Path):
    """As ggml's tools write it, which drop the ones at the end of a shape."""
    path = tiny_llama("Q8_0", **ONE)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        data = tensor.data[0] if "_exps" in tensor.name or "_inp" in tensor.name else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = ql.read_gguf(tmp_path / "a.gguf").tensors
    assert opened["blk.0.ffn_gate_inp.weight"].shape == (D,)
    assert opened["blk.0.ffn_up_exps.weight"].shape == (D, 96)
    for layout in ("file", "auto"):
        found, wanted = (ql.load(p, layout=layout).params for p in (tmp_path / "a.gguf", path))
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    found, wanted = (ql.load(p) for p in (tmp_path / "a.gguf", path))
    calls = (ql.generate(m, [5, 6], max_new_tokens=3, ignore_eos=True) for m in (found, wanted))
    assert len({tuple(call.tokens) for call in calls}) == 1


@pytest.mark.parametrize("used", [None, 0])
def test_a_mixture_of_one_needs_a_number_used_as_every_mixture(
    tiny_llama: TinyLlama, used: int | None
):
    path = tiny_llama("Q8_0", **ONE, metadata={"llama.expert_used_count": used})
    found = "none" if used is None else "0"
    with pytest.raises(
        ql.GGUFError, match=rf"'llama\.expert_used_count'.*: found {found}, wanted 1, as there is"
    ):
        ql.load(path)


@pytest.mark.parametrize("used", [None, 0, 1])
def test_a_dense_file_may_say_that_it_has_one_expert(tiny_llama: TinyLlama, used: int | None):
    keys = {"llama.expert_count": 1, "llama.expert_used_count": used}
    model = ql.load(tiny_llama("Q8_0", **SMALL, metadata=keys))
    assert isinstance(model.params.blk[0], DenseBlock)
