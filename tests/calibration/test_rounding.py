"""Learned weights: they start as the given bits, end as what was computed with, and have the formula's gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import RoundToNearest
from lowbit.calibration.rounding import LearnedWeight, can_learn
from lowbit.core import (
    Activation,
    FloatCode,
    Grouping,
    IntCode,
    QuantSpec,
    QuantTensor,
    Scale,
    SecondLevel,
    TableCode,
    Zero,
    pack,
    reference,
)
from lowbit.errors import PlanError

SHAPE = (12, 80)
ZEROS: dict[str, Any] = {
    "integer": lambda bits: Zero("integer", bits),
    "float": lambda bits: Zero("float", dtype=torch.float16),
    "float fp32": lambda bits: Zero("float", dtype=torch.float32),
    "additive": lambda bits: Zero("additive", dtype=torch.float16),
    "additive bf16": lambda bits: Zero("additive", dtype=torch.bfloat16),
    "signed": lambda bits: None,
}
GROUPINGS = {
    "groups": Grouping.groups(16),
    "short last group": Grouping.groups(32),
    "per channel": Grouping.per_channel(),
    "permuted": Grouping.groups(32, permuted=True),
}


def spec_of(
    bits: int, zero: str = "integer", grouping: str = "groups", dtype: torch.dtype = torch.float16, **scale: Any
) -> QuantSpec:
    return QuantSpec(IntCode(bits, zero == "signed"), Scale(dtype, **scale), GROUPINGS[grouping], ZEROS[zero](bits))


SPECS = [
    *(spec_of(bits, zero, grouping) for bits in (2, 3, 4, 8) for zero in ZEROS for grouping in GROUPINGS),
    *(spec_of(4, zero, "permuted", dtype) for zero in ZEROS for dtype in (torch.bfloat16, torch.float32)),
    *(spec_of(8, zero, "per channel", torch.float32, multiplier=1 / 127) for zero in ZEROS),
    *(spec_of(3, zero, "permuted", torch.float16, multiplier=0.3) for zero in ZEROS),
    spec_of(5),
    spec_of(1),
]


def dense_and_quantized(spec: QuantSpec, shape: tuple[int, int] = SHAPE) -> tuple[Tensor, QuantTensor]:
    weight = 0.1 * torch.randn(shape) + 0.02
    if not spec.grouping.permuted:
        return weight, RoundToNearest().quantize(weight, spec)
    order = torch.randperm(shape[1])
    plain = replace(spec, grouping=replace(spec.grouping, permuted=False))
    made = RoundToNearest().quantize(weight[:, order], plain)
    codes = torch.empty(shape, dtype=torch.int16)
    codes[:, order] = reference.decode_codes(plain, made.tensors, shape).to(torch.int16)
    index = torch.empty(shape[1], dtype=torch.int32)
    index[order] = torch.arange(shape[1], dtype=torch.int32) // spec.grouping.cols
    dtype = spec.tensors(shape)["codes"][1]
    stored = codes.to(dtype) if spec.bits == 8 else pack(codes, spec.bits)
    return weight, QuantTensor(spec, {**made.tensors, "codes": stored, "group_index": index}, shape).validate()


def shake(learned: LearnedWeight, much: float = 1.0) -> None:
    with torch.no_grad():
        learned.offset += much * torch.randn_like(learned.offset)
        learned.stretch += 0.3 * much * torch.randn_like(learned.stretch)
        if learned.zero is not None:
            spread = 1.0 if learned.spec.zero is not None and learned.spec.zero.kind != "additive" else 0.05
            learned.zero += spread * much * torch.randn_like(learned.zero)


def codes_of(tensor: QuantTensor) -> Tensor:
    return reference.decode_codes(tensor.spec, tensor.tensors, tensor.shape).float()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec}, {spec.scale.dtype}, {spec.scale.multiplier:.2g}")
def test_it_starts_as_the_given_bits_and_ends_as_what_was_computed_with(spec: QuantSpec) -> None:
    assert can_learn(spec)
    weight, tensor = dense_and_quantized(spec)
    learned = LearnedWeight(weight, tensor)
    assert learned.finish().equal(tensor)
    assert torch.equal(learned().detach(), tensor.dequantize())
    for _ in range(3):
        shake(learned)
        finished = learned.finish()
        assert finished.spec == spec and not finished.equal(tensor)
        assert torch.equal(learned().detach(), finished.dequantize())


@pytest.mark.parametrize("grouping", ["groups", "permuted"])
def test_what_is_computed_under_autocast_is_what_is_stored(grouping: str) -> None:
    weight, tensor = dense_and_quantized(spec_of(4, "float fp32", grouping, torch.float32))
    learned = LearnedWeight(weight, tensor)
    shake(learned)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learned().detach(), learned.finish().dequantize())


def test_it_starts_at_codes_that_are_not_the_nearest_ones() -> None:
    weight, tensor = dense_and_quantized(spec_of(4))
    moved = (codes_of(tensor) + torch.randint(-3, 4, SHAPE)).clamp(0, 15).to(torch.int16)
    other = QuantTensor(tensor.spec, {**tensor.tensors, "codes": pack(moved, 4)}, SHAPE)
    learned = LearnedWeight(weight, other)
    assert learned.finish().equal(other)


def test_what_activations_need_stays() -> None:
    spec = replace(spec_of(8, "signed", "per channel"), activation=Activation("static", scale_dtype=torch.float32))
    weight = torch.randn(SHAPE)
    plain = RoundToNearest().quantize(weight, replace(spec, activation=Activation()))
    tensor = QuantTensor(spec, {**plain.tensors, "input_scale": torch.tensor([0.25])}, SHAPE).validate()
    assert LearnedWeight(weight, tensor).finish().equal(tensor)


@pytest.mark.parametrize("learn_zero", [False, True])
def test_zero_points_stay_where_they_are_not_learned(learn_zero: bool) -> None:
    weight, tensor = dense_and_quantized(spec_of(4))
    learned = LearnedWeight(weight, tensor, learn_zero=learn_zero)
    assert ("zero" in dict(learned.named_parameters())) is learn_zero
    shake(learned, 3.0)
    assert torch.equal(learned.finish().tensors["zeros"], tensor.tensors["zeros"]) is not learn_zero


@pytest.mark.parametrize("zero", ["integer", "additive", "signed"])
def test_bounded_codes_stay_within_a_step(zero: str) -> None:
    weight, tensor = dense_and_quantized(spec_of(4, zero))
    learned = LearnedWeight(weight, tensor, bound=0.5)
    with torch.no_grad():
        learned.offset += 100 * torch.randn_like(learned.offset)
    distance = (codes_of(learned.finish()) - codes_of(tensor)).abs()
    assert distance.max() == 1
    # SignRound: half a step from the dense weight is as far as the neighbours that it lies between.
    assert (
        (learned.finish().dequantize() - weight).abs() <= (weight - tensor.dequantize()).abs() + 1.001 * steps(tensor)
    ).all()


def steps(tensor: QuantTensor) -> Tensor:
    return tensor.tensors["scales"].float().repeat_interleave(tensor.spec.grouping.cols, 1)[:, : tensor.shape[1]]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("grouping", ["groups", "short last group", "permuted"])
@pytest.mark.parametrize("zero", ["integer", "float fp32", "additive", "signed"])
def test_gradients_are_those_of_the_formula(zero: str, grouping: str, bits: int) -> None:
    """Straight-through: those of an unrounded code where it isn't cut off, those of a constant code where it is."""
    spec = spec_of(bits, zero, grouping, torch.float32)
    weight, tensor = dense_and_quantized(spec)
    learned = LearnedWeight(weight, tensor)
    with torch.no_grad():
        learned.offset += 1.5 * torch.randn_like(learned.offset)
    upstream = torch.randn(SHAPE)
    (learned() * upstream).sum().backward()

    spread = membership(tensor)
    scale = tensor.tensors["scales"] @ spread
    codes, latent = codes_of(learned.finish()), (learned.base + learned.offset).detach()
    free = (latent.round() >= learned.code.low) & (latent.round() <= learned.code.high)
    assert 0.02 < 1 - free.float().mean() < 0.7
    assert learned.offset.grad is not None and learned.stretch.grad is not None
    assert torch.equal(learned.offset.grad == 0, ~free)
    torch.testing.assert_close(learned.offset.grad, torch.where(free, upstream * scale, 0.0))
    zeros = torch.zeros(SHAPE) if zero in ("additive", "signed") else learned.first_zero @ spread
    by_stretch = scale * torch.where(free, codes - latent, codes - zeros) * upstream
    torch.testing.assert_close(learned.stretch.grad, by_stretch @ spread.t(), atol=1e-5, rtol=1e-4)
    if learned.zero is not None:
        cut = torch.ones(SHAPE) if zero == "additive" else -scale
        by_zero = torch.where(free, 0.0, cut * upstream)
        torch.testing.assert_close(learned.zero.grad, by_zero @ spread.t(), atol=1e-5, rtol=1e-4)


