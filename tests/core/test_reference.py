"""The reference against the same arithmetic written one weight at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

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
    VectorCode,
    Zero,
    pack,
)
from lowbit.core.reference import int8_matmul, linear, quantize_rows

SHAPE = (6, 20)


def random_tensors(spec: QuantSpec, shape: tuple[int, int] = SHAPE) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (size, dtype) in spec.tensors(shape).items():
        if name == "group_index":
            groups = spec.grouping.counts(shape)[-1]
            tensors[name] = torch.randint(0, groups, size, dtype=torch.int32)
        elif dtype.is_floating_point:
            tensors[name] = (torch.rand(size) + 0.1).to(dtype)
        else:
            tensors[name] = torch.randint(0, 256, size).to(dtype)
    if isinstance(spec.code, FloatCode):
        return tensors
    codes = torch.randint(0, 1 << spec.bits, shape)
    packed = (
        codes.to(torch.uint8) if spec.bits == 8 else pack(codes.reshape(-1) if spec.grouping.flat else codes, spec.bits)
    )
    tensors["codes"] = packed.view(spec.codes_layout(shape)[1])
    return tensors


def one_at_a_time(spec: QuantSpec, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    result = torch.zeros(shape)
    for row, col in itertools.product(range(shape[0]), range(shape[1])):
        result[row, col] = _weight(spec, tensors, shape, row, col)
    return result


def _weight(spec: QuantSpec, tensors: dict[str, Tensor], shape: tuple[int, int], row: int, col: int) -> Tensor:
    index = row * shape[1] + col if spec.grouping.flat else col
    stream = tensors["codes"].reshape(-1) if spec.grouping.flat else tensors["codes"][row]
    code = _field(stream, index, spec.bits)
    group = _group(spec, tensors, shape, row, col)
    if isinstance(spec.code, FloatCode):
        value = tensors["codes"][row, col].float()
        return value * _level("scales", spec, tensors, group) if spec.scale.stored else value
    scale = _level("scales", spec, tensors, group)
    if isinstance(spec.code, TableCode):
        return tensors["table"][code] * scale
    if spec.code.signed and code >= 1 << spec.bits - 1:
        code -= 1 << spec.bits
    value = torch.tensor(float(code))
    if spec.zero is None:
        value = value * scale
    elif spec.zero.kind == "integer":
        value = (value - _field(tensors["zeros"][group[0]], group[1], spec.zero.bits)) * scale
    elif spec.zero.kind == "float":
        value = (value - _level("zeros", spec, tensors, group)) * scale
    else:
        value = value * scale + _level("zeros", spec, tensors, group)
    return value * spec.scale.multiplier if spec.scale.multiplier != 1 else value


def _field(stream: Tensor, index: int, bits: int) -> int:
    whole = int.from_bytes(bytes(stream.view(torch.uint8).tolist()), "little")
    return whole >> index * bits & (1 << bits) - 1


def _group(spec: QuantSpec, tensors: dict[str, Tensor], shape: tuple[int, int], row: int, col: int) -> tuple[int, ...]:
    grouping = spec.grouping
    if grouping.strided:
        return ((row * shape[1] + col) % grouping.counts(shape)[0],)
    if grouping.flat:
        return ((row * shape[1] + col) // grouping.cols,)
    if grouping.permuted:
        return row, int(tensors["group_index"][col])
    return row // (grouping.rows or shape[0]), col // (grouping.cols or shape[1])


def _level(name: str, spec: QuantSpec, tensors: dict[str, Tensor], group: tuple[int, ...]) -> Tensor:
    second = spec.scale.second if name == "scales" or spec.zero is None else spec.zero.second
    if second is None:
        return tensors[name][group].float()
    counts = spec.grouping.counts(SHAPE)
    position = int(torch.arange(math.prod(counts)).view(counts)[group])
    above = tensors[f"super_{name}"][position // second.size if second.size else 0].float()
    if second.kind == "integer":
        code = _field(tensors[name][group[:-1]], group[-1], second.bits)
        first = torch.tensor(float(code - (1 << second.bits if second.signed and code >= 1 << second.bits - 1 else 0)))
    else:
        stored = tensors[name][group]
        first = tensors[f"super_{name}_table"][int(stored)] if second.kind == "table" else stored.float()
    value = first / above if second.divides else first * above
    return value + tensors[f"super_{name}_offset"][0] if second.offset else value


GROUPINGS = [
    Grouping.per_tensor(),
    Grouping.per_channel(),
    Grouping.groups(8),
    Grouping.groups(7, permuted=True),
    Grouping(4, 6),
]
INTEGERS = [
    QuantSpec(IntCode(bits, signed), Scale(torch.float16), grouping, zero)
    for bits in range(1, 9)
    for signed in (False, True)
    for grouping in [*GROUPINGS, Grouping.flat_blocks(9), Grouping.strided_groups(8)]
    for zero in (None, Zero("float"), Zero("additive"), *(() if grouping.linear else (Zero("integer", bits),)))
]
TABLES = [
    QuantSpec(TableCode("nf4"), Scale(torch.float32, second=second), Grouping.flat_blocks(8))
    for second in (
        None,
        SecondLevel("table", 4, offset=True),
        SecondLevel("integer", 0, bits=6),
        SecondLevel("integer", 4, bits=6, signed=True),
        SecondLevel("integer", 4, bits=8, signed=True),
        SecondLevel("float8", 0),
        SecondLevel("float8", 0, divides=True),
    )
]
FLOATS = [
    QuantSpec(FloatCode(dtype), scale, grouping)
    for dtype, scale in (
        (torch.float8_e4m3fn, Scale(torch.float32)),
        (torch.float8_e5m2, Scale(torch.bfloat16)),
        (torch.float8_e4m3fn, Scale(torch.float8_e8m0fnu)),
        (torch.bfloat16, Scale(torch.float32, stored=False)),
    )
    for grouping in GROUPINGS
]
TWO_LEVELS = QuantSpec(
    IntCode(4),
    Scale(torch.float32, second=SecondLevel("integer", 8, torch.float16, bits=6)),
    Grouping.groups(4),
    Zero("additive", second=SecondLevel("integer", 8, torch.float16, bits=6)),
)


@pytest.mark.parametrize("spec", [*INTEGERS, *TABLES, *FLOATS, TWO_LEVELS], ids=str)
def test_dequantize_equals_the_formula(spec: QuantSpec) -> None:
    tensors = random_tensors(spec)
    tensor = QuantTensor(spec, tensors, SHAPE).validate()
    assert torch.equal(tensor.dequantize(torch.float32), one_at_a_time(spec, tensors, SHAPE))


@pytest.mark.parametrize("code", [VectorCode(1, 16, 1, 4), VectorCode(2, 8, 2, 4), VectorCode(3, 5, 1, 5)], ids=str)
def test_vectors_are_summed_and_scaled(code: VectorCode) -> None:
    spec = QuantSpec(code, Scale(torch.float32), Grouping(code.out_group, 0))
    layout = spec.tensors(SHAPE)
    indices = torch.randint(0, 1 << code.bits, layout["codes"][0])
    tensors = {
        "codes": indices.to(code.index_dtype),
        "codebooks": torch.randn(layout["codebooks"][0]),
        "scales": torch.rand(layout["scales"][0]),
    }
    dense = QuantTensor(spec, tensors, SHAPE).validate().dequantize(torch.float32)
    for row, col in itertools.product(range(SHAPE[0]), range(SHAPE[1])):
        (tile, line), (group, column) = divmod(row, code.out_group), divmod(col, code.in_group)
        picked = indices[tile, group].tolist()
        total = sum(tensors["codebooks"][number, index, line, column] for number, index in enumerate(picked))
        assert dense[row, col] == total * tensors["scales"][tile, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_once_and_at_each_step_differ_as_declared(dtype: torch.dtype) -> None:
    once = QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(4), Zero("float"), rounding="once")
    each = QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(4), Zero("float"), rounding="each")
    tensors = random_tensors(once)
    wide = one_at_a_time(once, tensors, SHAPE)
    assert torch.equal(QuantTensor(once, tensors, SHAPE).dequantize(dtype), wide.to(dtype))
    zeros = tensors["zeros"].to(dtype).repeat_interleave(4, dim=1)
    scales = tensors["scales"].to(dtype).repeat_interleave(4, dim=1)
    unscaled = QuantSpec(IntCode(4), Scale(torch.float32), Grouping.per_tensor())
    integers = one_at_a_time(unscaled, {"codes": tensors["codes"], "scales": torch.ones(1, 1)}, SHAPE).to(dtype)
    assert torch.equal(QuantTensor(each, tensors, SHAPE).dequantize(dtype), (integers - zeros) * scales)


def test_rows_are_quantized_by_what_is_not_an_outlier() -> None:
    inputs = torch.tensor([[1.0, -2.0, 8.0], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float16)
    codes, absmax, outliers = quantize_rows(inputs, 6.0)
    assert outliers.tolist() == [False, False, True]
    assert absmax.tolist() == [2.0, 0.5, 0.0]
    assert codes.tolist() == [[64, -127, 0], [127, 64, 0], [0, 0, 0]]


def test_int8_products_are_exact_at_any_length() -> None:
    left = torch.full((2, 5000), 127, dtype=torch.int8)
    right = torch.full((3, 5000), -127, dtype=torch.int8)
    assert (int8_matmul(left, right) == -127 * 127 * 5000).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_int8_linear_keeps_outlier_columns_in_sixteen_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64)
    absmax = weight.abs().amax(1, keepdim=True)
    spec = QuantSpec(
        IntCode(8, signed=True), Scale(torch.float32, 1 / 127), Grouping.per_channel(), None, Activation("int8", 6.0)
    )
    tensors = {"codes": (weight / absmax * 127).round().to(torch.int8), "scales": absmax}
    inputs = torch.randn(4, 64)
    inputs[:, 5] = 60
    bias = torch.randn(16)
    exact = inputs @ QuantTensor(spec, tensors, (16, 64)).dequantize().T + bias
    kept = linear(inputs.to(dtype), spec, tensors, (16, 64), bias.to(dtype)).float()
    crushed = linear(
        inputs.to(dtype), replace(spec, activation=Activation("int8", 0.0)), tensors, (16, 64), bias.to(dtype)
    )
    assert (kept - exact).abs().mean() < (crushed.float() - exact).abs().mean() / 5
