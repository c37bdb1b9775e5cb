"""The number types of GGUF's tensors."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import torch


class GgmlType(enum.IntEnum):
    """How a tensor's numbers are stored. Rows are cut into blocks of a fixed number of elements and bytes."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @property
    def block_elements(self) -> int:
        return BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        return BLOCKS[self][1]

    @property
    def dense(self) -> bool:
        """Whether the numbers are plain numbers of a torch dtype."""
        return self in DTYPES

    def row_bytes(self, elements: int) -> int:
        """How many bytes a row of so many elements takes; they have to be a multiple of the block."""
        return elements // self.block_elements * self.block_bytes


# (elements, bytes) of a block.
BLOCKS: Final[Mapping[GgmlType, tuple[int, int]]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ2_XXS: (256, 66),
    GgmlType.IQ2_XS: (256, 74),
    GgmlType.IQ3_XXS: (256, 98),
    GgmlType.IQ1_S: (256, 50),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ3_S: (256, 110),
    GgmlType.IQ2_S: (256, 82),
    GgmlType.IQ4_XS: (256, 136),
    GgmlType.I8: (1, 1),
    GgmlType.I16: (1, 2),
    GgmlType.I32: (1, 4),
    GgmlType.I64: (1, 8),
    GgmlType.F64: (1, 8),
    GgmlType.IQ1_M: (256, 56),
    GgmlType.BF16: (1, 2),
    GgmlType.TQ1_0: (256, 54),
    GgmlType.TQ2_0: (256, 66),
    GgmlType.MXFP4: (32, 17),
    GgmlType.NVFP4: (64, 36),
    GgmlType.Q1_0: (128, 18),
}

DTYPES: Final[Mapping[GgmlType, torch.dtype]] = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
    GgmlType.F64: torch.float64,
    GgmlType.I8: torch.int8,
    GgmlType.I16: torch.int16,
    GgmlType.I32: torch.int32,
    GgmlType.I64: torch.int64,
}

# Type numbers that files may name and nothing reads any more, or that are never stored.
GONE: Final[Mapping[int, str]] = {
    4: "Q4_2, removed from ggml",
    5: "Q4_3, removed from ggml",
    9: "Q8_1, which ggml only computes with",
    15: "Q8_K, which ggml only computes with",
    31: "Q4_0_4_4, removed from ggml: store Q4_0, which is repacked at run time",
    32: "Q4_0_4_8, removed from ggml: store Q4_0, which is repacked at run time",
    33: "Q4_0_8_8, removed from ggml: store Q4_0, which is repacked at run time",
    36: "IQ4_NL_4_4, removed from ggml: store IQ4_NL, which is repacked at run time",
    37: "IQ4_NL_4_8, removed from ggml: store IQ4_NL, which is repacked at run time",
    38: "IQ4_NL_8_8, removed from ggml: store IQ4_NL, which is repacked at run time",
}
