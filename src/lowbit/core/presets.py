"""Specs that algorithms make and wires spell; what both have to mean the same by."""

from __future__ import annotations

from typing import Final

import torch

from lowbit.core.spec import Activation, Grouping, IntCode, QuantSpec, Scale, SecondLevel, TableCode, Zero

# The decimal that bitsandbytes writes for 1/127; the bits of a dequantized weight depend on it.
_INV_127: Final = 7.874015718698502e-3


def integer_spec(
    bits: int,
    group_size: int,
    *,
    permuted: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantSpec:
    """GPTQ and AWQ: unsigned integers, one scale and one integer zero per group of the input axis.

    Args:
        group_size: -1 for one group per output row.
        permuted: whether a group index says which columns make a group.
        scale_dtype: of the scales, and of the weight before and after.
    """
    return QuantSpec(
        code=IntCode(bits),
        scale=Scale(scale_dtype),
        grouping=Grouping.per_channel() if group_size == -1 else Grouping.groups(group_size, permuted),
        zero=Zero("integer", bits),
        dtype=scale_dtype,
    )


def table_spec(
    name: str,
    *,
    block_size: int = 64,
    nested: bool = False,
    nested_block: int = 256,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantSpec:
    """A 16-entry table (``nf4`` or ``fp4``), one fp32 absolute maximum per `block_size` weights in row-major order.

    Args:
        nested: whether the maxima are themselves coded, `nested_block` of them sharing a scale.
        dtype: of the weight before and after.
    """
    second = SecondLevel("table", nested_block, offset=True) if nested else None
    return QuantSpec(
        code=TableCode(name),
        scale=Scale(torch.float32, second=second),
        grouping=Grouping.flat_blocks(block_size),
        dtype=dtype,
    )


def int8_spec(threshold: float = 6.0) -> QuantSpec:
    """int8 rows with fp32 absolute maxima; activations int8 per token, columns that reach `threshold` in 16 bits."""
    return QuantSpec(
        code=IntCode(8, signed=True),
        scale=Scale(torch.float32, multiplier=_INV_127),
        grouping=Grouping.per_channel(),
        activation=Activation("int8", threshold),
        dtype=torch.float32,
    )
