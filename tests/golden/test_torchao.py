"""torchao's files against torchao itself, in both directions, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open

import apart
import lowbit
from lowbit.core import linear
from lowbit.integrations.transformers.methods import make_recipe
from lowbit.nn import QuantLinear
from lowbit.nn.embedding import QuantEmbedding
from lowbit.wire.torchao.wire import TorchAoSettings, TorchAoWire

apart.require("torchao")

WIRE = TorchAoWire()
SOURCES = Path(lowbit.__file__).parents[1]
# Relative to the largest output: twice the largest difference seen (3.1e-7, 7.2e-4, 5.7e-3), of the order of sums and
# the roundings in between. Without rounding activations the difference in fp32 is above 4e-3.
TOLERANCE = {torch.float32: 6.2e-7, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# Of logits after bf16 layers: twice the largest difference seen (0.019).
LOGITS = 0.038
IDS = torch.arange(3, 13)[None]
_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("Int4WeightOnlyConfig", {"group_size": 32}),
    "int8": ("Int8WeightOnlyConfig", {}),
    "int8-dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "float8": ("Float8WeightOnlyConfig", {}),
    "float8-dynamic": ("Float8DynamicActivationFloat8WeightConfig", {"granularity": [_ROW, _ROW]}),
    "intx3": (
        "IntxWeightOnlyConfig",
        {
            "weight_dtype": {"_type": "torch.dtype", "_data": "int3"},
            "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
        },
    ),
    "8da4w": ("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}}),
}
_STORED = {name: {"_type": type, "_version": 2, "_data": fields} for name, (type, fields) in _PARTS.items()}
_PER_MODULE = {
    r"re:.*\.mlp\.(up|down)_proj": _STORED["8da4w"],
    "model.layers.0.mlp.gate_proj": _STORED["intx3"],
    "model.layers.0.self_attn.q_proj.weight": _STORED["float8"],
    "_default": _STORED["int8"],
}
OURS = {
    **{name: _STORED[name] for name in ("int4", "int8-dynamic", "float8-dynamic")},
    "per-module": {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": _PER_MODULE}},
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torchao made, and what it read of what lowbit saved."""
    folder = tmp_path_factory.mktemp("torchao")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    for name, quant_type in OURS.items():
        asked = lowbit.TorchAoConfig(quant_type)
        lowbit.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=asked).save_pretrained(
            folder / "ours" / name
        )
    apart.run("original_torchao.py", folder, SOURCES)
    return folder


@pytest.fixture(scope="module")
def layers(folder: Path) -> dict[str, tuple[dict[str, Any], str, Tensors]]:
    """Config, header entry and tensors of single layers, by ``variant/dtype``."""
    entries = json.loads((folder / "layers.json").read_text())
    tensors: dict[str, Tensors] = {name: {} for name in entries}
    for key, tensor in load_file(folder / "layers.safetensors").items():
        name, _, part = key.rpartition("/")
        tensors[name][part] = tensor
    assert len(entries) > 100
    return {name: (entry["config"], entry["header"], tensors[name]) for name, entry in entries.items()}


def settings_of(config: dict[str, Any], header: str | None = None) -> TorchAoSettings:
    settings = WIRE.parse({"quant_type": {"default": config}})
    if header is not None:
        settings = WIRE.bind(settings, {"tensor_names": '["layer.weight"]', "layer.weight": header})
    return WIRE.of(settings, "layer")


def parts_of(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name in WIRE.suffixes}


def assert_same(ours: Tensors, theirs: Tensors, name: str) -> None:
    assert set(ours) == set(theirs), name
    for part, tensor in theirs.items():
        assert (ours[part].dtype, ours[part].shape) == (tensor.dtype, tensor.shape), (name, part)
        assert torch.equal(ours[part].contiguous().view(torch.uint8), tensor.view(torch.uint8)), (name, part)


def test_weights_of_torchao_are_read_to_the_bit_and_written_again(layers: dict[str, Any]) -> None:
    for name, (config, header, tensors) in layers.items():
        settings = settings_of(config, header)
        tensor = WIRE.read(settings, parts_of(tensors))
        dtype = tensors["dense"].dtype
        assert tensor.spec.dtype == dtype, name
        assert torch.equal(tensor.dequantize(dtype), tensors["dequantized"]), name
        assert_same(WIRE.write(settings, tensor), parts_of(tensors), name)


