"""HQQ files and configs that are wrong: one error that says what and where. Parts of them hqq would run as code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.algorithms.hqq import HalfQuadratic
from lowbit.errors import FormatError, LowbitError, PlanError
from lowbit.wire.hqq.wire import HqqSettings, HqqWire

WIRE = HqqWire()
SHAPE = (32, 64)
FOUR = HqqSettings(4, 32)
Change = dict[str, torch.Tensor]


def stored(settings: HqqSettings = FOUR) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = HalfQuadratic().quantize(torch.randn(SHAPE), WIRE.spec_for(settings, SHAPE, torch.bfloat16))
    return WIRE.write(settings, weight)


def text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode("latin-1")), dtype=torch.uint8)


def number(value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def refused(change: Change, match: str, settings: HqqSettings = FOUR) -> None:
    with pytest.raises(FormatError, match=match):
        WIRE.read(settings, stored(settings) | change)


@pytest.mark.parametrize("name", ["compute_dtype", "unpack_view_dtype"])
@pytest.mark.parametrize(
    "value",
    [
        "__import__('pathlib').Path('/tmp/pwned').touch()",
        "torch.load",
        "torch.float64",
        "torch.complex64",
        "bfloat16()",
        "torch.bfloat16\n",
        "torch.bfloat16\0",
        "torch.torch.bfloat16",
        "",
        "\xff\xfe",
    ],
)
def test_bytes_of_a_dtype_are_looked_up_and_never_run(name: str, value: str) -> None:
    refused({name: text(value)}, f"{name}: unknown dtype")


def test_a_dtype_of_a_million_bytes() -> None:
    refused({"compute_dtype": torch.zeros(10**6, dtype=torch.uint8)}, "compute_dtype: the text is too long")


@pytest.mark.parametrize("value", [2, -1, 255, 2**31 - 1])
def test_axes_that_are_none(value: int) -> None:
    refused({"axis": number(value)}, "axis: there is no such axis")


@pytest.mark.parametrize("value", [0, 7, 9, -4, 33, 2**31 - 1])
def test_bits_that_are_none(value: int) -> None:
    refused({"nbits": number(value)}, "nbits: HQQ has no such width")


@pytest.mark.parametrize("value", [4.0, 1.5, float("nan"), float("inf")])
def test_bits_that_are_no_integer(value: float) -> None:
    refused({"nbits": number(value, torch.float32)}, "nbits: HQQ has no such width")


@pytest.mark.parametrize("bits", [8, 6, 5, 3, 2, 1])
def test_bits_against_the_packing(bits: int) -> None:
    refused({"nbits": number(bits)}, "packing: .* packed in another way")


@pytest.mark.parametrize("value", ["8bit_u8", "4bit_32", "", "eval(x)", "4bit_u8 "])
def test_packings_against_the_bits(value: str) -> None:
    refused({"packing": text(value)}, "packing: 4 bits are packed in another way")


@pytest.mark.parametrize("value", ["torch.int32", "torch.int8"])
def test_words_of_another_dtype(value: str) -> None:
    refused({"unpack_view_dtype": text(value)}, "unpack_view_dtype: words are of another dtype")


@pytest.mark.parametrize("value", [0, -32, 33, 10**9, 2048])
def test_group_sizes(value: int) -> None:
    match = "group_size: the group size doesn't divide|wrong shape"
    refused({"group_size": number(value)}, match)


@pytest.mark.parametrize(
    "value",
    [[0, 64], [-32, -64], [32], [32, 64, 1], [64, 64], [2**40, 2**40], [2**62, 4], [2**63 - 1, 2**63 - 1]],
)
def test_shapes(value: list[int]) -> None:
    refused({"shape": torch.tensor(value)}, "shape|group_size|W_q|scale")


def test_a_shape_that_is_no_list_of_integers() -> None:
    refused({"shape": torch.tensor([32.0, 64.0])}, "shape: wrong dtype")
    refused({"shape": torch.tensor([[32, 64]])}, "shape: wrong number of dimensions")


@pytest.mark.parametrize("name", ["axis", "group_size", "nbits", "view_as_float", "channel_wise"])
def test_numbers_that_are_lists(name: str) -> None:
    refused({name: torch.zeros(2, dtype=torch.int32)}, f"{name}: wrong shape")


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("W_q", torch.zeros(16, 64, dtype=torch.uint8), "W_q: wrong shape"),
        ("W_q", torch.zeros(32, 32, dtype=torch.int8), "W_q: wrong dtype"),
        ("W_q", torch.zeros(32 * 32, dtype=torch.uint8), "W_q: wrong number of dimensions"),
        ("scale", torch.ones(63, 1), "scale: wrong shape"),
        ("scale", torch.ones(1, 64), "scale: wrong shape"),
        ("scale", torch.ones(64, 1, dtype=torch.int32), "scale: wrong dtype"),
        ("zero", torch.ones(64, 1, dtype=torch.float64), "zero: wrong dtype"),
        ("zero", torch.ones(64), "zero: wrong shape"),
        ("channel_wise", number(0, torch.uint8), "channel_wise: one scale per weight"),
        ("view_as_float", number(1, torch.uint8), "W_q: wrong dtype"),
    ],
)
def test_tensors_that_contradict_each_other(name: str, tensor: torch.Tensor, match: str) -> None:
    refused({name: tensor}, match)


def test_words_under_a_float_dtype_that_do_not_add_up() -> None:
    settings = HqqSettings(3, 32, view_as_float=True, round_zero=False)
    refused({"W_q": torch.zeros(7, 63, dtype=torch.bfloat16)}, "W_q: wrong", settings)
    refused({"W_q": torch.zeros(7, 32, dtype=torch.int32)}, "W_q: wrong dtype", settings)


def test_values_past_their_bits() -> None:
    settings = HqqSettings(5, 32, round_zero=False)
    words = stored(settings)["W_q"]
    words[3, 3] = 32
    refused({"W_q": words}, "W_q: a value is out of range", settings)


@pytest.mark.parametrize(("scale", "zero"), [(0.0, 0.0), (1e-40, 3.0), (float("inf"), 1.0), (float("nan"), 1.0)])
def test_scales_that_are_zero_subnormal_or_infinite(scale: float, zero: float) -> None:
    """They are what the file says, as hqq would have it: no error, no other weight."""
    change = {"scale": torch.full((64, 1), scale), "zero": torch.full((64, 1), zero)}
    tensors = stored() | change | {"compute_dtype": text("torch.float32")}
    values = WIRE.read(HqqSettings(), tensors)
    codes = WIRE.read(HqqSettings(), tensors | {"scale": torch.ones(64, 1), "zero": torch.zeros(64, 1)}).dequantize()
    assert torch.equal(values.dequantize().nan_to_num(), ((codes - zero) * scale).nan_to_num())


@pytest.mark.parametrize(
    "change",
    [
        {"meta_scale.nbits": number(4)},
        {"meta_scale.packing": text("4bit_u8")},
        {"meta_scale.shape": torch.tensor([64, 2])},
        {"meta_scale.group_size": number(3)},
        {"meta_scale.axis": number(7)},
        {"meta_scale.scale": torch.ones(2, 1)},
        {"meta_scale.compute_dtype": text("open('x')")},
        {"scale_q": torch.zeros(64, 1)},
        {"scale_q": torch.zeros(1, 64, dtype=torch.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_quantized_scales_of_old_files(change: Change) -> None:
    tensors = {name: tensor for name, tensor in stored().items() if name != "scale"}
    tensors |= {
        "scale_q": torch.zeros(64, 1, dtype=torch.uint8),
        "meta_scale.nbits": number(8),
        "meta_scale.packing": text("8bit_u8"),
        "meta_scale.shape": torch.tensor([64, 1]),
        "meta_scale.axis": number(1),
        "meta_scale.scale": number(1.0, torch.float32),
        "meta_scale.zero": number(1.0, torch.float32),
    }
    assert WIRE.read(HqqSettings(), tensors).spec.scale.dtype == torch.float16
    with pytest.raises(FormatError, match="scale|meta_scale"):
        WIRE.read(HqqSettings(), tensors | change)


@given(st.data())
def test_random_damage_is_either_read_or_named(data: st.DataObject) -> None:
    tensors = stored()
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32]))
        shape = data.draw(st.sampled_from([tuple(tensors[name].shape), (), (1,), (2,), (64, 1), (32, 32)]))
        value = data.draw(st.sampled_from([0, 1, 2, 4, 32, 64, 255, 1 << 30]))
        tensors[name] = torch.full(shape, min(value, 255) if dtype == torch.uint8 else value, dtype=dtype)
    with contextlib.suppress(LowbitError):
        WIRE.read(HqqSettings(), tensors).dequantize()


CONFIGS: list[tuple[Any, str]] = [
    ({"quant_config": 7}, "quant_config is not an object"),
    ({"quant_config": {"weight_quant_params": [4]}}, "weight_quant_params is not an object"),
    ({"quant_config": {"mlp.up_proj": {"nbits": 4}}}, "'mlp.up_proj' lacks weight_quant_params"),
    ({"quant_config": {"mlp.up_proj": 4}}, "'mlp.up_proj' lacks weight_quant_params"),
    *(({"nbits": bits}, "nbits is out of range") for bits in (0, 33, -1, 7, "4", 4.0, 4.5, True, None, [4])),
    *(({"group_size": size}, "group_size is out of range") for size in (0, -2, "64", 64.0, True, [64])),
    *(({"axis": axis}, "axis is out of range") for axis in (2, -1, "1", 1.0, True)),
    ({"view_as_float": 1}, "view_as_float has the wrong type"),
    ({"channel_wise": False}, "one scale per weight"),
    ({"skip_modules": "lm_head"}, "skip_modules is a list"),
    ({"skip_modules": [3]}, "skip_modules is a list"),
]


@pytest.mark.parametrize(
    ("config", "match"), CONFIGS, ids=lambda value: json.dumps(value) if isinstance(value, dict) else ""
)
def test_configs(config: dict[str, Any], match: str) -> None:
    with pytest.raises(FormatError, match=match):
        WIRE.parse({"quant_method": "hqq", **config})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hqq")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    load = lowbit.AutoModelForCausalLM.from_pretrained
    load(folder / "dense", quantization_config=lowbit.HqqConfig(4, 32)).save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Any], Any], Change], Path]:
    def make(config: Callable[[Any], Any], change: Change) -> Path:
        tensors = load_file(checkpoint / "model.safetensors") | change
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        data = json.loads((checkpoint / "config.json").read_text())
        config(data)
        (tmp_path / "config.json").write_text(json.dumps(data))
        return tmp_path

    return make


Copy = Callable[[Callable[[Any], Any], Change], Path]


def test_a_model_with_code_for_a_dtype(copy: Copy) -> None:
    name = "model.layers.1.mlp.up_proj.compute_dtype"
    folder = copy(lambda config: None, {name: text("__import__('os').abort()")})
    for attempt in (
        lambda: lowbit.AutoModelForCausalLM.from_pretrained(folder),
        lambda: lowbit.open_checkpoint(folder).plan,
    ):
        with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.compute_dtype.*unknown dtype"):
            attempt()


def test_code_in_a_model_without_a_config(copy: Copy) -> None:
    """Where the config is made of the tensors."""
    name = "model.layers.1.mlp.up_proj.compute_dtype"
    folder = copy(lambda config: config.pop("quantization_config"), {name: text("__import__('os').abort()")})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.compute_dtype.*unknown dtype"):
        lowbit.AutoModelForCausalLM.from_pretrained(folder)


def test_another_models_weight(copy: Copy) -> None:
    name = "model.layers.0.mlp.up_proj"
    shape = {f"{name}.shape": torch.tensor([64, 128])}
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj: the weight is not the module's"):
        lowbit.AutoModelForCausalLM.from_pretrained(copy(lambda config: None, shape))


def test_a_config_that_contradicts_the_stored_one(checkpoint: Path) -> None:
    load = lowbit.AutoModelForCausalLM.from_pretrained
    with pytest.raises(PlanError, match="quant_config"):
        load(checkpoint, quantization_config=lowbit.HqqConfig(2, 32))
    with pytest.raises(PlanError, match="quantized with"):
        load(checkpoint, quantization_config=lowbit.QuantoConfig())


def test_pickled_files_are_refused_with_the_way_out(checkpoint: Path, tmp_path: Path) -> None:
    """hqq's own `save_quantized` pickles."""
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save({"x": torch.zeros(2)}, tmp_path / "qmodel.pt")
    with pytest.raises(FormatError, match="pickled weights are not read"):
        lowbit.open_checkpoint(tmp_path)
