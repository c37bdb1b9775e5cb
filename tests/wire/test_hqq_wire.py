"""HQQ's wire: every bit there and back, what is no HQQ, and the settings of conversion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit.algorithms import RoundToNearest, integer_spec, quantize, table_spec
from lowbit.algorithms.hqq import HalfQuadratic
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero
from lowbit.core.respell import respell
from lowbit.errors import FormatError, PlanError
from lowbit.wire import find_wire
from lowbit.wire.hqq.wire import HqqSettings, HqqWire, tag_of

WIRE = HqqWire()
CASES = [
    HqqSettings(bits, size, axis, round_zero=bits == 4)
    for bits in (8, 6, 5, 4, 3, 2, 1)
    for size in (32, None)
    for axis in (0, 1)
]
CASES += [HqqSettings(bits, 64, view_as_float=True, round_zero=bits == 4) for bits in (8, 4, 3, 2, 1)]
CASES += [HqqSettings(4, 72, axis) for axis in (0, 1)]
SHAPE = (48, 96)


def weight(settings: HqqSettings, dtype: torch.dtype = torch.bfloat16) -> QuantTensor:
    return HalfQuadratic().quantize(torch.randn(SHAPE), WIRE.spec_for(settings, SHAPE, dtype))


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_what_was_written_is_read_back(settings: HqqSettings) -> None:
    tensor = weight(settings)
    written = WIRE.write(settings, tensor)
    assert WIRE.read(settings, written).equal(tensor)
    layout = WIRE.expected(settings, tensor.spec, SHAPE)
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == layout
    assert set(written) <= set(WIRE.suffixes)


@pytest.mark.parametrize(
    "settings", [*CASES, HqqSettings(skip=("a", "b")), HqqSettings(by_tag=(("mlp.up_proj", HqqSettings(2)),))], ids=str
)
def test_the_config_is_understood_again(settings: HqqSettings) -> None:
    config = WIRE.config(settings)
    assert find_wire(config).name == "hqq"
    assert WIRE.parse(config) == settings


def test_a_missing_or_truncated_tensor_is_refused() -> None:
    written = WIRE.write(HqqSettings(), weight(HqqSettings()))
    for name in ("W_q", "scale", "zero", "shape", "nbits", "axis", "packing"):
        with pytest.raises(FormatError, match=name):
            WIRE.read(HqqSettings(), {key: value for key, value in written.items() if key != name})
    for name in ("W_q", "scale", "zero", "shape", "packing"):
        with pytest.raises(FormatError, match=name):
            WIRE.read(HqqSettings(), {**written, name: written[name][:-1]})


@pytest.mark.parametrize("size", [64, None])
def test_what_says_nothing_new_may_be_absent(size: int | None) -> None:
    """Older files lack most of it, and the group size of whole rows."""
    settings = HqqSettings(4, size)
    tensor = weight(settings, torch.float16)
    written = WIRE.write(settings, tensor)
    least = ("W_q", "scale", "zero", "shape", "nbits", "axis", "packing", *(["group_size"] if size else []))
    assert WIRE.read(settings, {name: written[name] for name in least}).equal(tensor)


@pytest.mark.parametrize(
    ("settings", "shape", "reason"),
    [
        (HqqSettings(4, 64), (3, 7), "don't divide"),
        (HqqSettings(4, 8), (1, 8), "don't fill words of 2"),
        (HqqSettings(1, 8), (4, 24), "don't fill words of 8"),
        (HqqSettings(8, 9, view_as_float=True), (8, 9), "don't fill whole"),
    ],
)
def test_what_the_format_cannot_hold(settings: HqqSettings, shape: tuple[int, int], reason: str) -> None:
    found = WIRE.refusal(settings, WIRE.spec_for(settings, shape, torch.bfloat16), shape)
    assert found is not None and reason in found


@pytest.mark.parametrize(
    "spec",
    [
        table_spec("nf4"),
        integer_spec(4, 32),
        QuantSpec(IntCode(7), Scale(torch.float16), Grouping.groups(32), Zero("float"), rounding="each"),
        QuantSpec(IntCode(4), Scale(torch.float16), Grouping(4, 4), Zero("float"), rounding="each"),
        QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(32, permuted=True), Zero("float"), rounding="each"),
    ],
    ids=str,
)
def test_other_specs_are_refused(spec: QuantSpec) -> None:
    assert WIRE.refusal(HqqSettings(), spec, (64, 128)) is not None


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("size", [32, -1])
def test_integers_of_other_formats_are_spelled(bits: int, size: int) -> None:
    tensor = RoundToNearest().quantize(torch.randn(48, 96), integer_spec(bits, size))
    settings = WIRE.settings_for(tensor.spec)
    spelled = respell(tensor, WIRE.spelling(settings, tensor.spec))
    assert WIRE.refusal(settings, spelled.spec, spelled.shape) is None
    read = WIRE.read(settings, WIRE.write(settings, spelled))
    assert torch.equal(read.dequantize(torch.float16), tensor.dequantize(torch.float16))
    if bits != 7:
        assert respell(read, tensor.spec).equal(tensor)


def test_symmetric_integers_are_spelled() -> None:
    spec = QuantSpec(IntCode(4, signed=True), Scale(torch.bfloat16), Grouping.groups(32), dtype=torch.bfloat16)
    tensor = quantize(torch.randn(48, 96), spec)
    settings = WIRE.settings_for(spec)
    read = WIRE.read(settings, WIRE.write(settings, respell(tensor, WIRE.spelling(settings, spec))))
    assert respell(read, spec).equal(tensor)


def test_what_is_no_integer_is_not_converted() -> None:
    with pytest.raises(FormatError, match="integers of 1 to 8 bits"):
        WIRE.settings_for(table_spec("nf4"))
    with pytest.raises(FormatError, match="consecutive weights"):
        WIRE.settings_for(integer_spec(4, 32, permuted=True))


def test_modules_are_joined_by_tag() -> None:
    four, two = HqqSettings(4), HqqSettings(2, round_zero=False)
    joined = WIRE.join({"model.layers.0.mlp.up_proj": four, "model.layers.1.mlp.up_proj": four}, ["lm_head"])
    assert joined == four
    mixed = WIRE.join({"model.layers.0.mlp.up_proj": four, "model.layers.0.mlp.down_proj": two}, ["model.head"])
    assert mixed.skip == ("lm_head", "head")
    assert WIRE.of(mixed, "model.layers.7.mlp.down_proj") == replace(two, skip=("lm_head",))
    assert mixed.tagged("model.layers.7.mlp.gate_proj") is None
    with pytest.raises(FormatError, match="the same tag"):
        WIRE.join({"model.layers.0.mlp.up_proj": four, "model.layers.1.mlp.up_proj": two}, [])


def test_tags() -> None:
    assert tag_of("model.layers.31.self_attn.q_proj") == "self_attn.q_proj"
    assert tag_of("lm_head") == "lm_head"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_optimiser_refuses_what_is_no_number(bad: float) -> None:
    dense = torch.randn(SHAPE)
    dense[5, 7] = bad
    with pytest.raises(PlanError, match="NaN or infinite"):
        HalfQuadratic().quantize(dense, WIRE.spec_for(HqqSettings(), SHAPE, torch.float16))


def test_the_optimiser_refuses_what_its_dtype_does_not_hold() -> None:
    dense = torch.full(SHAPE, 60.0) + torch.rand(SHAPE) * 1e-3
    with pytest.raises(PlanError, match=r"more than torch\.float16 holds"):
        HalfQuadratic().quantize(dense, WIRE.spec_for(HqqSettings(8), SHAPE, torch.float16))


def test_the_optimiser_beats_rounding() -> None:
    dense = torch.randn(256, 256)
    dense[torch.rand(256, 256) < 0.01] *= 8
    for bits in (2, 3, 4):
        spec = WIRE.spec_for(HqqSettings(bits), (256, 256), torch.float32)
        errors: list[Any] = [
            (algorithm.quantize(dense, spec).dequantize() - dense).abs().mean()
            for algorithm in (HalfQuadratic(), RoundToNearest())
        ]
        assert errors[0] < errors[1]
