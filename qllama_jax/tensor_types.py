"""The names and sizes of the types that tensors have in files: ggml's own, and those before GGUF.

gguf-py lists the types of today. Until May 2023 the same numbers stood for other block layouts,
which are types of their own here, because their 32-bit scales do not fit into today's blocks.
"""

from __future__ import annotations

from enum import IntEnum
from enum import property as enum_property

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


class OldType(IntEnum):
    """A block layout that only files older than GGUF have: 1000 times the version plus ggml's id.

    The version is that of the last GGJT file with the layout; GGML and GGMF files have version 1's.
    """

    Q4_0_V1 = 1002
    Q4_1_V1 = 1003
    Q4_2_V1 = 1004
    Q5_0_V1 = 1006
    Q5_1_V1 = 1007
    Q4_0_V2 = 2002
    Q4_1_V2 = 2003
    Q8_0_V2 = 2008

    @enum_property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The name to show, such as "Q4_0 (GGJT v1)"."""
        name, _, version = self._name_.rpartition("_V")
        return f"{name} (GGJT v{version})"


TensorType = GGMLQuantizationType | OldType

#: Type -> (values in a block, bytes of a block).
BLOCK_SIZES: dict[TensorType, tuple[int, int]] = {
    **GGML_QUANT_SIZES,
    OldType.Q4_0_V1: (32, 4 + 16),
    OldType.Q4_1_V1: (32, 4 + 4 + 16),
    OldType.Q4_2_V1: (16, 2 + 8),
    OldType.Q5_0_V1: (32, 2 + 4 + 16),
    OldType.Q5_1_V1: (32, 2 + 2 + 4 + 16),
    OldType.Q4_0_V2: (32, 4 + 16),
    OldType.Q4_1_V2: (32, 4 + 4 + 16),
    OldType.Q8_0_V2: (32, 4 + 32),
}

_Q = GGMLQuantizationType
_V3 = (
    *(_Q.F32, _Q.F16, _Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q8_0),
    *(_Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K, _Q.Q8_K, _Q.BF16),
)

#: Version of a GGJT file -> number in its tensor table -> type. GGML and GGMF files are as 1.
TYPE_NUMBERS: dict[int, dict[int, TensorType]] = {
    1: {
        0: _Q.F32,
        1: _Q.F16,
        2: OldType.Q4_0_V1,
        3: OldType.Q4_1_V1,
        4: OldType.Q4_2_V1,
        6: OldType.Q5_0_V1,
        7: OldType.Q5_1_V1,
        8: OldType.Q8_0_V2,
    },
    2: {
        0: _Q.F32,
        1: _Q.F16,
        2: OldType.Q4_0_V2,
        3: OldType.Q4_1_V2,
        6: _Q.Q5_0,
        7: _Q.Q5_1,
        8: OldType.Q8_0_V2,
    },
    3: {int(qtype): qtype for qtype in _V3},
}