def test_lowbit_quantizes_to_the_codes_scales_and_headers_of_torchao(layers: dict[str, Any]) -> None:
    for name, (config, header, tensors) in layers.items():
        recipe = make_recipe(lowbit.TorchAoConfig(config))
        weight = tensors["dense"]
        spec = recipe.spec_for("layer", tuple(weight.shape), weight.dtype)
        tensor = recipe.algorithm_of("layer").quantize(weight, spec)
        assert_same(WIRE.write(settings_of(config), tensor), parts_of(tensors), name)
        written = WIRE.metadata(recipe.settings, {"layer": (tensor.spec, tensor.shape)}, [])
        assert json.loads(written["layer.weight"]) == json.loads(header), name


def test_layers_compute_what_those_of_torchao_do(layers: dict[str, Any]) -> None:
    seen = 0
    for name, (config, header, tensors) in layers.items():
        tensor = WIRE.read(settings_of(config, header), parts_of(tensors))
        ours = linear(tensors["inputs"], tensor.spec, tensor.tensors, tensor.shape).float()
        theirs = tensors["outputs"].float()
        if name.startswith("float8-dynamic/"):
            # A token of zeros is NaN there: its scale is 0.
            assert theirs[0, 1].isnan().all() and (ours[0, 1] == 0).all()
            ours, theirs = ours[1], theirs[1]
        largest = theirs.abs().max()
        assert (ours - theirs).abs().max() <= TOLERANCE[tensors["dense"].dtype] * largest, name
        if tensor.spec.activation.kind != "none" and tensors["dense"].dtype == torch.float32:
            plain = torch.nn.functional.linear(tensors["inputs"], tensors["dequantized"])
            assert (plain - tensors["outputs"]).abs().max() > 1e-3 * largest, name
            seen += 1
    assert seen >= 7


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "float8-dynamic", "8da4w", "per-module", "embeddings"])
def test_checkpoints_of_torchao_load_with_equal_weights_and_logits(folder: Path, name: str, tmp_path: Path) -> None:
    expected = load_file(folder / "models" / f"{name}.safetensors")
    logits = expected.pop("logits")
    path = folder / "models" / name
    checkpoint = lowbit.open_checkpoint(path)
    assert set(checkpoint.weights) == set(expected)
    model = lowbit.AutoModelForCausalLM.from_pretrained(path)
    kinds = (QuantLinear, QuantEmbedding)
    packed = {module: layer for module, layer in model.named_modules() if isinstance(layer, kinds)}
    assert set(packed) == set(expected)
    for module, tensor in expected.items():
        assert torch.equal(checkpoint.weights[module].dequantize(tensor.dtype), tensor), module
        assert torch.equal(packed[module].quant_tensor().dequantize(tensor.dtype), tensor), module
    with torch.no_grad():
        difference = (model(IDS).logits - logits).abs().max()
    assert difference <= LOGITS * logits.abs().max()
    model.save_pretrained(tmp_path)
    with safe_open(path / "model.safetensors", "pt") as theirs, safe_open(tmp_path / "model.safetensors", "pt") as ours:
        names = set(theirs.keys())
        assert set(ours.keys()) == names
        for key, text in theirs.metadata().items():
            if key != "tensor_names":
                assert ours.metadata()[key] == text, key
        for key in names:
            assert torch.equal(ours.get_tensor(key).view(torch.uint8), theirs.get_tensor(key).view(torch.uint8)), key


@pytest.mark.parametrize("name", OURS)
def test_stock_transformers_with_torchao_reads_what_lowbit_saved(folder: Path, name: str) -> None:
    theirs = load_file(folder / "read" / f"{name}.safetensors")
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder / "ours" / name)
    packed = {module: layer for module, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert len(packed) == 7
    if name == "int4":
        for module, layer in packed.items():
            written = WIRE.write(settings_of(OURS["int4"]), layer.quant_tensor())
            for part in ("qdata", "scale", "zero_point"):
                assert torch.equal(written[f"_weight_{part}"], theirs[f"{module}.{part}"]), (module, part)
        return
    logits = theirs.pop("logits")
    assert set(theirs) == set(packed)
    for module, tensor in theirs.items():
        assert torch.equal(packed[module].dequantize(tensor.dtype), tensor), module
    with torch.no_grad():
        difference = (model(IDS).logits - logits).abs().max()
    assert difference <= LOGITS * logits.abs().max()


def test_config_objects_of_torchao_are_stored_as_transformers_stores_them(folder: Path) -> None:
    pairs = json.loads((folder / "configs.json").read_text())
    assert len(pairs) > 30
    for name, (stock, ours) in pairs.items():
        assert ours == stock, name
