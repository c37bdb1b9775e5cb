"""quanto's wire: every bit there and back, what is no quanto, and the settings of conversion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit.algorithms import RoundToNearest, integer_spec, quantize, table_spec
from lowbit.algorithms.quanto import WeightRange
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero
from lowbit.core.respell import respell
from lowbit.errors import FormatError, PlanError
from lowbit.wire import find_wire
from lowbit.wire.quanto import QuantoSettings, QuantoWire, group_size

WIRE = QuantoWire()
TYPES = ("qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e5m2")
SHAPES = [(24, 256), (24, 192), (24, 448), (24, 160), (24, 96), (7, 144), (3, 30), (1, 64)]
CASES = [(QuantoSettings(name), shape) for name in TYPES for shape in SHAPES]
ROUNDED = QuantoSettings("qint8", "qint8"), (24, 96)


def weight(settings: QuantoSettings, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> QuantTensor:
    plain = replace(settings, activations="none")
    tensor = WeightRange().quantize(torch.randn(shape), WIRE.spec_for(plain, shape, dtype))
    spec = replace(tensor.spec, activation=WIRE.spec(replace(settings, dtype=dtype)).activation)
    scales = {name: torch.rand(size).to(dtype) for name, (size, dtype) in spec.activation.tensors().items()}
    return QuantTensor(spec, {**tensor.tensors, **scales}, shape).validate()


@pytest.mark.parametrize(("settings", "shape"), [*CASES, ROUNDED], ids=str)
def test_what_was_written_is_read_back(settings: QuantoSettings, shape: tuple[int, int]) -> None:
    tensor = weight(settings, shape)
    written = WIRE.write(settings, tensor)
    assert WIRE.read(replace(settings, shapes={"": shape}), written).equal(tensor)
    layout = WIRE.expected(settings, tensor.spec, shape)
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == layout
    assert set(written) <= set(WIRE.suffixes)


@pytest.mark.parametrize(
    "settings",
    [
        *(QuantoSettings(name) for name in TYPES),
        QuantoSettings("qint4", "qfloat8_e5m2", skip=("lm_head",)),
        QuantoSettings("qint4", skip=("a",), by_module=(("a", ("qint4", "none")), ("b", ("qint8", "qint8")))),
    ],
    ids=str,
)
def test_the_config_is_understood_again(settings: QuantoSettings) -> None:
    config = WIRE.config(settings)
    assert find_wire(config).name == "quanto"
    assert WIRE.parse(config) == settings


@pytest.mark.parametrize("name", ["qint4", "qint8"])
def test_a_missing_or_truncated_tensor_is_refused(name: str) -> None:
    settings, shape = QuantoSettings(name, "qint8", shapes={"": (24, 96)}), (24, 96)
    written = WIRE.write(settings, weight(settings, shape))
    for key, tensor in written.items():
        with pytest.raises(FormatError, match=key.replace(".", r"\.")):
            WIRE.read(settings, {other: value for other, value in written.items() if other != key})
        if tensor.dim():
            with pytest.raises(FormatError, match="wrong shape"):
                WIRE.read(settings, {**written, key: tensor[:-1]})


def test_the_rule_for_groups() -> None:
    sizes = {256: 128, 192: 96, 448: 64, 160: 32, 128: None, 96: None, 144: None, 4096: 128}
    assert {columns: group_size("qint4", columns) for columns in sizes} == sizes
    assert group_size("qint8", 4096) is None


def test_shapes_that_nobody_knows() -> None:
    """Rows that can't be groups say how long they are; groups of 64 are rows of 64, or of 320."""
    settings = QuantoSettings("qint4")
    for shape in ((7, 144), (3, 30)):
        assert WIRE.read(settings, WIRE.write(settings, weight(settings, shape))).shape == shape
    with pytest.raises(FormatError, match="how long the rows"):
        WIRE.read(settings, WIRE.write(settings, weight(settings, (24, 64))))


def test_shapes_by_module() -> None:
    settings = WIRE.with_shapes(QuantoSettings("qint4"), {"a": (24, 320), "b": (24, 256)})
    written = WIRE.write(settings, weight(settings, (24, 320)))
    assert WIRE.read(WIRE.of(settings, "a"), written).shape == (24, 320)
    with pytest.raises(FormatError, match="wrong shape"):
        WIRE.read(WIRE.of(settings, "b"), written)
    with pytest.raises(FormatError, match="how long the rows"):
        WIRE.read(WIRE.of(settings, "c"), written)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_whole_zero_points_are_shifts_in_integers(bits: int) -> None:
    tensor = RoundToNearest().quantize(torch.randn(24, 320), integer_spec(bits, 64))
    settings = replace(WIRE.settings_for(tensor.spec), shapes={"": (24, 320)})
    spelled = respell(tensor, WIRE.spelling(settings, tensor.spec))
    written = WIRE.write(settings, spelled)
    assert written["weight._shift"].dtype == torch.uint8
    read = WIRE.read(settings, written)
    assert torch.equal(read.dequantize(torch.float16), tensor.dequantize(torch.float16))
    assert respell(read, tensor.spec).equal(tensor)


