"""Damaged and hostile torchao checkpoints: one `FormatError` that says what and where."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import FormatError

MODULE = "model.layers.0.mlp.down_proj"
KEY = f"{MODULE}.weight"
Data = dict[str, Any]
KINDS: dict[str, Data] = {
    "int8": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}},
    "float8": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}},
    "int4": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32}},
    "intx": {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}},
    },
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    dense = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(dense)
    folders = {}
    for name, quant_type in KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        asked = lowbit.TorchAoConfig(quant_type)
        lowbit.AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked).save_pretrained(folders[name])
    return folders


@pytest.fixture
def damaged(originals: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint after changes to its tensors, its header and its config."""

    def make(
        kind: str,
        tensors: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
        header: Callable[[dict[str, str]], None] = lambda header: None,
        config: Callable[[Data], None] = lambda config: None,
    ) -> Path:
        source = originals[kind] / "model.safetensors"
        held = load_file(source)
        with safe_open(source, "pt") as file:
            metadata = dict(file.metadata())
        data = json.loads((originals[kind] / "config.json").read_text())
        tensors(held)
        header(metadata)
        config(data["quantization_config"])
        save_file(
            {name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "model.safetensors", metadata
        )
        (tmp_path / "config.json").write_text(json.dumps(data))
        return tmp_path

    return make


def refused(path: Path, *words: str) -> None:
    """Both ways of reading raise one error that holds the words."""
    for attempt in (
        lambda: dict(lowbit.open_checkpoint(path).weights.items()),
        lambda: lowbit.AutoModelForCausalLM.from_pretrained(path),
    ):
        with pytest.raises(FormatError) as caught:
            attempt()
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))


def entry(metadata: dict[str, str], **fields: Any) -> None:
    """Change fields of the entry of `MODULE`."""
    data = json.loads(metadata[KEY])
    data["_data"] |= fields
    metadata[KEY] = json.dumps(data)


def part(name: str) -> str:
    return f"{MODULE}._weight_{name}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_size_against_the_scales_is_refused(damaged: Callable[..., Path], kind: str) -> None:
    refused(
        damaged(kind, header=lambda header: entry(header, block_size=[1, 16])), MODULE, "_weight_scale", "wrong shape"
    )


@pytest.mark.parametrize(
    "block", [[1, 0], [-1, 64], [1], [1, "64"], [1, 64.0], "1,64", None, [1, 2**62], [1, 48], [True, 64]]
)
def test_a_block_size_that_is_none_is_refused(damaged: Callable[..., Path], block: Any) -> None:
    refused(damaged("int8", header=lambda header: entry(header, block_size=block)), MODULE, "block")


@pytest.mark.parametrize(
    "name", ["os.system", "torch.nn.Module", "Int8Tensor.__init__", "AffineQuantizedTensor", "", 7]
)
def test_a_header_naming_an_arbitrary_class_is_refused(damaged: Callable[..., Path], name: Any) -> None:
    def change(header: dict[str, str]) -> None:
        header[KEY] = json.dumps({**json.loads(header[KEY]), "_type": name})

    refused(damaged("int8", header=change), KEY)


@pytest.mark.parametrize("name", ["subprocess.Popen", "__import__('os')", "Int4PreshuffledConfig", None, ["x"]])
def test_a_config_naming_an_arbitrary_class_is_refused(damaged: Callable[..., Path], name: Any) -> None:
    refused(damaged("int8", config=lambda config: config["quant_type"]["default"].update(_type=name)), "quant_type")


@pytest.mark.parametrize("name", ["load", "__class__", "int4", "complex64", 3, None, ["float32"]])
def test_a_dtype_that_is_none_is_refused(damaged: Callable[..., Path], name: Any) -> None:
    spelled = {"_type": "torch.dtype", "_data": name}
    refused(damaged("int8", header=lambda header: entry(header, dtype=spelled)), KEY)


@pytest.mark.parametrize("bits", ["int0", "int9", "uint4", "float8_e4m3fn", "int16"])
def test_bits_out_of_range_are_refused(damaged: Callable[..., Path], bits: str) -> None:
    spelled = {"_type": "torch.dtype", "_data": bits}
    refused(damaged("intx", header=lambda header: entry(header, target_dtype=spelled)), KEY, "int1 to int8")


