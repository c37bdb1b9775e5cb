from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.algorithms import RoundToNearest, find_algorithm, int8_spec, integer_spec, nested_map, quantize, table_spec
from lowbit.algorithms.rtn import from_groups, to_groups
from lowbit.core import Grouping, IntCode, QuantSpec, Scale, Zero
from lowbit.errors import PlanError

GROUPINGS = [
    Grouping.per_tensor(),
    Grouping.per_channel(),
    Grouping.groups(16),
    Grouping(8, 16),
    Grouping.flat_blocks(24),
    Grouping.strided_groups(24),
]


@given(st.sampled_from(GROUPINGS), st.integers(1, 20), st.integers(1, 40))
def test_groups_are_laid_out_and_back(grouping: Grouping, rows: int, cols: int) -> None:
    weight = torch.arange(1.0, rows * cols + 1).view(rows, cols)
    groups = to_groups(weight, grouping)
    assert groups.shape[:-1] == grouping.counts((rows, cols))
    assert torch.equal(from_groups(groups, grouping, (rows, cols)), weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("kind", ["integer", "float", "additive", None])
def test_every_integer_spec_is_within_half_a_step(
    bits: int, signed: bool, grouping: Grouping, kind: str | None
) -> None:
    if kind == "integer" and (signed or grouping.linear):
        pytest.skip("formats store integer zero points beside unsigned codes in rows")
    if kind is None and (bits == 1 or not signed):
        pytest.skip("without a zero point only signed codes of two bits and more reach both sides")
    spec = QuantSpec(
        IntCode(bits, signed), Scale(torch.float32), grouping, Zero(kind, bits, torch.float32) if kind else None
    )
    weight = torch.randn(24, 48)
    tensor = RoundToNearest().quantize(weight, spec)
    steps = from_groups(
        tensor.tensors["scales"].unsqueeze(-1).expand_as(to_groups(weight, grouping)), grouping, (24, 48)
    )
    # An integer zero point shifts the range by up to half a step, which costs another half at its ends.
    allowed = 0.5 if kind in ("float", "additive") else 1.0
    assert ((tensor.dequantize() - weight).abs() <= steps * allowed * (1 + 1e-5)).all()


def test_symmetric_uses_the_middle_and_reaches_both_ends() -> None:
    weight = torch.linspace(-1, 1, 64).repeat(32, 1)
    tensor = RoundToNearest(symmetric=True).quantize(weight, integer_spec(4, 32))
    from lowbit.core import reference, unpack

    assert (unpack(tensor.tensors["zeros"], 4, 2) == 8).all()
    codes = reference.decode_codes(tensor.spec, tensor.tensors, tensor.shape)
    assert codes.min() == 0 and codes.max() >= 15
    assert tensor.tensors["scales"][0, 0] == torch.tensor(1 / 7.5).half()


@pytest.mark.parametrize("spec", [integer_spec(4, 32), table_spec("nf4"), int8_spec()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(spec: QuantSpec, bad: float) -> None:
    weight = torch.randn(32, 64)
    weight[3, 5] = bad
    with pytest.raises(PlanError, match="NaN|infinite|fp16 can't hold"):
        quantize(weight, spec)


@pytest.mark.parametrize(
    "spec", [integer_spec(4, 32), table_spec("nf4"), table_spec("fp4", nested=True), int8_spec()], ids=str
)
def test_zeros_stay_zeros(spec: QuantSpec) -> None:
    assert (quantize(torch.zeros(32, 64), spec).dequantize() == 0).all()


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    with pytest.raises(PlanError, match="more than torch.float16 holds"):
        quantize(torch.full((32, 64), 3e6), integer_spec(4, 32))


def test_tiny_weights_get_the_smallest_scale() -> None:
    tensor = quantize(torch.full((32, 64), 1e-12), integer_spec(4, 32))
    assert (tensor.tensors["scales"] > 0).all()
    assert tensor.dequantize().abs().max() < 1e-7


def test_the_nested_map_is_symmetric_but_for_its_end() -> None:
    values = nested_map()
    assert len(values) == 256
    assert (values.diff() > 0).all()
    assert torch.equal(values[:127], -values[128:255].flip(0))
    assert values[127] == 0
    assert values[255] == 1


def test_no_algorithm_says_what_was_tried() -> None:
    permuted = QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(32, permuted=True), Zero("integer", 4))
    with pytest.raises(PlanError, match="tried table, int8, .*rtn"):
        find_algorithm(permuted)


def test_dense_model_specs_keep_their_dtype() -> None:
    assert (
        quantize(torch.randn(8, 64), table_spec("nf4", dtype=torch.float16)).dequantize(torch.float16).dtype
        is torch.float16
    )
