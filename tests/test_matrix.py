"""forward is right for every format and variant: float64's logits, and llama.cpp's.

llama.cpp rounds activations to 8 bits before a product with quantized weights, which moves logits
by 1 to 3 % of the largest: a wrong formula can hide in that. So besides being no farther from
llama.cpp than its rounding explains, the package has to give its logits when it rounds alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType

from llama_cpp_matrix import GOLDENS, Distances, distances
from matrix import MATRIX, NOT_IN_LLAMA_CPP, VARIANTS
from qllama_jax.quants import FORMATS
from reference import Reference
from tiny import write_tiny_llama

# float32 against float64. Measured: at most 1.8e-6.
FLOAT32 = 1e-5
# llama.cpp's distance from float64 over its rounding's. Measured: 1.00, once 1.03, for where an
# activation lies between two steps the last bit of float32 decides, and the logits after it change.
EXPLAINED = 1.25
# When all round alike, in the median of positions, since those with such an activation are others.
# Measured: at most 2.2e-7. Of the many small steps of F16 some decision differs nearly everywhere,
# and all that come after it: there the best position has to do. Measured: 8e-6, where F16's
# rounding makes 3e-4; the median is 2e-4 on a CPU with AVX-512.
ALIKE = 2e-6
ALIKE_F16 = 1e-4
ALIKE_F16_MEDIAN = 1e-3  # the first positions alone would not know a wrong attention


@pytest.fixture(scope="module")
def distances_of(tiny_llama: Callable[..., Path]) -> Callable[[str], Distances]:
    """Function: name in MATRIX -> what was measured, once."""
    return functools.cache(lambda name: distances(tiny_llama(**MATRIX[name]), name))


@pytest.mark.parametrize("name", MATRIX)
def test_logits_are_those_of_the_float64_reference(distances_of, name):
    assert distances_of(name).error.max() <= FLOAT32


@pytest.mark.parametrize("name", GOLDENS["cases"])
def test_logits_are_llama_cpps_but_for_its_rounding_of_activations(distances_of, name):
    found = distances_of(name)
    assert found.distance.max() <= EXPLAINED * found.rounding.max() + FLOAT32


@pytest.mark.parametrize("name", GOLDENS["cases"])
def test_logits_are_llama_cpps_when_all_round_activations_alike(distances_of, name):
    found = distances_of(name)
    assert np.median(found.reference_left) <= ALIKE
    if name == "F16":
        assert found.left.min() <= ALIKE_F16
        assert np.median(found.left) <= ALIKE_F16_MEDIAN
    else:
        assert np.median(found.left) <= ALIKE


def test_a_scale_wrong_by_1_percent_hides_in_the_rounding_but_not_when_all_round_alike(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    packed = FORMATS[QType.Q4_0]
    right = packed.dequantize
    monkeypatch.setattr(packed, "dequantize", lambda self: right(self) * 1.01)
    jax.clear_caches()  # what is compiled has the right scale
    try:
        found = distances(tiny_llama(**MATRIX["Q4_0"]), "Q4_0")
    finally:
        jax.clear_caches()
    assert found.distance is not None
    assert found.rounding is not None
    assert found.left is not None
    assert found.distance.max() <= EXPLAINED * found.rounding.max()
    assert np.median(found.left) > 1000 * ALIKE


def test_every_file_is_compared_with_llama_cpp_or_has_a_reason_not_to_be():
    assert {*GOLDENS["cases"], *NOT_IN_LLAMA_CPP} == set(MATRIX)
    assert not NOT_IN_LLAMA_CPP.keys() & GOLDENS["cases"].keys()


def test_a_file_that_llama_cpp_did_not_run_is_refused(tmp_path: Path):
    other = write_tiny_llama(tmp_path / "other.gguf", **MATRIX["tied"], seed=7)
    with pytest.raises(ValueError, match=r"tied: not the file that llama.cpp ran"):
        distances(other, "tied")


def test_every_variant_gives_logits_of_its_own(tiny_llama: Callable[..., Path]):
    plain = Reference(tiny_llama(**MATRIX["tied"] | {"tied": False})).logits(range(24))
    for name in VARIANTS:
        other = Reference(tiny_llama(**MATRIX[name])).logits(range(24))
        assert np.abs(other - plain).max() > 0.02, name