def test_codes_wider_than_their_bits_are_refused(damaged: Callable[..., Path]) -> None:
    refused(
        damaged("intx", tensors=lambda held: held[part("qdata")].__setitem__((0, 0), 9)),
        part("qdata"),
        "not of 4 bits",
    )
    refused(
        damaged("intx", tensors=lambda held: held[part("zero_point")].__setitem__((0, 0), -9)),
        part("zero_point"),
        "not of 4 bits",
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(damaged: Callable[..., Path], kind: str, value: float) -> None:
    refused(
        damaged(kind, tensors=lambda held: held[part("scale")].view(-1).__setitem__(3, value)),
        part("scale"),
        "no numbers",
    )


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_an_fp8_scale_of_zero_or_less_is_refused(damaged: Callable[..., Path], value: float) -> None:
    refused(
        damaged("float8", tensors=lambda held: held[part("scale")].view(-1).__setitem__(3, value)),
        part("scale"),
        "positive",
    )


def test_fp8_scales_along_the_wrong_axis_are_refused(damaged: Callable[..., Path]) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[part("scale")] = held[part("scale")].t()

    refused(damaged("float8", tensors=change), part("scale"), "wrong shape")


def test_fp8_codes_that_are_no_numbers_are_refused(damaged: Callable[..., Path]) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[part("qdata")].view(torch.uint8)[0, 0] = 0x7F

    refused(damaged("float8", tensors=change), part("qdata"), "no numbers")


@pytest.mark.parametrize(("kind", "name"), [("int8", "scale"), ("float8", "scale"), ("int4", "zero_point")])
def test_a_missing_part_is_refused(damaged: Callable[..., Path], kind: str, name: str) -> None:
    refused(damaged(kind, tensors=lambda held: held.pop(part(name))), part(name))


@pytest.mark.parametrize("name", ["act_pre_scale", "scale_and_zero", "act_quant_scale"])
def test_a_part_that_changes_what_is_computed_is_refused(damaged: Callable[..., Path], name: str) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[part(name)] = torch.ones(1)

    refused(damaged("int8", tensors=change), part(name), "doesn't know")


def test_a_part_that_only_the_header_names_is_refused(damaged: Callable[..., Path]) -> None:
    def change(header: dict[str, str]) -> None:
        data = json.loads(header[KEY])
        data["_tensor_data_names"].append("act_pre_scale")
        header[KEY] = json.dumps(data)

    refused(damaged("int8", header=change), KEY, "parts")


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": {"_type": "PerAxis", "_data": {"axis": 1}}},
        {"granularity": {"_type": "PerRow", "_data": {"dim": 0}}},
        {"mapping_type": {"_type": "MappingType", "_data": "__class__"}},
        {"reduce_range": "yes"},
    ],
)
def test_activations_rounded_in_unknown_ways_are_refused(damaged: Callable[..., Path], fields: Data) -> None:
    def change(header: dict[str, str]) -> None:
        data = json.loads(header[KEY])
        data["_data"]["act_quant_kwargs"]["_data"] |= fields
        header[KEY] = json.dumps(data)

    refused(damaged("int8", header=change), KEY)


def test_activations_quantized_by_an_arbitrary_class_are_refused(damaged: Callable[..., Path]) -> None:
    kwargs = {"_type": "os.system", "_data": {"granularity": {"_type": "PerRow", "_data": {}}}}
    refused(damaged("int8", header=lambda header: entry(header, act_quant_kwargs=kwargs)), KEY, "os.system")


@pytest.mark.parametrize("text", ["", "[", "null", "7", "[" * 100_000, '{"_type": "Int8Tensor", "_data": []}'])
def test_an_entry_that_is_no_object_is_refused(damaged: Callable[..., Path], text: str) -> None:
    refused(damaged("int8", header=lambda header: header.__setitem__(KEY, text)), KEY)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000])
def test_a_list_of_tensors_that_is_none_is_refused(damaged: Callable[..., Path], text: str) -> None:
    refused(damaged("int8", header=lambda header: header.__setitem__("tensor_names", text)), "tensor_names")


def test_a_file_without_its_header_entries_is_refused(damaged: Callable[..., Path]) -> None:
    refused(damaged("int8", header=lambda header: header.pop("tensor_names")), "without its metadata", "tensor_names")


def test_a_packed_parameter_that_is_no_weight_is_refused(damaged: Callable[..., Path]) -> None:
    def change(header: dict[str, str]) -> None:
        names = json.loads(header["tensor_names"])
        header["model.experts.gate_up_proj"] = header[KEY]
        header["tensor_names"] = json.dumps([*names, "model.experts.gate_up_proj"])

    refused(damaged("int8", header=change), "gate_up_proj", "linear layers")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": "32"}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"group_size": 2**40}, "group_size"),
        ({"new_meaning": 1}, "new_meaning"),
        ({"int4_packing_format": {"_type": "Int4PackingFormat", "_data": "PRESHUFFLED"}}, "int4_packing_format"),
        ({"int4_choose_qparams_algorithm": 7}, "int4_choose_qparams_algorithm"),
    ],
)
def test_values_of_a_config_out_of_range_are_refused(damaged: Callable[..., Path], fields: Data, word: str) -> None:
    refused(damaged("int4", config=lambda config: config["quant_type"]["default"]["_data"].update(fields)), word)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, True])
def test_another_version_of_a_config_is_refused(damaged: Callable[..., Path], version: Any) -> None:
    refused(damaged("int8", config=lambda config: config["quant_type"]["default"].update(_version=version)), "version")


def test_a_catastrophic_pattern_takes_no_time(damaged: Callable[..., Path]) -> None:
    rules = {r"re:(\w|\w\w)*\.(\w+)*x": KINDS["int4"], "_default": KINDS["int8"]}

    def change(config: Data) -> None:
        config["quant_type"]["default"] = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": rules}}

    before = time.monotonic()
    lowbit.open_checkpoint(damaged("int8", config=change)).plan  # noqa: B018 (reads every weight)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("rules", [{}, None, {"re:(": KINDS["int8"]}, {"a": 7}, {"a": {"_type": "FqnToConfig"}}])
def test_rules_that_are_none_are_refused(damaged: Callable[..., Path], rules: Any) -> None:
    def change(config: Data) -> None:
        config["quant_type"]["default"] = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": rules}}

    with pytest.raises(FormatError):
        lowbit.open_checkpoint(damaged("int8", config=change))
