"""What the number types of ggml (GGUF) mean: one spec per type, which wires spell and algorithms make.

All dequantize in fp32, as ggml does. Mins are subtracted there and added here, so they are stored with the other sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from lowbit.core.spec import BlockCode, FloatCode, Grouping, IntCode, QuantSpec, Scale, SecondLevel, TableCode, Zero

_HALF: Final = torch.float16


def _integer(bits: int, group: int, *, signed: bool = False, zero: bool = False) -> QuantSpec:
    return QuantSpec(
        code=IntCode(bits, signed),
        scale=Scale(_HALF),
        grouping=Grouping.groups(group),
        zero=Zero("additive", dtype=_HALF) if zero else None,
        dtype=torch.float32,
    )


def _table(name: str, group: int, scale: torch.dtype = _HALF, bits: int = 4) -> QuantSpec:
    return QuantSpec(TableCode(name, bits), Scale(scale), Grouping.groups(group), dtype=torch.float32)


def _two_level(spec: QuantSpec, bits: int, *, signed: bool = False) -> QuantSpec:
    """Scales (and mins) of `bits` bits, 256 weights sharing an fp16 super-scale."""
    second = SecondLevel("integer", 256 // spec.grouping.cols, _HALF, bits, signed=signed)
    zero = replace(spec.zero, dtype=torch.float32, second=second) if spec.zero else None
    return replace(spec, scale=Scale(torch.float32, second=second), zero=zero)


def _float(dtype: torch.dtype) -> QuantSpec:
    return QuantSpec(FloatCode(dtype), Scale(dtype, stored=False), Grouping.per_channel(), dtype=torch.float32)


def _block(name: str) -> QuantSpec:
    code = BlockCode(name)
    return QuantSpec(code, Scale(torch.float32, stored=False), Grouping.groups(code.elements), dtype=torch.float32)


GGML_SPECS: Final[Mapping[str, QuantSpec]] = {
    "Q1_0": _table("sign", 128, bits=1),
    "Q4_0": _integer(4, 32, signed=True),
    "Q4_1": _integer(4, 32, zero=True),
    "Q5_0": _integer(5, 32, signed=True),
    "Q5_1": _integer(5, 32, zero=True),
    "Q8_0": _integer(8, 32, signed=True),
    "Q2_K": _two_level(_integer(2, 16, zero=True), 4),
    "Q3_K": _two_level(_integer(3, 16, signed=True), 6, signed=True),
    "Q4_K": _two_level(_integer(4, 32, zero=True), 6),
    "Q5_K": _two_level(_integer(5, 32, zero=True), 6),
    "Q6_K": _two_level(_integer(6, 16, signed=True), 8, signed=True),
    "IQ4_NL": _table("iq4_nl", 32),
    "IQ4_XS": _two_level(_table("iq4_nl", 32), 6, signed=True),
    "MXFP4": _table("e2m1", 32, torch.float8_e8m0fnu),
    "NVFP4": _table("e2m1", 16, torch.float8_e4m3fn),
    "IQ1_S": _block("iq1_s"),
    "IQ1_M": _block("iq1_m"),
    "IQ2_XXS": _block("iq2_xxs"),
    "IQ2_XS": _block("iq2_xs"),
    "IQ2_S": _block("iq2_s"),
    "IQ3_XXS": _block("iq3_xxs"),
    "IQ3_S": _block("iq3_s"),
    "TQ1_0": _block("tq1_0"),
    "TQ2_0": _block("tq2_0"),
    "F32": _float(torch.float32),
    "F16": _float(torch.float16),
    "BF16": _float(torch.bfloat16),
}


def ggml_type_of(spec: QuantSpec) -> str | None:
    """The type whose tensors mean `spec`, whatever dtype the spec dequantizes to; None if there is none."""
    for name, known in GGML_SPECS.items():
        if replace(spec, dtype=known.dtype) == known:
            return name
    return None