def membership(tensor: QuantTensor) -> Tensor:
    """``[groups, in]``, 1 where a column is in a group."""
    index = tensor.tensors.get("group_index", torch.arange(tensor.shape[1]) // tensor.spec.grouping.cols)
    return torch.nn.functional.one_hot(index.long()).float().t()


def test_numeric_gradients_of_what_is_not_rounded() -> None:
    """Of the scale, at a code that is cut off on either side: rounding then has no part in it."""
    weight, tensor = dense_and_quantized(spec_of(2, "integer", "per channel", torch.float32))
    learned = LearnedWeight(weight, tensor, learn_zero=False)
    with torch.no_grad():
        learned.offset += 50 * torch.randn(SHAPE).sign()
    learned().sum().backward()
    found = learned.stretch.grad
    with torch.no_grad():
        learned.stretch += 1e-3
        above = learned().sum(1, keepdim=True)
        learned.stretch -= 2e-3
        below = learned().sum(1, keepdim=True)
    torch.testing.assert_close(found, (above - below) / 2e-3, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("zero", ["integer", "float", "additive", "signed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_that_vanish_or_overflow_stay_usable(zero: str, dtype: torch.dtype) -> None:
    weight, tensor = dense_and_quantized(spec_of(4, zero, dtype=dtype))
    learned = LearnedWeight(weight, tensor)
    for exponent in (-200.0, 200.0):
        with torch.no_grad():
            learned.stretch.fill_(exponent).clamp_(-85, 85)
        finished = learned.finish()
        scales = finished.tensors["scales"].float()
        assert (scales > 0).all() and torch.isfinite(scales).all()
        assert torch.equal(learned().detach(), finished.dequantize())


def test_small_weights_keep_their_scales() -> None:
    """Steps of weights near 1e-4 are subnormal numbers of fp16."""
    weight = 1e-4 * torch.randn(SHAPE)
    tensor = RoundToNearest().quantize(weight, spec_of(8))
    assert tensor.tensors["scales"].max() < torch.finfo(torch.float16).smallest_normal
    assert LearnedWeight(weight, tensor).finish().equal(tensor)


def test_scales_of_zero_do_no_harm() -> None:
    weight, tensor = dense_and_quantized(spec_of(4))
    scales = tensor.tensors["scales"].clone()
    scales[0] = 0
    learned = LearnedWeight(weight, QuantTensor(tensor.spec, {**tensor.tensors, "scales": scales}, SHAPE))
    learned().square().sum().backward()
    finite = [learned.finish().dequantize(), *(parameter.grad for parameter in learned.parameters())]
    assert all(torch.isfinite(values).all() for values in finite)
    assert learned().detach()[0].abs().max() < 1e-6


def test_zero_points_far_away_do_not_blur_codes() -> None:
    """A group of nearly equal weights has a zero point of many thousand steps."""
    spec = spec_of(4, "float fp32", dtype=torch.float32)
    weight = 5.0 + 1e-5 * torch.randn(SHAPE)
    codes = torch.randint(0, 16, SHAPE, dtype=torch.int16)
    counts = spec.grouping.counts(SHAPE)
    tensors = {"codes": pack(codes, 4), "scales": torch.full(counts, 4e-7), "zeros": torch.full(counts, -1.25e7)}
    tensor = QuantTensor(spec, tensors, SHAPE).validate()
    assert LearnedWeight(weight, tensor).finish().equal(tensor)


def test_learning_finds_another_weight() -> None:
    """Some three steps away; what was cut off at the start doesn't come back, all else does."""
    spec = spec_of(4)
    target = torch.randn(SHAPE)
    tensor = RoundToNearest().quantize(target + 0.5 * torch.randn(SHAPE), spec)
    learned = LearnedWeight(target, tensor)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        (learned() - target).square().mean().backward()
        optimizer.step()
    before = (tensor.dequantize() - target).square().mean()
    after = (learned.finish().dequantize() - target).square().mean()
    assert after < 0.1 * before


REFUSED = [
    QuantSpec(TableCode("nf4"), Scale(torch.float32), Grouping.groups(16)),
    QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(torch.float32), Grouping.per_channel()),
    QuantSpec(IntCode(4), Scale(torch.float16), Grouping.flat_blocks(16), Zero("integer", 4)),
    QuantSpec(IntCode(4), Scale(torch.float16), Grouping.strided_groups(16), Zero("float")),
    QuantSpec(IntCode(8, signed=True), Scale(torch.float16), Grouping.per_tensor()),
    QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(16), Zero("float"), rounding="each"),
    QuantSpec(IntCode(4), Scale(torch.float32, second=SecondLevel("integer", 8, bits=6)), Grouping.groups(16)),
]


@pytest.mark.parametrize("spec", REFUSED, ids=str)
def test_other_specs_are_refused(spec: QuantSpec) -> None:
    assert not can_learn(spec)
    layout = spec.tensors(SHAPE)
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in layout.items()}
    with pytest.raises(PlanError, match="can't be learned; integers with groups along rows can"):
        LearnedWeight(torch.randn(SHAPE), QuantTensor(spec, tensors, SHAPE))
