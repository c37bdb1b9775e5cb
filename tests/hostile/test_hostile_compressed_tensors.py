"""compressed-tensors files that are damaged, contradict themselves, or mean harm: one error that says what is wrong."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.minmax import MinMax
from lowbit.core import Activation, QuantTensor
from lowbit.errors import FormatError, LowbitError
from lowbit.wire.compressed_tensors import PRESETS, CompressedTensorsWire

WIRE = CompressedTensorsWire()
WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def config(weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **(weights or {})}}
    return {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}, **more}


def a_weight(data: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    own = WIRE.of(WIRE.parse(data), "layer")
    spec = WIRE.spec(own)
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(spec.dtype)
    tensor = MinMax().quantize(dense, replace(spec, activation=Activation()))
    stored = {name: torch.ones(size).to(dtype) for name, (size, dtype) in spec.activation.tensors().items()}
    return own, WIRE.write(own, QuantTensor(spec, {**tensor.tensors, **stored}, (64, 128)))


@pytest.mark.parametrize(
    "shape",
    [
        [64, 129],
        [64, 120],
        [65, 128],
        [128, 64],
        [0, 0],
        [-64, -128],
        [2**40, 128],
        [64, 2**40],
        [2**63 - 1, 2**63 - 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weight_shape_against_the_packed_size(shape: list[int], bits: int) -> None:
    own, tensors = a_weight(config({"num_bits": bits}))
    # 12 words are also what 120 values of 3 bits take where they are padded.
    with pytest.raises(FormatError, match="don't divide 120" if (bits, shape[1]) == (3, 120) else "weight_shape"):
        WIRE.read(own, {**tensors, "weight_shape": torch.tensor(shape)})


@pytest.mark.parametrize("shape", [torch.tensor(64), torch.tensor([64]), torch.tensor([64.0, 128.0]), torch.ones(2, 2)])
def test_a_weight_shape_that_is_none(shape: Tensor) -> None:
    own, tensors = a_weight(config())
    with pytest.raises(FormatError, match="weight_shape"):
        WIRE.read(own, {**tensors, "weight_shape": shape})


def test_a_packed_module_that_no_target_matches() -> None:
    data = config()
    data["config_groups"]["group_0"]["targets"] = ["re:.*nothing"]
    _, tensors = a_weight(config())
    with pytest.raises(FormatError, match="no config group"):
        WIRE.read(WIRE.of(WIRE.parse(data), "model.layers.0.mlp.up_proj"), tensors)
    with pytest.raises(FormatError, match="no config group"):
        WIRE.read(WIRE.of(WIRE.parse(config(ignore=["layer"])), "layer"), tensors)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+$", "(.*)*x", ".*.*.*.*.*.*.*.*.*.*x", "([a-z]+)+\\d"])
def test_catastrophic_expressions_take_no_time(pattern: str) -> None:
    data = config()
    data["config_groups"]["group_0"]["targets"] = [f"re:{pattern}"]
    settings = WIRE.parse({**data, "ignore": [f"re:{pattern}"]})
    begin = time.perf_counter()
    WIRE.of(settings, "a" * 500)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("pattern", ["(", "*a", "(?P<a>b)(?P=a)", "x" * 2000])
def test_targets_that_are_no_expressions(pattern: str) -> None:
    with pytest.raises(FormatError, match="can't be used"):
        WIRE.of(WIRE.parse(config(ignore=[f"re:{pattern}"])), "layer")


@pytest.mark.parametrize(
    "weights",
    [
        *({"num_bits": bits} for bits in (0, 9, 33, -1, "4", 4.5, True, 2**70)),
        *({"group_size": size} for size in (0, -2, "32", 32.0, True, 2**70, None)),
        *({"strategy": strategy} for strategy in ("rows", "channel", "token", 3, ["group"])),
        {"type": "complex"},
        {"symmetric": "yes"},
        {"symmetric": 1},
        {"dynamic": True},
        {"dynamic": "local"},
        {"dynamic": "global"},
        {"actorder": "sideways"},
        {"actorder": 7},
        {"scale_dtype": "torch.load"},
        {"scale_dtype": "__import__('os')"},
        {"zp_dtype": ["int8"]},
        {"block_structure": [16, 16]},
        {"strategy": "block", "group_size": None},
        *({"strategy": "block", "group_size": None, "block_structure": block}
          for block in ([0, 16], [16], "16", "axb", [16, 16, 16], [2**40, 1], [True, 1], "9" * 100)),
        {"type": "float"},
        {"type": "float", "num_bits": 5},
        {"type": "float", "num_bits": 4, "group_size": 16},
        {"type": "float", "num_bits": 8, "symmetric": False},
        {"future_meaning": 1},
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_mean_nothing(weights: dict[str, Any]) -> None:
    if weights == {"type": "float"}:
        weights = {"type": "float", "group_size": 64}  # with groups of 32 it is MXFP4
    with pytest.raises(FormatError):
        WIRE.parse(config(weights))


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": []},
        {"config_groups": {"g": 3}},
        {"config_groups": {"g": None}},
        {"config_groups": {"W99A1": ["Linear"]}},
        {"config_groups": {"W4A16": [3]}},
        {"config_groups": {"g": {"targets": "Linear", "weights": WEIGHTS}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS, "future_meaning": 1}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS, "format": "zip"}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": [WEIGHTS]}}},
        {"config_groups": {"g": {"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS, "output_activations": {"num_bits": 8}}}},
        {"format": "zip"},
        {"format": 3},
        {"format": "marlin-24"},
        {"format": "float-quantized"},
        {"format": "nvfp4-pack-quantized"},
        {"ignore": "lm_head"},
        {"ignore": [None]},
        {"kv_cache_scheme": {"num_bits": 99}},
        {"kv_cache_scheme": "fp8"},
        {"transform_config": {"config_groups": {"R1": {}}}},
        {"moe_sparsity_config": {"method": "prune"}},
        {"sparsity_config": {"format": "sparse-16-bitmask"}},
        {"sparsity_config": "sparse-bitmask"},
        {"sparsity_config": {"format": "sparse-bitmask", "targets": "Linear"}},
    ],
    ids=str,
)
def test_configurations_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        WIRE.parse({**config(), **changes})


def test_unknown_keys_of_the_whole_are_passed_over_as_the_library_does() -> None:
    assert WIRE.parse(config(version="99.0", global_compression_ratio=3.5, new="x")) == WIRE.parse(config())


def test_marlin_says_why() -> None:
    with pytest.raises(FormatError, match="marlin-24 holds weights in the order of one GPU kernel"):
        WIRE.parse(config(format="marlin-24"))


def test_a_group_larger_than_the_row_or_not_dividing_it() -> None:
    own, tensors = a_weight(config())
    for size in (256, 48):
        wider = replace(own, schemes=(replace(own.scheme, weights=replace(own.weights, group=size)),))
        with pytest.raises(FormatError, match="don't divide"):
            WIRE.read(wider, tensors)


@pytest.mark.parametrize("declared", ["int-quantized", "naive-quantized"])
def test_a_format_that_the_tensors_contradict(declared: str) -> None:
    _, tensors = a_weight(config(format="pack-quantized"))
    with pytest.raises(FormatError, match="lacks a tensor"):
        WIRE.read(WIRE.of(WIRE.parse(config(format=declared)), "layer"), tensors)


def test_a_dense_weight_beside_scales_is_refused() -> None:
    """Models saved before they were compressed round their weights as they run."""
    own, _ = a_weight({**config(), "config_groups": {"FP8_DYNAMIC": ["Linear"]}})
    tensors = {"weight": torch.randn(64, 128), "weight_scale": torch.ones(64, 1)}
    with pytest.raises(FormatError, match="wrong dtype"):
        WIRE.read(own, tensors)


@pytest.mark.parametrize("index", [-1, 4, 2**31 - 1])
def test_a_group_index_out_of_range(index: int) -> None:
    own, tensors = a_weight(config({"actorder": "group"}))
    groups = tensors["weight_g_idx"].clone()
    groups[5] = index
    with pytest.raises(FormatError, match="weight_g_idx"):
        WIRE.read(own, {**tensors, "weight_g_idx": groups})


@pytest.mark.parametrize("index", [torch.zeros(127, dtype=torch.int32), torch.zeros(128), torch.zeros(1, 128)])
def test_a_group_index_of_another_size_or_dtype(index: Tensor) -> None:
    own, tensors = a_weight(config({"actorder": "group"}))
    with pytest.raises(FormatError, match="weight_g_idx"):
        WIRE.read(own, {**tensors, "weight_g_idx": index})


def test_values_outside_of_the_declared_bits() -> None:
    own, tensors = a_weight(config(format="int-quantized"))
    tensors["weight"][3, 7] = 8
    with pytest.raises(FormatError, match="out of range"):
        WIRE.read(own, tensors)


def test_zero_points_of_a_symmetric_scheme() -> None:
    own, tensors = a_weight(config(format="int-quantized"))
    zeros = torch.zeros(64, 4, dtype=torch.int8)
    assert WIRE.read(own, {**tensors, "weight_zero_point": zeros}).equal(WIRE.read(own, tensors))
    with pytest.raises(FormatError, match="symmetric"):
        WIRE.read(own, {**tensors, "weight_zero_point": zeros + 1})


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC"])
@pytest.mark.parametrize(
    "scale",
    [torch.ones(64), torch.ones(1, 64), torch.ones(64, 2), torch.ones(0), torch.ones(64, 1, dtype=torch.int32)],
    ids=lambda scale: str(list(scale.shape)),
)
def test_an_fp8_scale_of_the_wrong_axis(name: str, scale: Tensor) -> None:
    own, tensors = a_weight({**config(), "config_groups": {name: ["Linear"]}})
    with pytest.raises(FormatError, match="weight_scale"):
        WIRE.read(own, {**tensors, "weight_scale": scale})
    with pytest.raises(FormatError, match="weight_scale"):
        WIRE.read(own, {key: value for key, value in tensors.items() if key != "weight_scale"})


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-40])
def test_scales_give_what_the_formula_gives(value: float) -> None:
    """Scales are numbers; as in the library, what comes of 0, NaN, Inf and subnormals is their product."""
    own, tensors = a_weight({**config(), "config_groups": {"FP8_DYNAMIC": ["Linear"]}})
    scale = torch.full((64, 1), value)
    dense = WIRE.read(own, {**tensors, "weight_scale": scale}).dequantize(torch.float32)
    assert torch.equal(dense.nan_to_num(7), (tensors["weight"].float() * scale).nan_to_num(7))


def test_an_exponent_that_stands_for_nan() -> None:
    own, tensors = a_weight({**config(), "config_groups": {"MXFP4A16": ["Linear"]}})
    tensors["weight_scale"][0, 0] = 255
    dense = WIRE.read(own, tensors).dequantize(torch.bfloat16)
    assert bool(dense[0, :32].isnan().all()) and bool(dense[1:].isfinite().all())


def sparse(quarters: bool) -> tuple[Any, dict[str, Tensor]]:
    spelled = "sparse-24-bitmask" if quarters else "sparse-bitmask"
    data = {"quant_method": "compressed-tensors", "sparsity_config": {"format": spelled, "targets": ["Linear"]}}
    own = WIRE.of(WIRE.parse(data), "layer")
    weight = torch.randn(16, 32).to(torch.bfloat16)
    weight[:, ::2] = 0
    return own, WIRE.write(own, QuantTensor(WIRE.spec(own), {"codes": weight}, (16, 32)))


@pytest.mark.parametrize("quarters", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        {"shape": torch.tensor([2**40, 2**40])},
        {"shape": torch.tensor([16, 25])},
        {"shape": torch.tensor([-16, 32])},
        {"shape": torch.tensor([16, 32, 1])},
        {"shape": torch.tensor([16.0, 32.0])},
        {"bitmask": torch.zeros(16, 4, dtype=torch.uint8)},
        {"bitmask": torch.full((16, 4), 255, dtype=torch.uint8)},
        {"bitmask": torch.zeros(16, 4)},
        {"bitmask": torch.zeros(64, dtype=torch.uint8)},
        {"compressed": torch.zeros(3, dtype=torch.bfloat16)},
        {"compressed": torch.zeros(16, 16, dtype=torch.int64)},
    ],
    ids=str,
)
def test_sparse_weights_that_contradict_themselves(quarters: bool, damage: dict[str, Tensor]) -> None:
    own, tensors = sparse(quarters)
    with pytest.raises(FormatError):
        WIRE.read(own, {**tensors, **damage})


def test_sparse_masks_of_the_wrong_structure_and_rows() -> None:
    own, tensors = sparse(True)
    mask = tensors["bitmask"].clone()
    mask[0, 0] = 0b00001111
    with pytest.raises(FormatError, match="two bits in every four"):
        WIRE.read(own, {**tensors, "bitmask": mask})
    own, tensors = sparse(False)
    with pytest.raises(FormatError, match="rows don't begin"):
        WIRE.read(own, {**tensors, "row_offsets": tensors["row_offsets"] + 1})


ODD_VALUES = (None, True, 0, -1, 3, 2**64, 0.5, "", "x" * 500, "re:(", [], [[]], {}, {"a": 1}, "group", "int")


def test_any_change_of_a_config_is_understood_or_refused() -> None:
    chance = random.Random(0)
    for name in [name for name in PRESETS if name != "UNQUANTIZED"] * 8:
        data = WIRE.config(WIRE.parse({**config(), "config_groups": {name: ["Linear"]}}))
        for _ in range(chance.randint(1, 3)):
            place: Any = data
            while isinstance(place, dict) and place and chance.random() < 0.8:
                key = chance.choice(list(place))
                if not isinstance(place[key], dict):
                    place[key] = chance.choice(ODD_VALUES)
                    break
                place = place[key]
        try:
            settings = WIRE.parse(data)
            WIRE.of(settings, "model.layers.0.mlp.up_proj")
        except LowbitError:
            pass


def test_any_change_of_the_tensors_is_read_or_refused() -> None:
    chance = random.Random(0)
    for name in [name for name in PRESETS if name != "UNQUANTIZED"] * 4:
        own, tensors = a_weight({**config(), "config_groups": {name: ["Linear"]}})
        key = chance.choice(list(tensors))
        value = tensors[key]
        raw = value.reshape(-1).view(torch.uint8)
        tensors[key] = chance.choice(
            [
                value.reshape(-1),
                value.unsqueeze(0),
                value[:0],
                value.reshape(-1)[0],
                raw,
                value.to(torch.int64),
                (raw ^ 0xFF).view(value.dtype).view(value.shape),
                torch.zeros_like(value),
            ]
        )
        try:
            read = WIRE.read(own, tensors)
        except LowbitError:
            continue
        assert read.dequantize(torch.float32).shape == read.shape
