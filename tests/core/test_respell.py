"""Changes of spelling: every bit of every weight, there and back, or a reason."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    int8_spec,
    integer_spec,
    pack,
    table_spec,
)
from lowbit.core.respell import conditions, respell, simplest, whole_zeros, why_not, without_zeros
from lowbit.errors import SpecError

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SHAPES = [(4, 64), (3, 96), (6, 40), (1, 32)]
GROUPINGS = [
    Grouping.per_channel(),
    Grouping.groups(8),
    Grouping.groups(32),
    Grouping.flat_blocks(32),
    Grouping.per_tensor(),
    Grouping(2, 16),
    Grouping.groups(16, permuted=True),
]


def numbers(spec: QuantSpec, shape: tuple[int, int], seed: int, zero: int | None = None) -> QuantTensor:
    """A random integer weight; with `zero`, all zero points are that."""
    random = torch.Generator().manual_seed(seed)
    assert isinstance(spec.code, IntCode)
    values = torch.randint(spec.code.low, spec.code.high + 1, shape, generator=random)
    tensors: dict[str, torch.Tensor] = {}
    for name, (size, dtype) in spec.tensors(shape).items():
        if dtype.is_floating_point:
            tensors[name] = (torch.rand(size, generator=random) * 0.1 + 1e-3).to(dtype)
    packed = values.reshape(-1) if spec.grouping.flat else values
    tensors["codes"] = pack(packed, spec.bits) if spec.bits < 8 else values.to(spec.codes_layout(shape)[1])
    counts = spec.grouping.counts(shape)
    if spec.zero is not None and spec.zero.kind != "additive":
        zeros = torch.randint(0, 1 << spec.bits, counts, generator=random)
        zeros = zeros if zero is None else torch.full_like(zeros, zero)
        tensors["zeros"] = pack(zeros, spec.zero.bits) if spec.zero.kind == "integer" else zeros.to(spec.zero.dtype)
    if spec.grouping.permuted:
        index = torch.arange(shape[1]) // spec.grouping.cols
        tensors["group_index"] = index[torch.randperm(shape[1], generator=random)].to(torch.int32)
    return QuantTensor(spec, tensors, shape).validate()


def assert_same_weight(left: QuantTensor, right: QuantTensor) -> None:
    assert left.shape == right.shape
    for dtype in {torch.float32, left.spec.dtype, right.spec.dtype}:
        if left.spec.rounding == right.spec.rounding == "once" or dtype in (torch.float32, left.spec.dtype):
            assert torch.equal(left.dequantize(dtype), right.dequantize(dtype))


def integers(bits: int, grouping: Grouping, zero: str | None, **more: Any) -> QuantSpec:
    dtype = more.pop("dtype", HALF)
    kinds = {
        "integer": Zero("integer", bits),
        "float": Zero("float", dtype=dtype),
        "additive": Zero("additive", dtype=dtype),
        None: None,
    }
    signed = more.pop("signed", zero is None)
    return QuantSpec(IntCode(bits, signed), Scale(dtype), grouping, kinds[zero], dtype=dtype, **more)


@given(
    st.integers(1, 8),
    st.sampled_from(GROUPINGS),
    st.sampled_from(SHAPES),
    st.sampled_from([HALF, BRAIN, SINGLE]),
    st.integers(0, 5),
)
def test_whole_zero_points_are_integers_or_floats(
    bits: int, grouping: Grouping, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    before = numbers(integers(bits, grouping, "integer", dtype=dtype), shape, seed)
    for rounding in ("once", "each"):
        after = respell(before, integers(bits, grouping, "float", dtype=dtype, rounding=rounding))
        assert_same_weight(before, after)
        assert respell(after, before.spec).equal(before)


@given(st.integers(1, 8), st.sampled_from(GROUPINGS), st.sampled_from(SHAPES), st.integers(0, 5))
def test_the_middle_as_zero_point_is_none_at_all(
    bits: int, grouping: Grouping, shape: tuple[int, int], seed: int
) -> None:
    before = numbers(integers(bits, grouping, "integer"), shape, seed, zero=1 << bits - 1)
    signed = integers(bits, grouping, None)
    assert simplest(before) == signed
    after = respell(before, signed)
    assert_same_weight(before, after)
    assert respell(after, before.spec).equal(before)
    other = integers(bits, grouping, "float", rounding="each")
    assert simplest(respell(before, other)) == signed
    assert respell(respell(before, other), signed).equal(after)


@given(st.integers(1, 8), st.integers(0, 7), st.sampled_from([None, "integer", "float"]), st.integers(0, 5))
def test_codes_widen_and_narrow(bits: int, more: int, zero: str | None, seed: int) -> None:
    wide = min(8, bits + more)
    before = numbers(integers(bits, Grouping.groups(16), zero), (3, 48), seed)
    after = respell(before, integers(wide, Grouping.groups(16), zero))
    assert_same_weight(before, after)
    assert respell(after, before.spec).equal(before)


@given(st.integers(2, 7), st.integers(0, 5))
def test_a_wider_code_takes_up_the_zero_points(bits: int, seed: int) -> None:
    before = numbers(integers(bits, Grouping.groups(16), "integer"), (3, 48), seed)
    after = respell(before, integers(8, Grouping.groups(16), None))
    assert_same_weight(before, after)


@given(st.sampled_from(GROUPINGS[:6]), st.sampled_from(GROUPINGS[:6]), st.sampled_from(SHAPES), st.integers(0, 3))
def test_groups_are_split_and_merged_again(coarse: Grouping, fine: Grouping, shape: tuple[int, int], seed: int) -> None:
    before, target = numbers(integers(4, coarse, "integer"), shape, seed), integers(4, fine, "integer")
    if why_not(before.spec, target) or (conditions(before.spec, target) and shape[1] % 32):
        with contextlib.suppress(SpecError):  # what says so beforehand may be right by chance
            assert_same_weight(before, respell(before, target))
        return
    after = respell(before, target)
    assert_same_weight(before, after)
    assert respell(after, before.spec).equal(before)


def test_groups_that_differ_are_not_merged() -> None:
    before = numbers(integers(4, Grouping.groups(8), "integer"), (4, 64), 0)
    for target in (Grouping.groups(16), Grouping.per_channel(), Grouping.per_tensor(), Grouping.strided_groups(8)):
        with pytest.raises(SpecError, match="would share scales that differ"):
            respell(before, replace(before.spec, grouping=target))


def test_blocks_that_straddle_rows_are_no_groups() -> None:
    before = numbers(integers(4, Grouping.flat_blocks(32), None), (4, 40), 0)
    target = integers(4, Grouping.groups(32), None)
    assert why_not(before.spec, target) is None
    assert conditions(before.spec, target) == ("rows are a multiple of 32 weights",)
    with pytest.raises(SpecError, match="would share"):
        respell(before, target)


def test_strided_groups_stay_among_themselves() -> None:
    spec = integers(4, Grouping.strided_groups(8), "integer")
    before = numbers(spec, (4, 64), 0)
    after = respell(before, replace(spec, zero=Zero("float", dtype=HALF)))
    assert_same_weight(before, after)
    assert why_not(spec, replace(spec, grouping=Grouping.groups(8)))


@given(st.sampled_from([HALF, BRAIN, SINGLE]), st.sampled_from([HALF, BRAIN, SINGLE]), st.integers(0, 5))
def test_scales_change_their_dtype_where_they_are_numbers_of_it(
    before: torch.dtype, after: torch.dtype, seed: int
) -> None:
    tensor = numbers(integers(4, Grouping.groups(8), None, dtype=before), (4, 64), seed)
    target = integers(4, Grouping.groups(8), None, dtype=after)
    exact = torch.equal(tensor.tensors["scales"].to(after).double(), tensor.tensors["scales"].double())
    if not exact:
        assert conditions(tensor.spec, target) == (f"{str(after).removeprefix('torch.')} holds the scales",)
        with pytest.raises(SpecError, match=r"the scale .* is no "):
            respell(tensor, target)
        return
    assert_same_weight(tensor, respell(tensor, target))
    assert respell(respell(tensor, target), tensor.spec).equal(tensor)


@pytest.mark.parametrize("scale", [1e-8, 7e4, float("nan")])
def test_scales_past_the_range(scale: float) -> None:
    tensor = numbers(integers(4, Grouping.per_channel(), None, dtype=BRAIN), (2, 32), 0)
    tensor.tensors["scales"].fill_(scale)  # type: ignore[index]
    target = integers(4, Grouping.per_channel(), None, dtype=HALF)
    if scale == scale:
        with pytest.raises(SpecError, match="float16"):
            respell(tensor, target)
    else:
        assert bool(respell(tensor, target).dequantize().isnan().any())


def test_a_middle_times_the_scale_is_an_additive_zero_point() -> None:
    before = numbers(integers(4, Grouping.groups(32), "integer"), (4, 64), 0, zero=8)
    additive = replace(before.spec, zero=Zero("additive", dtype=HALF))
    after = respell(before, additive)
    assert_same_weight(before, after)
    assert torch.equal(after.tensors["zeros"], -8 * before.tensors["scales"])
    assert respell(after, before.spec).equal(before)
    assert respell(after, integers(4, Grouping.groups(32), None)).spec.zero is None
    moved = respell(after, replace(additive, code=IntCode(4, signed=True)))
    assert not bool(moved.tensors["zeros"].any())
    assert respell(moved, additive).equal(after)


def test_products_that_no_dtype_holds_are_refused() -> None:
    before = numbers(integers(4, Grouping.groups(32), "integer"), (4, 64), 0, zero=7)
    with pytest.raises(SpecError, match="product of scale and zero point"):
        respell(before, replace(before.spec, zero=Zero("additive", dtype=HALF)))
    single = replace(before.spec, zero=Zero("additive", dtype=SINGLE))
    assert_same_weight(before, respell(before, single))
    assert respell(respell(before, single), before.spec).equal(before)


def test_fractions_are_no_integers() -> None:
    before = numbers(integers(4, Grouping.groups(32), "float"), (4, 64), 0)
    before.tensors["zeros"][1] += 0.5
    for target in ("integer", None):
        with pytest.raises(SpecError, match=r"is no whole number \(2 such\)"):
            respell(before, integers(4, Grouping.groups(32), target))
    before.tensors["zeros"].uniform_()
    with pytest.raises(SpecError, match="rounds differently in float16"):
        respell(before, replace(before.spec, rounding="each"))


def test_zero_points_outside_of_the_range() -> None:
    before = numbers(integers(4, Grouping.groups(32), "float"), (4, 64), 0)
    before.tensors["zeros"][0, 0] = -1
    with pytest.raises(SpecError, match="its zero points don't fit 4 bits"):
        respell(before, integers(4, Grouping.groups(32), "integer"))
    with pytest.raises(SpecError, match="without zero points its codes run from"):
        respell(
            numbers(integers(4, Grouping.groups(32), "integer"), (4, 64), 0), integers(4, Grouping.groups(32), None)
        )


def test_codes_that_do_not_fit() -> None:
    before = numbers(integers(8, Grouping.per_channel(), None), (4, 64), 0)
    with pytest.raises(SpecError, match=r"codes run from -\d+ to \d+"):
        respell(before, integers(4, Grouping.per_channel(), None))
    with pytest.raises(SpecError, match=r"codes run from -\d+ to \d+, which don't fit uint4"):
        respell(before, integers(4, Grouping.per_channel(), "integer"))


@given(st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 3))
def test_additive_zero_points_move_with_the_codes_where_they_can(bits: int, one: bool, two: bool, seed: int) -> None:
    before = numbers(integers(bits, Grouping.groups(32), "additive", signed=one), (4, 64), seed)
    target = integers(bits, Grouping.groups(32), "additive", signed=two)
    moved = "float16 holds the zero points"
    assert conditions(before.spec, target) == ((moved,) if one != two else ())
    with contextlib.suppress(SpecError):
        assert_same_weight(before, respell(before, target))


def test_whole_zero_points_are_recognised() -> None:
    whole = numbers(integers(4, Grouping.groups(32), "float", rounding="each"), (4, 64), 0)
    assert simplest(whole) == whole_zeros(whole.spec) == integers(4, Grouping.groups(32), "integer")
    assert_same_weight(whole, respell(whole, simplest(whole)))
    whole.tensors["zeros"][0] += 0.5
    assert simplest(whole) == whole.spec
    whole.tensors["zeros"][0] = 16
    assert simplest(whole) == whole.spec
    rough = replace(whole.spec, scale=Scale(SINGLE))
    assert whole_zeros(rough) == without_zeros(rough) == rough
    table = table_spec("nf4")
    assert whole_zeros(table) == without_zeros(table) == table


def test_a_permutation_is_kept() -> None:
    spec = integer_spec(4, 16, permuted=True)
    before = numbers(spec, (4, 64), 0)
    after = respell(before, replace(spec, zero=Zero("float", dtype=HALF), rounding="each"))
    assert torch.equal(after.tensors["group_index"], before.tensors["group_index"])
    plain = integer_spec(4, 16)
    assert why_not(spec, plain) == "its groups are not of neighbouring columns"
    assert_same_weight(numbers(plain, (4, 64), 0), respell(numbers(plain, (4, 64), 0), spec))


def test_two_level_scales_are_decoded_or_kept() -> None:
    nested = table_spec("nf4", nested=True)
    plain = table_spec("nf4")
    from lowbit.algorithms import quantize

    before = quantize(torch.randn(64, 256), nested)
    after = respell(before, plain)
    assert_same_weight(before, after)
    assert why_not(plain, nested) == "its scales are not in two levels as they have to be"
    with pytest.raises(SpecError, match="two levels"):
        respell(after, nested)
    half = respell(before, replace(nested, dtype=HALF))
    assert half.spec.dtype == HALF
    rows = respell(before, replace(plain, grouping=Grouping.groups(64)))
    assert_same_weight(before, rows)
    assert respell(rows, plain).equal(after)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (table_spec("nf4"), table_spec("fp4"), "the codes are nf4, not fp4"),
        (table_spec("nf4"), integer_spec(4, 64), "the codes are nf4, not uint4"),
        (integer_spec(8, -1), int8_spec(), "a constant is multiplied with"),
        (
            replace(int8_spec(), scale=Scale(SINGLE)),
            replace(int8_spec(), scale=Scale(SINGLE), activation=Activation()),
            "it has int8 activations, outliers from 6, and there activations stay as they are",
        ),
        (
            QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(SINGLE), Grouping.per_channel()),
            QuantSpec(FloatCode(torch.float8_e5m2), Scale(SINGLE), Grouping.per_channel()),
            "the codes are float8_e4m3fn, not float8_e5m2",
        ),
        (integer_spec(4, 32), integer_spec(4, 128), "'groups of 128' are coarser than 'groups of 32'"),
        (integer_spec(4, 32), integer_spec(4, -1), "coarser"),
        (
            QuantSpec(VectorCode(1, 8, 1, 8), Scale(HALF), Grouping(1, 0)),
            QuantSpec(VectorCode(2, 8, 1, 8), Scale(HALF), Grouping(1, 0)),
            "the codes are",
        ),
        (
            QuantSpec(IntCode(4), Scale(HALF), Grouping.groups(32), Zero("additive"), rounding="each"),
            QuantSpec(IntCode(4), Scale(HALF), Grouping.groups(32), Zero("additive")),
            "every operation is rounded in one",
        ),
        (
            QuantSpec(IntCode(4), Scale(SINGLE, second=SecondLevel("integer", 8)), Grouping.groups(32)),
            QuantSpec(IntCode(5), Scale(SINGLE, second=SecondLevel("integer", 8)), Grouping.groups(32)),
            "two-level scales are kept only as they are",
        ),
    ],
)
def test_reasons(source: QuantSpec, target: QuantSpec, reason: str) -> None:
    assert reason in (why_not(source, target) or "")


@given(st.data())
def test_where_nothing_is_said_against_it_it_works(data: st.DataObject) -> None:
    spec = st.builds(
        integers,
        st.integers(1, 8),
        st.sampled_from([*GROUPINGS, Grouping.strided_groups(8)]),
        st.sampled_from([None, "integer", "float", "additive"]),
        dtype=st.sampled_from([HALF, BRAIN, SINGLE]),
        rounding=st.sampled_from(["once", "each"]),
    )
    source, target = data.draw(spec), data.draw(spec)
    before = numbers(source, (4, 64), 0)
    if why_not(source, target) is None and not conditions(source, target):
        assert_same_weight(before, respell(before, target))


def test_floats_and_tables_change_only_around_the_codes() -> None:
    spec = QuantSpec(FloatCode(torch.float8_e4m3fn), Scale(BRAIN), Grouping.per_channel(), dtype=BRAIN)
    codes = torch.randn(4, 64).to(torch.float8_e4m3fn)
    before = QuantTensor(spec, {"codes": codes, "scales": torch.rand(4, 1).to(BRAIN)}, (4, 64)).validate()
    target = replace(spec, scale=Scale(SINGLE), grouping=Grouping.groups(32), dtype=HALF)
    after = respell(before, target)
    assert_same_weight(before, after)
    assert respell(after, spec).equal(before)
    table = QuantSpec(TableCode("e2m1"), Scale(torch.float8_e8m0fnu), Grouping.groups(32))
    tensors = {
        "codes": torch.randint(0, 256, (4, 32), dtype=torch.uint8),
        "table": torch.randn(16),
        "scales": torch.full((4, 2), 0.25).to(torch.float8_e8m0fnu),
    }
    powers = QuantTensor(table, tensors, (4, 64)).validate()
    assert_same_weight(powers, respell(powers, replace(table, scale=Scale(SINGLE))))
    bare = QuantSpec(FloatCode(HALF), Scale(HALF, stored=False), Grouping.per_tensor())
    half = QuantTensor(bare, {"codes": torch.randn(4, 64).to(HALF)}, (4, 64)).validate()
    assert_same_weight(half, respell(half, replace(bare, dtype=SINGLE)))
