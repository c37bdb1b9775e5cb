"""torchao's wire: every class of tensors both ways, what configs mean, and what can't be written."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lowbit.algorithms import AffineIntegers, Int4Additive, ScaledFloat8
from lowbit.core import Activation, FloatCode, Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero
from lowbit.errors import FormatError
from lowbit.wire import find_wire
from lowbit.wire.torchao.config import PER_TOKEN, config_named, old_config
from lowbit.wire.torchao.wire import TorchAoSettings, TorchAoWire

WIRE = TorchAoWire()


def dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def group(size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
ASYMMETRIC = {"_type": "MappingType", "_data": "ASYMMETRIC"}
CONFIGS = {
    "int4": ("Int4WeightOnlyConfig", {"group_size": 32}),
    "int4-rows": ("Int4WeightOnlyConfig", {"group_size": 192}),
    "int8": ("Int8WeightOnlyConfig", {}),
    "int8-tensor": ("Int8WeightOnlyConfig", {"granularity": TENSOR}),
    "int8-groups": ("Int8WeightOnlyConfig", {"granularity": group(64)}),
    "int8-dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "int8-reduced": (
        "Int8DynamicActivationInt8WeightConfig",
        {"reduce_range": True, "granularity": [TENSOR, ROW], "act_mapping_type": ASYMMETRIC},
    ),
    "float8": ("Float8WeightOnlyConfig", {}),
    "float8-e5m2": ("Float8WeightOnlyConfig", {"weight_dtype": dtype("float8_e5m2"), "granularity": TENSOR}),
    "float8-groups": ("Float8WeightOnlyConfig", {"granularity": group(32)}),
    "float8-dynamic": ("Float8DynamicActivationFloat8WeightConfig", {"granularity": [ROW, ROW]}),
    "float8-tensor": ("Float8DynamicActivationFloat8WeightConfig", {"activation_value_ub": 3.0}),
    "float8-blocks": (
        "Float8DynamicActivationFloat8WeightConfig",
        {
            "granularity": [
                {"_type": "PerBlock", "_version": 1, "_data": {"block_size": [1, 64]}},
                {"_type": "PerBlock", "_version": 1, "_data": {"block_size": [32, 64]}},
            ]
        },
    ),
    "8da4w": ("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": dtype("int4")}),
    **{f"intx{bits}": ("IntxWeightOnlyConfig", {"weight_dtype": dtype(f"int{bits}")}) for bits in range(1, 9)},
    **{
        f"intx{bits}-asymmetric": (
            "IntxWeightOnlyConfig",
            {"weight_dtype": dtype(f"int{bits}"), "mapping_type": ASYMMETRIC, "granularity": group(48)},
        )
        for bits in range(1, 9)
    },
    "intx-scales": ("IntxWeightOnlyConfig", {"scale_dtype": dtype("float32"), "granularity": group(64)}),
}


def settings_of(name: str) -> TorchAoSettings:
    kind, fields = CONFIGS[name]
    return TorchAoSettings(config_named(kind, **fields))


def quantized(settings: TorchAoSettings, shape: tuple[int, int] = (64, 192)) -> QuantTensor:
    spec = WIRE.spec_for(settings, shape, torch.bfloat16)
    weight = torch.randn(shape).to(torch.bfloat16)
    if isinstance(spec.code, FloatCode):
        return ScaledFloat8(in_dtype=True).quantize(weight, spec)
    if spec.zero is not None and spec.zero.kind == "additive":
        return Int4Additive().quantize(weight, spec)
    return AffineIntegers("symmetric" if spec.zero is None else "asymmetric").quantize(weight, spec)


def headed(settings: TorchAoSettings, tensor: QuantTensor) -> TorchAoSettings:
    """The settings of a weight in a file that `metadata` wrote the header of."""
    metadata = WIRE.metadata(settings, {"layer": (tensor.spec, tensor.shape)}, ["norm.weight"])
    return WIRE.of(WIRE.bind(settings, metadata), "layer")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_written_is_read_back_with_and_without_a_header(name: str) -> None:
    settings = settings_of(name)
    tensor = quantized(settings)
    assert WIRE.refusal(settings, tensor.spec, tensor.shape) is None
    written = WIRE.write(settings, tensor)
    layout = WIRE.expected(settings, tensor.spec, tensor.shape)
    assert {part: (tuple(value.shape), value.dtype) for part, value in written.items()} == layout
    assert WIRE.read(settings, written).equal(tensor)
    bound = headed(settings, tensor)
    assert WIRE.read(bound, written).equal(tensor)
    again = WIRE.write(bound, WIRE.read(bound, written))
    assert all(torch.equal(again[part].view(torch.uint8), written[part].view(torch.uint8)) for part in written)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_understood_again(name: str) -> None:
    settings = settings_of(name)
    config = WIRE.config(settings)
    assert find_wire(config).name == "torchao"
    assert WIRE.parse(config) == settings


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_or_truncated_part_is_refused(name: str) -> None:
    settings = settings_of(name)
    tensor = quantized(settings)
    written = WIRE.write(settings, tensor)
    bound = headed(settings, tensor)
    for part, value in written.items():
        rest = {key: other for key, other in written.items() if key != part}
        if (part, bound.kind) != ("_weight_zero_point", "Int8Tensor"):  # optional there, and 0
            with pytest.raises(FormatError):
                WIRE.read(bound, rest)
        if value.shape[0] > 1:
            with pytest.raises(FormatError):
                WIRE.read(bound, {**written, part: value[:-1]})


@pytest.mark.parametrize("name", CONFIGS)
def test_another_format_finds_its_spelling(name: str) -> None:
    tensor = quantized(settings_of(name))
    if tensor.spec.grouping.cols == 0 and name.startswith("int4"):
        with pytest.raises(FormatError, match="in groups"):
            WIRE.settings_for(tensor.spec)
        return
    found = WIRE.settings_for(tensor.spec)
    assert WIRE.spelling(found, tensor.spec) == tensor.spec
    assert WIRE.read(found, WIRE.write(found, tensor)).equal(tensor)


def test_groups_that_are_whole_rows_are_one_group_per_row() -> None:
    assert quantized(settings_of("int4-rows")).spec.grouping == Grouping.per_channel()


def test_int8_may_have_no_zero_points_or_others_than_zero() -> None:
    settings = settings_of("int8")
    tensor = quantized(settings)
    written = WIRE.write(settings, tensor)
    assert not written["_weight_zero_point"].any()
    del written["_weight_zero_point"]
    assert WIRE.read(settings, written).equal(tensor)
    shifted = {**written, "_weight_zero_point": torch.full((64, 1), -3, dtype=torch.int8)}
    moved = WIRE.read(settings, shifted)
    assert moved.spec.zero == Zero("integer", 8)
    scale, codes = written["_weight_scale"], written["_weight_qdata"]
    assert torch.equal(moved.dequantize(), (codes.float() + 3) * scale)
    assert torch.equal(WIRE.write(settings, moved)["_weight_zero_point"], shifted["_weight_zero_point"])


def test_modules_have_the_first_config_that_names_them() -> None:
    eight, four = (WIRE.config(settings_of(name))["quant_type"]["default"] for name in ("int8", "8da4w"))
    entries = {"re:.*mlp.*": four, "a.mlp.down": None, "a.q.weight": four, "re:.*q.weight": eight, "_default": eight}
    data = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": entries}}
    settings = WIRE.parse({"quant_type": {"default": data}})
    kinds = {
        name: (of := WIRE.of(settings, name).config) and of.kind
        for name in ("a.mlp.up", "a.mlp.down", "a.q", "b.q", "c")
    }
    assert kinds == {
        "a.mlp.up": "IntxUnpackedToInt8Tensor",
        "a.mlp.down": None,
        "a.q": "IntxUnpackedToInt8Tensor",
        "b.q": "Int8Tensor",
        "c": "Int8Tensor",
    }
    assert WIRE.parse(WIRE.config(settings)) == settings
    old = {"_type": "ModuleFqnToConfig", "_version": 1, "_data": {"module_fqn_to_config": entries}}
    assert WIRE.parse({"quant_type": {"default": old}}).rules == settings.rules


def test_weights_of_different_kinds_are_joined_into_one_checkpoint() -> None:
    each = {"a": settings_of("int8"), "b": settings_of("intx4"), "c": settings_of("int8")}
    joined = WIRE.join(each, ["lm_head"])
    assert {name: WIRE.of(joined, name).config for name in each} == {name: of.config for name, of in each.items()}
    assert WIRE.config(joined)["modules_to_not_convert"] == ["lm_head"]
    same = WIRE.join({name: settings_of("int8") for name in "ab"}, [])
    assert same == settings_of("int8")


def test_old_names_mean_what_they_meant() -> None:
    assert old_config("int4_weight_only", {"group_size": 64, "inner_k_tiles": 8}) == config_named(
        "Int4WeightOnlyConfig", group_size=64
    )
    assert old_config("int8_weight_only", {}) == config_named("Int8WeightOnlyConfig")
    stored = {"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int8_weight", "quant_type_kwargs": {}}
    assert WIRE.parse(stored).config == config_named("Int8DynamicActivationInt8WeightConfig")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (QuantSpec(IntCode(4), Scale(torch.float16), Grouping.flat_blocks(64)), "neighbouring"),
        (QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(64, permuted=True)), "neighbouring"),
        (QuantSpec(FloatCode(torch.bfloat16), Scale(torch.float32), Grouping()), "integers and FP8"),
        (
            QuantSpec(IntCode(3), Scale(torch.float16), Grouping.groups(64), Zero("additive")),
            "signed 4-bit",
        ),
        (QuantSpec(IntCode(4, True), Scale(torch.float16), Grouping.per_tensor()), "one scale per tensor"),
        (
            QuantSpec(IntCode(8, True), Scale(torch.float32), Grouping(), activation=Activation("dynamic")),
            "activations in other ways",
        ),
    ],
)
def test_what_torchao_has_not_is_refused(spec: QuantSpec, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        WIRE.settings_for(spec)


def test_shapes_that_do_not_fit_are_refused_with_the_reason() -> None:
    settings = settings_of("int4")
    spec = WIRE.spec_for(settings, (64, 192), torch.bfloat16)
    assert "blocks of 1 x 32" in str(WIRE.refusal(settings, spec, (64, 100)))
    dynamic = settings_of("float8-dynamic")
    spec = WIRE.spec_for(dynamic, (64, 72), torch.bfloat16)
    assert "multiples of 16" in str(WIRE.refusal(dynamic, spec, (64, 72)))
    with pytest.raises(FormatError, match="can't spell"):
        WIRE.write(settings_of("int8"), quantized(settings))


def test_headers_name_plain_tensors_and_every_part() -> None:
    tensor = quantized(settings_of("8da4w"))
    metadata = WIRE.metadata(settings_of("8da4w"), {"layer": (tensor.spec, tensor.shape)}, ["norm.weight"])
    assert json.loads(metadata["tensor_names"]) == ["norm.weight", "layer.weight"]
    assert json.loads(metadata["norm.weight"]) == {"_type": "Tensor"}
    entry = json.loads(metadata["layer.weight"])
    assert entry["_data"]["block_size"] == [1, 32]
    assert entry["_data"]["activation_quantization"] == "int8_asym_per_token"
    assert headed(settings_of("8da4w"), tensor).header.activation == PER_TOKEN