def test_whole_zero_points_for_its_kernel_are_refused() -> None:
    spec = integer_spec(4, 128, scale_dtype=torch.bfloat16)
    assert "real zero points" in str(WIRE.refusal(QuantoSettings("qint4"), spec, (32, 256)))
    assert WIRE.refusal(QuantoSettings("qint4"), integer_spec(4, 128), (32, 256)) is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (integer_spec(4, 64), "groups of 128 in rows of 256"),
        (integer_spec(3, 128), "quanto has qint2"),
        (integer_spec(4, 128, permuted=True), "not groups of 128, permuted"),
        (table_spec("nf4"), "quanto has qint2"),
        (QuantSpec(IntCode(8, signed=True), Scale(torch.float32), Grouping.per_channel()), "quanto holds"),
        (QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(128), Zero("float")), "quanto holds"),
    ],
    ids=str,
)
def test_other_specs_are_refused(spec: QuantSpec, reason: str) -> None:
    assert reason in str(WIRE.refusal(QuantoSettings("qint4"), spec, (32, 256)))


@pytest.mark.parametrize("spec", [table_spec("nf4"), integer_spec(8, -1)], ids=str)
def test_what_has_no_counterpart_is_not_converted(spec: QuantSpec) -> None:
    with pytest.raises(FormatError, match="nothing of the kind"):
        WIRE.settings_for(spec)


def test_modules_of_different_types_are_joined_in_a_map() -> None:
    own = {"a": QuantoSettings("qint4"), "b": QuantoSettings("qint8")}
    joined = WIRE.join(own, ["lm_head"])
    assert {name: WIRE.of(joined, name).weights for name in own} == {"a": "qint4", "b": "qint8"}
    assert WIRE.config(joined)["qmap"]["a"] == {"weights": "qint4", "activations": "none"}
    assert WIRE.join({"a": own["a"], "b": own["a"]}, ["lm_head"]) == replace(own["a"], skip=("lm_head",))


def test_the_map_that_is_written_beside() -> None:
    weights: dict[str, Any] = {
        "a": (weight(*ROUNDED).spec, (24, 96)),
        "b": (weight(QuantoSettings("qint2"), (24, 96)).spec, (24, 96)),
    }
    assert WIRE.side_files(QuantoSettings(), weights) == {
        "quanto_qmap.json": {
            "a": {"weights": "qint8", "activations": "qint8"},
            "b": {"weights": "qint2", "activations": "none"},
        }
    }


@pytest.mark.parametrize("name", TYPES)
def test_groups_of_one_value(name: str) -> None:
    """quanto divides by their scale of 0; the numbers are still the right ones."""
    dense = torch.zeros(4, 160)
    dense[1] = 0.5
    tensor = WeightRange().quantize(dense, WIRE.spec_for(QuantoSettings(name), (4, 160), torch.float32))
    assert torch.allclose(tensor.dequantize(), dense, atol=0, rtol=2**-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", TYPES)
def test_ranges_of_what_is_no_number_are_refused(name: str, bad: float) -> None:
    dense = torch.randn(8, 160)
    dense[3, 3] = bad
    with pytest.raises(PlanError, match="NaN or infinite"):
        WeightRange().quantize(dense, WIRE.spec_for(QuantoSettings(name), (8, 160), torch.float32))


def test_ranges_that_the_dtype_does_not_hold_are_refused() -> None:
    dense = torch.tensor([[-60000.0, 60000.0] * 80] * 4)
    with pytest.raises(PlanError, match="more than"):
        WeightRange().quantize(dense, WIRE.spec_for(QuantoSettings("qint4"), (4, 160), torch.float16))


def test_a_converted_weight_may_have_rounded_activations() -> None:
    tensor = weight(*ROUNDED)
    settings = WIRE.settings_for(tensor.spec)
    assert WIRE.spelling(settings, tensor.spec) == tensor.spec
    other = replace(tensor.spec, activation=replace(tensor.spec.activation, outputs=False))
    with pytest.raises(FormatError, match="inputs and outputs"):
        WIRE.settings_for(other)


def test_quantize_takes_any_of_its_specs() -> None:
    for name in ("qint2", "qint4", "qint8"):
        spec = WIRE.spec_for(QuantoSettings(name), (24, 160), torch.float32)
        assert quantize(torch.randn(24, 160), spec).spec == spec
