"""Integers and FP8 numbers as torchao and FBGEMM make them: ends, middles, ties, zeros, and what can't be quantized."""

from __future__ import annotations

import pytest
import torch

from lowbit.algorithms import AffineIntegers, Algorithm, HalfAwayRows, Int4Additive, ScaledFloat8
from lowbit.core import FloatCode, Grouping, IntCode, QuantSpec, Scale, Zero, unpack
from lowbit.core.packing import sign_extend
from lowbit.errors import PlanError

INT4 = QuantSpec(IntCode(4, signed=True), Scale(torch.float32), Grouping.groups(32), dtype=torch.float32)
ADDITIVE = QuantSpec(
    IntCode(4, signed=True), Scale(torch.float32), Grouping.groups(32), Zero("additive", dtype=torch.float32)
)
ASYMMETRIC = QuantSpec(IntCode(4), Scale(torch.float32), Grouping.groups(32), Zero("integer", 4))
FP8 = QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(torch.float32), Grouping.per_channel())
INT8 = QuantSpec(IntCode(8, signed=True), Scale(torch.float16), Grouping.per_channel())


def test_additive_zeros_bring_both_ends_of_a_group_to_both_ends_of_the_codes() -> None:
    weight = torch.randn(8, 64)
    weight[1] = 0.75
    tensor = Int4Additive().quantize(weight, ADDITIVE)
    codes = sign_extend(unpack(tensor.tensors["codes"], 4, 64), 4).view(8, 2, 32)
    for row in (0, 2, 3):
        assert (codes[row].amin(-1).tolist(), codes[row].amax(-1).tolist()) == ([-8, -8], [7, 7])
    step = tensor.tensors["scales"].repeat_interleave(32, 1)
    assert ((tensor.dequantize() - weight).abs() <= step * 0.5001).all()
    # A group of one value has no range: its least range keeps the value.
    assert (tensor.dequantize()[1] - 0.75).abs().max() < 1e-6


def test_half_of_the_range_is_the_divisor_of_a_symmetric_scale() -> None:
    weight = torch.tensor([[7.5, -7.5, 0.5, 1.5, *[0.0] * 28]])
    plain = AffineIntegers().quantize(weight, INT4)
    assert plain.tensors["scales"].item() == 1.0
    assert plain.dequantize()[0, :4].tolist() == [7.0, -8.0, 0.0, 2.0]
    unclipped = AffineIntegers("symmetric_no_clipping_err").quantize(weight, INT4)
    assert unclipped.tensors["scales"].item() == pytest.approx(7.5 / 7)
    reduced = AffineIntegers(reduced=True).quantize(weight, INT8)
    assert reduced.tensors["codes"].abs().max() <= 64


def test_an_asymmetric_range_holds_zero() -> None:
    weight = torch.rand(4, 32) + 1
    tensor = AffineIntegers("asymmetric").quantize(weight, ASYMMETRIC)
    assert unpack(tensor.tensors["zeros"], 4, 1).flatten().tolist() == [0] * 4
    assert ((tensor.dequantize() - weight).abs() <= tensor.tensors["scales"] * 0.5001).all()


def test_fitted_scales_are_closer() -> None:
    weight = torch.randn(16, 64)
    plain, fitted = (AffineIntegers(fitted=fitted).quantize(weight, INT4) for fitted in (False, True))
    errors = [float((tensor.dequantize() - weight).square().sum()) for tensor in (plain, fitted)]
    assert errors[1] < errors[0]


def test_groups_of_zeros_stay_zero() -> None:
    weight = torch.randn(4, 64)
    weight[2] = 0
    algorithms: list[tuple[Algorithm, QuantSpec]] = [
        (AffineIntegers(), INT4),
        (AffineIntegers("asymmetric"), ASYMMETRIC),
        (AffineIntegers(fitted=True), INT4),
        (ScaledFloat8(), FP8),
        (ScaledFloat8(in_dtype=True), FP8),
        (HalfAwayRows(), INT8),
    ]
    for algorithm, spec in algorithms:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            dense = algorithm.quantize(weight.to(dtype), spec).dequantize()
            assert not dense[2].any() and torch.isfinite(dense).all(), (algorithm.name, dtype)


def test_an_fp8_scale_that_fp16_cannot_hold_is_kept() -> None:
    weight = torch.full((1, 32), 6e-8, dtype=torch.float16)
    tensor = ScaledFloat8(in_dtype=True).quantize(weight, FP8)
    assert torch.allclose(tensor.dequantize(), weight.float(), rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[1, 1] = value
    algorithms: list[tuple[Algorithm, QuantSpec]] = [
        (AffineIntegers(), INT4),
        (Int4Additive(), ADDITIVE),
        (ScaledFloat8(), FP8),
        (HalfAwayRows(), INT8),
    ]
    for algorithm, spec in algorithms:
        with pytest.raises(PlanError, match="NaN or infinite"):
            algorithm.quantize(weight, spec)


def test_each_makes_its_own_specs_only() -> None:
    made = {
        "affine": (AffineIntegers(), [INT4, ASYMMETRIC, INT8]),
        "additive": (Int4Additive(), [ADDITIVE]),
        "float8": (ScaledFloat8(), [FP8]),
        "eetq": (HalfAwayRows(), [INT8]),
    }
    for name, (algorithm, specs) in made.items():
        found = [spec for spec in (INT4, ADDITIVE, ASYMMETRIC, FP8, INT8) if algorithm.supports(spec)]
        assert set(specs) <= set(found) and len(found) <= 3, name
    with pytest.raises(PlanError, match="FP8 numbers"):
        ScaledFloat8().quantize(torch.randn(4, 64), INT4)
    with pytest.raises(PlanError, match="additive zeros"):
        Int4Additive().quantize(torch.randn(4, 64), INT4)
    with pytest.raises(PlanError, match="more than"):
        HalfAwayRows().quantize(torch.full((1, 64), 1e8), INT8)
