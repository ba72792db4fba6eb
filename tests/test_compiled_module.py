"""What scripts/compiled_module.py reads out of a module's text."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from compiled_module import Module

#: As XLA writes it, but for "cycles" and "trips", which it writes at greater length.
SHORT = """\
HloModule jit_f, is_scheduled=true

%fused (p: f32[8,4]) -> bf16[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %c = bf16[8,4]{1,0} convert(%p)
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %f = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, cycles=100
  %ar = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add, cycles=7
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %ar)
}

%upto (arg.2: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3), metadata={op_name="while"}
  ROOT %lt.1 = pred[]{:T(512)} compare(%c, %limit), direction=LT
}

%condition (arg.1: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[]{:T(512)} compare(%a, %b), direction=LT, cycles=1
}

ENTRY %main (x.1: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%t0), condition=%condition, body=%body, trips=5
  %u = (s32[], f32[8,4]{1,0}) while(%w), condition=%condition, body=%body
  %v = (s32[], f32[8,4]{1,0}) while(%u), condition=%upto, body=%body
  %g = f32[16,4]{1,0} all-gather-start(%v), dimensions={0}
  ROOT %cc = f32[16,4]{1,0} custom-call(%g), custom_call_target="__cublas$gemm"
}
"""
TEXT = re.sub(
    r"trips=(\d+)",
    r'backend_config={"known_trip_count":{"n":"\1"}}',
    re.sub(r"cycles=(\d+)", r'backend_config={"estimated_cycles":"\1"}', SHORT),
)


def test_a_loop_counts_as_often_as_it_runs_and_one_of_unknown_length_once():
    module = Module(TEXT)
    assert module.collectives() == {"all-reduce": 5 + 1 + 3, "all-gather": 1}
    assert module.estimated_cycles() == 9 * (100 + 7) + 6 * 1


def test_a_fusion_counts_as_one_kernel_and_what_is_in_it_makes_no_buffer():
    module = Module(TEXT)
    kernels = module.kernels()
    assert kernels["loop fusion"] == 9
    assert kernels["__cublas$gemm"] == 1
    assert "convert" not in kernels
    assert module.float_buffers() == {(8, 4): 4 * 32, (16, 4): 4 * 64}


def test_buffers_are_those_of_main_memory():
    assert Module(TEXT).largest_buffer() == (4 * 64, "f32[16,4]")
    fast = TEXT.replace("f32[16,4]{1,0} custom-call", "f32[16,4]{1,0:T(8,128)S(1)} custom-call")
    assert Module(fast).largest_buffer() == (4 * 32, "f32[8,4]")
    assert Module(fast).float_buffers() == {(8, 4): 4 * 32}


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        Module("HloModule jit_f\n")


@pytest.mark.parametrize("rounds", [1, 3])
def test_collectives_of_a_real_module_are_those_of_the_program(rounds: int):
    mesh = Mesh(np.asarray(jax.devices("cpu")[:2]), ("x",), axis_types=(AxisType.Auto,))

    def add_up(x: jax.Array) -> jax.Array:
        def once(_: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sin(lax.psum(x, "x"))

        return lax.fori_loop(0, rounds, once, x)

    mapped = jax.shard_map(add_up, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((4, 8))).compile().as_text()
    assert text is not None
    assert Module(text).collectives() == {"all-reduce": rounds}
