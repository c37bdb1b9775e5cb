"""Rounding of activations: each value against the definition, one number at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.core import Activation, Grouping, IntCode, QuantSpec, Scale
from lowbit.core.activations import number_range, round_inputs, round_to
from lowbit.core.reference import dequantize, linear

E2M1 = sorted({sign * value for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) for sign in (-1, 1)})


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 3


def test_e2m1_is_the_nearest_value_and_ties_go_to_the_even_code() -> None:
    values = torch.linspace(-6, 6, 4801)
    for value, rounded in zip(values.tolist(), round_to(values, "float4_e2m1").tolist(), strict=True):
        best = min(abs(value - entry) for entry in E2M1)
        assert math.isclose(abs(value - rounded), best, abs_tol=1e-6)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75])
    assert round_to(ties, "float4_e2m1").tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -1.0]


@pytest.mark.parametrize("number", ["int8", "int4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1"])
@pytest.mark.parametrize(("per", "size"), [("token", 0), ("tensor", 0), ("group", 16)])
def test_dynamic_scales_reach_the_largest_number(inputs: Tensor, number: str, per: str, size: int) -> None:
    policy = Activation("dynamic", number=number, per=per, size=size)
    rounded = round_inputs(inputs, policy, {})
    shares = {"token": inputs.flatten(0, 1), "tensor": inputs.reshape(1, -1), "group": inputs.reshape(-1, 16)}[per]
    scale = shares.abs().amax(-1, keepdim=True) / number_range(number)[1]
    expected = round_to(shares / scale, number).clamp(*number_range(number)) * scale
    assert torch.equal(rounded.reshape(shares.shape), expected)


def test_asymmetric_covers_the_range_and_keeps_zero(inputs: Tensor) -> None:
    inputs = inputs.abs()
    inputs[..., 0] = 0
    rounded = round_inputs(inputs, Activation("dynamic", symmetric=False), {})
    step = inputs.amax(-1, keepdim=True) / 255
    assert bool(((rounded - inputs).abs() <= step / 2 + 1e-6).all())
    assert bool((rounded[..., 0] == 0).all())


def test_a_bound_cuts_off_and_a_floor_holds(inputs: Tensor) -> None:
    bounded = round_inputs(inputs, Activation("dynamic", number="float8_e4m3fn", bound=1.5), {})
    assert float(bounded.abs().max()) <= 1.5
    floor = Activation("dynamic", floor=1.0)
    assert torch.equal(round_inputs(inputs, floor, {}), torch.round(inputs))


@pytest.mark.parametrize(("number", "exponent"), [("float4_e2m1", 2), ("float8_e4m3fn", 8)])
def test_mx_scales_are_powers_of_two(inputs: Tensor, number: str, exponent: int) -> None:
    policy = Activation("dynamic", number=number, per="group", size=32, scale_dtype=torch.float8_e8m0fnu)
    groups = inputs.reshape(-1, 32)
    for group, rounded in zip(groups, round_inputs(inputs, policy, {}).reshape(-1, 32), strict=True):
        mantissa, power = math.frexp(float(group.abs().max()))  # the mantissa is in [0.5, 1)
        scale = 2.0 ** (power - 1 + (2 * mantissa >= 1.75) - exponent)
        low, high = number_range(number)
        assert torch.equal(rounded, round_to((group / scale).clamp(low, high), number) * scale)


def test_two_level_scales_are_e4m3_relative_to_the_stored_one(inputs: Tensor) -> None:
    policy = Activation(
        "dynamic", number="float4_e2m1", per="group", size=16, scale_dtype=torch.float8_e4m3fn, rounding="each"
    )
    inputs = inputs.to(torch.bfloat16)
    inputs[..., :16] = 0
    shared = torch.tensor([37.0])
    groups = inputs.reshape(-1, 16)
    first = (groups.abs().amax(-1, keepdim=True) / 6).float() * shared
    scale = first.to(torch.float8_e4m3fn).float() / shared
    expected = torch.where(scale == 0, 0, round_to((groups.float() / scale).clamp(-6, 6), "float4_e2m1") * scale)
    rounded = round_inputs(inputs, policy, {"input_global_scale": shared})
    assert torch.equal(rounded.reshape(-1, 16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["once", "each"])
def test_a_row_of_zeros_stays_zero(symmetric: bool, dtype: torch.dtype, rounding: str) -> None:
    policy = Activation("dynamic", symmetric=symmetric, rounding=rounding)
    assert torch.equal(round_inputs(torch.zeros(2, 8, dtype=dtype), policy, {}), torch.zeros(2, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_static_policy_takes_the_stored_scale(inputs: Tensor, dtype: torch.dtype) -> None:
    policy = Activation("static", number="int8", per="tensor", symmetric=False)
    tensors = {"input_scale": torch.tensor([0.05]), "input_zero": torch.tensor([3], dtype=torch.int8)}
    wide = inputs.to(dtype).float()
    expected = (((wide / 0.05) + 3).round().clamp(-128, 127) - 3) * torch.tensor(0.05)
    assert torch.equal(round_inputs(inputs.to(dtype), policy, tensors), expected.to(dtype))


def test_a_linear_layer_multiplies_what_the_policy_leaves(inputs: Tensor) -> None:
    policy = Activation("static", number="int8", per="tensor", outputs=True)
    spec = QuantSpec(IntCode(8, signed=True), Scale(torch.float32), Grouping.per_channel(), activation=policy)
    tensors = {
        "codes": torch.randint(-128, 128, (8, 64), dtype=torch.int8),
        "scales": torch.rand(8, 1),
        "input_scale": torch.tensor([0.1]),
        "output_scale": torch.tensor([2.0]),
    }
    weight = dequantize(spec, tensors, (8, 64))
    rounded = (inputs / 0.1).round().clamp(-128, 127) * torch.tensor(0.1)
    expected = ((rounded @ weight.T) / 2).round().clamp(-128, 127) * 2
    assert torch.equal(linear(inputs, spec, tensors, (8, 64)), expected)
    plain = replace(spec, activation=Activation())
    assert torch.equal(linear(inputs, plain, tensors, (8, 64)), inputs @ weight.T)


def test_reciprocal_rounds_before_the_zero_point_is_added(inputs: Tensor) -> None:
    half = inputs.to(torch.bfloat16)
    policy = Activation("dynamic", number="int8", symmetric=False, rounding="each", reciprocal=True)
    least, most = half.amin(-1, keepdim=True).clamp(max=0), half.amax(-1, keepdim=True).clamp(min=0)
    scale = (most - least) / 255
    zero = (-128 - torch.round(least / scale)).clamp(-128, 127)
    codes = (torch.round(half * (1.0 / scale)) + zero).clamp(-128, 127)
    assert torch.equal(round_inputs(half, policy, {}), (codes - zero) * scale)
    divided = round_inputs(half, replace(policy, reciprocal=False), {})
    assert not torch.equal(divided, round_inputs(half, policy, {}))


def test_scales_may_be_made_in_the_dtype_of_the_inputs(inputs: Tensor) -> None:
    half = inputs.to(torch.bfloat16)
    policy = Activation("dynamic", number="int8", divisor=127.5, rounding="scale", reciprocal=True)
    scale = (half.abs().amax(-1, keepdim=True) / 127.5).float()
    codes = torch.round(half.float() * (1.0 / scale)).clamp(-128, 127)
    assert torch.equal(round_inputs(half, policy, {}), (codes * scale).to(torch.bfloat16))
