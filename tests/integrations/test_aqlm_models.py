"""AQLM models through the Auto classes: loaded, made, run, trained through, saved."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
import tiny
from lowbit.core import Grouping, QuantSpec, QuantTensor, Scale
from lowbit.errors import FormatError, PlanError
from lowbit.nn import QuantLinear
from lowbit.wire import open_checkpoint
from lowbit.wire.aqlm import AqlmSettings, AqlmWire
from test_memory import CONSTANT, LAYER, PROBE

WIRE = AqlmWire()
TWO_BY_EIGHT = AqlmSettings(2, 8, 8, 1, ("lm_head", "lm_head.weight"))


def random_weight(settings: AqlmSettings, shape: tuple[int, int]) -> QuantTensor:
    spec = QuantSpec(settings.code, Scale(torch.float16), Grouping(settings.out_group, 0), rounding="each")
    layout = spec.tensors(shape)
    tensors = {
        "codes": torch.randint(-128, 128, layout["codes"][0], dtype=layout["codes"][1]),
        "codebooks": (torch.randn(layout["codebooks"][0]) * 0.1).to(torch.float16),
        "scales": (torch.rand(layout["scales"][0]) + 0.5).to(torch.float16),
    }
    return QuantTensor(spec, tensors, shape).validate()


def pack(dense: Path, folder: Path, settings: AqlmSettings) -> dict[str, QuantTensor]:
    """Put random packed weights in the place of the linear layers of a dense checkpoint."""
    stored = load_file(dense / "model.safetensors")
    weights = {
        name.removesuffix(".weight"): random_weight(settings, (tensor.shape[0], tensor.shape[1]))
        for name, tensor in stored.items()
        if name.endswith("proj.weight")
    }
    rest = {name: tensor for name, tensor in stored.items() if not name.endswith("proj.weight")}
    packed = {f"{m}.{part}": value for m, w in weights.items() for part, value in WIRE.write(settings, w).items()}
    folder.mkdir()
    save_file(rest | packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = WIRE.config(settings)
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny.save("llama", folder, torch.float16)
    return folder


@pytest.fixture
def source(dense: Path, tmp_path: Path) -> Path:
    pack(dense, tmp_path / "source", TWO_BY_EIGHT)
    return tmp_path / "source"


@pytest.mark.parametrize("settings", [AqlmSettings(1, 9, 8, 1), TWO_BY_EIGHT, AqlmSettings(3, 4, 4, 2)])
def test_it_computes_what_the_dense_weights_do(dense: Path, tmp_path: Path, settings: AqlmSettings) -> None:
    weights = pack(dense, tmp_path / "packed", settings)
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    plain = lowbit.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name, tensor in weights.items():
        plain.get_submodule(name).weight.data = tensor.dequantize()
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(plain, "llama"))
    layer = model.model.layers[0].mlp.up_proj
    inputs = torch.randn(3, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(inputs).square().sum(), inputs)
    (wanted,) = torch.autograd.grad(plain.model.layers[0].mlp.up_proj(inputs).square().sum(), inputs)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_it_stays_packed_and_is_saved_byte_for_byte(source: Path, tmp_path: Path) -> None:
    model = lowbit.AutoModelForCausalLM.from_pretrained(source)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held < (source / "model.safetensors").stat().st_size
    before = tiny.logits(model, "llama")
    model.generate(**tiny.inputs("llama"), max_new_tokens=3, do_sample=False)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    copy.deepcopy(model.hf_quantizer)
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = load_file(tmp_path / "saved" / "model.safetensors"), load_file(source / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())
    again = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(again, "llama"), before)
    dequantized = again.dequantize()
    assert torch.equal(tiny.logits(dequantized, "llama"), before)


@pytest.mark.parametrize("names", [["lm_head"], ["lm_head.weight"], None])
def test_excluded_weights_are_stored_in_both_spellings(source: Path, tmp_path: Path, names: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["linear_weights_not_to_quantize"] = names
    (source / "config.json").write_text(json.dumps(config))
    lowbit.AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored["linear_weights_not_to_quantize"] == (["lm_head", "lm_head.weight"] if names else [])
    assert stored["quant_method"] == "aqlm"


def test_plain_transformers_loads_it_when_registered(source: Path) -> None:
    wanted = tiny.logits(lowbit.AutoModelForCausalLM.from_pretrained(source), "llama")
    lowbit.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
    finally:
        lowbit.unregister()
    assert torch.equal(tiny.logits(model, "llama"), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_made_on_the_fly_and_reloads_to_the_bit(dense: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = lowbit.AqlmConfig(num_codebooks=2, nbits_per_codebook=5, epochs=1, beam=2, seed=7)
    with pytest.warns(UserWarning, match="AQLM without calibration data"):
        model = lowbit.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 14 and {layer.spec.scale.dtype for layer in layers.values()} == {stored}
    weights, total = load_file(dense / "model.safetensors"), 0.0
    for name, layer in layers.items():
        wanted = weights[f"{name}.weight"].float()
        total += float((layer.quant_tensor().dequantize() - wanted).square().sum() / wanted.square().sum())
    assert total / 14 < 0.25
    before = tiny.logits(model, "llama")
    model.save_pretrained(tmp_path / "made")
    described = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "lm_head.weight"} <= set(described["linear_weights_not_to_quantize"])
    assert not {"beam", "epochs", "seed"} & set(described)
    again = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=dtype)
    assert torch.equal(tiny.logits(again, "llama"), before)
    for name, layer in layers.items():
        assert again.get_submodule(name).quant_tensor().equal(layer.quant_tensor())


def test_layers_that_tiles_do_not_divide_stay_dense(dense: Path) -> None:
    config = lowbit.AqlmConfig(in_group_size=128, num_codebooks=1, nbits_per_codebook=4, epochs=0)
    with pytest.warns(UserWarning, match="AQLM without calibration data"):
        model = lowbit.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert layers == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert "model.layers.0.mlp.up_proj" in model.config.quantization_config.linear_weights_not_to_quantize


def test_wrong_arguments() -> None:
    for wrong in ({"in_group_size": "8"}, {"num_codebooks": 1.5}, {"nbits_per_codebook": None}):
        with pytest.raises(TypeError):
            lowbit.AqlmConfig(**wrong)
    for names in ("lm_head", [3]):
        with pytest.raises(ValueError, match="list of strings"):
            lowbit.AqlmConfig(linear_weights_not_to_quantize=names)
    assert lowbit.AqlmConfig().to_dict() == transformers.AqlmConfig().to_dict()
    with pytest.raises(PlanError, match="beam is 0"):
        lowbit.AqlmConfig(beam=0)


def test_a_config_that_contradicts_the_file_is_refused(source: Path) -> None:
    with pytest.raises(PlanError, match="num_codebooks"):
        lowbit.AutoModelForCausalLM.from_pretrained(source, quantization_config=lowbit.AqlmConfig(num_codebooks=3))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_takes_the_file_one_layer_and_a_constant(source: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8, vocab_size=1024
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    settings = AqlmSettings(2, 8, 8, 1)
    stored: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("proj.weight"):
            weight = random_weight(settings, (parameter.shape[0], parameter.shape[1]))
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": value for part, value in WIRE.write(settings, weight).items()}
        else:
            stored[name] = torch.zeros(parameter.shape, dtype=torch.float16)
    (tmp_path / "large").mkdir()
    save_file(stored, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    described = config.to_dict() | {"quantization_config": WIRE.config(settings), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "large" / "config.json").write_text(json.dumps(described))
    command = [sys.executable, "-c", PROBE, str(source), str(tmp_path / "large")]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert measured["peak"] < size + LAYER + CONSTANT < 2 * sum(p.numel() for p in model.parameters())
    assert measured["footprint"] < size
    assert measured["generating"] < LAYER + CONSTANT


def edited(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_codes_transposed_by_an_earlier_forward(source: Path) -> None:
    before = {name: tensor.dequantize() for name, tensor in open_checkpoint(source).weights.items()}

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".codes")]:
            tensors[name] = tensors[name].transpose(0, 1).contiguous()

    after = open_checkpoint(edited(source, turn)).weights
    assert all(torch.equal(after[name].dequantize(), weight) for name, weight in before.items())
    lowbit.AutoModelForCausalLM.from_pretrained(source)


def test_a_weight_of_another_shape_than_the_module(source: Path) -> None:
    name = "model.layers.1.mlp.up_proj"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.codes"] = tensors[f"{name}.codes"][:, :4].contiguous()

    with pytest.raises(FormatError, match=f"{name}: the weight is not the module's"):
        lowbit.AutoModelForCausalLM.from_pretrained(edited(source, cut))
