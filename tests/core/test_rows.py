"""Strips of a weight: the same bits as the whole, for every spec."""

from __future__ import annotations

import pytest
import torch

from lowbit.core import Grouping, QuantSpec, QuantTensor, Scale, SecondLevel, TableCode, rows
from lowbit.core.reference import dequantize
from lowbit.core.rows import dequantize_in_strips
from test_reference import FLOATS, INTEGERS, TABLES, TWO_LEVELS, random_tensors

SHAPE = (24, 40)
NESTED = [
    QuantSpec(TableCode("nf4"), Scale(torch.float32, second=second), Grouping.flat_blocks(16))
    for second in (None, SecondLevel("table", 2, offset=True), SecondLevel("table", 0), SecondLevel("float8", 3))
]


@pytest.mark.parametrize("spec", [*INTEGERS, *TABLES, *FLOATS, *NESTED, TWO_LEVELS], ids=str)
def test_strips_are_the_whole(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(spec, SHAPE)
    QuantTensor(spec, tensors, SHAPE).validate()
    calls = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return dequantize(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rows, "dequantize", counted)
    monkeypatch.setattr(rows, "_STRIP", 96)
    for dtype in (torch.float32, torch.float16):
        whole = dequantize(spec, tensors, SHAPE, dtype)
        assert torch.equal(dequantize_in_strips(spec, tensors, SHAPE, dtype), whole)
    if spec in NESTED or spec.grouping in (Grouping.per_channel(), Grouping.groups(8)):
        assert len(calls) > 4
