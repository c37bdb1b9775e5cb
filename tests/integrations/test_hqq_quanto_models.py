"""HQQ and quanto through the Auto classes: quantized on the fly, saved, loaded again; placed, sharded, copied."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import lowbit
import tiny
from lowbit.core import Kept, QuantTensor
from lowbit.errors import PlanError
from lowbit.wire.hqq.wire import HqqSettings, HqqWire
from lowbit.wire.quanto import QMAP
from test_memory import CONSTANT, LAYER, PROBE

CONFIGS: dict[str, Callable[[], Any]] = {
    "hqq-1": lambda: lowbit.HqqConfig(1, 16),
    "hqq-3-whole": lambda: lowbit.HqqConfig(3, None),
    "hqq-4-axis0": lambda: lowbit.HqqConfig(4, 32, axis=0),
    "hqq-8-float": lambda: lowbit.HqqConfig(8, view_as_float=True),
    "quanto-int2": lambda: lowbit.QuantoConfig("int2"),
    "quanto-int4": lambda: lowbit.QuantoConfig("int4"),
    "quanto-int8": lowbit.QuantoConfig,
    "quanto-float8": lambda: lowbit.QuantoConfig("float8"),
    "quanto-e5m2": lambda: lowbit.QuantoConfig("float8_e5m2"),
}
load = lowbit.AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny.save("llama", folder)
    return folder


@pytest.mark.parametrize("method", CONFIGS)
def test_quantized_saved_and_loaded_in_pieces(method: str, dense: Path, tmp_path: Path) -> None:
    model = load(dense, quantization_config=CONFIGS[method](), dtype=torch.bfloat16)
    assert len(model.hf_quantizer.plan.quantized) == 14
    outputs = tiny.logits(model, "llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert (tmp_path / QMAP).is_file() == method.startswith("quanto")
    reloaded = load(tmp_path, dtype="auto")
    assert torch.equal(tiny.logits(reloaded, "llama"), outputs)
    assert reloaded.hf_quantizer.plan.quantized == model.hf_quantizer.plan.quantized
    assert lowbit.open_checkpoint(tmp_path).plan.quantized == model.hf_quantizer.plan.quantized


@pytest.mark.parametrize("method", ["hqq-3-whole", "quanto-int4"])
@pytest.mark.parametrize("kind", ["opt", "t5", "mixtral", "bert"])
def test_other_architectures(method: str, kind: str, tmp_path: Path) -> None:
    tiny.save(kind, tmp_path / "dense")
    loader = tiny.auto(kind, lowbit)
    model = loader.from_pretrained(tmp_path / "dense", quantization_config=CONFIGS[method](), dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    reloaded = loader.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny.logits(reloaded, kind), tiny.logits(model, kind))


@pytest.mark.parametrize("method", ["hqq-1", "quanto-int4"])
def test_moving_copying_and_giving_up(method: str, dense: Path, tmp_path: Path) -> None:
    """Under the name of HQQ, Transformers' own `to` wants its package."""
    model = load(dense, quantization_config=CONFIGS[method](), device_map="cpu").to("cpu")
    outputs = tiny.logits(model, "llama")
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        twin.get_submodule("model.norm").weight.data.zero_()
        twin.save_pretrained(tmp_path / str(number))
        assert not load(tmp_path / str(number)).get_submodule("model.norm").weight.any()
        assert (tmp_path / str(number) / QMAP).is_file() == (method == "quanto-int4")
    assert torch.equal(tiny.logits(model, "llama"), outputs)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").dequantize(torch.float32)
    plain = model.dequantize()
    assert torch.equal(plain.get_submodule("model.layers.0.mlp.up_proj").weight, weight)


def test_dynamic_config_leaves_others_dense(dense: Path, tmp_path: Path) -> None:
    config = lowbit.HqqConfig(
        dynamic_config={"mlp.up_proj": {"nbits": 2, "group_size": 16}, "self_attn.q_proj": {"nbits": 8, "axis": 0}}
    )
    model = load(dense, quantization_config=config, dtype=torch.float32)
    specs = {name.partition(".")[2]: str(spec) for name, spec in model.hf_quantizer.plan.quantized.items()}
    assert specs == {
        f"layers.{layer}.{name}": text
        for layer in range(2)
        for name, text in (
            ("self_attn.q_proj", "uint8, tiles of 0 x 1, float zero"),
            ("mlp.up_proj", "uint2, groups of 16, float zero"),
        )
    }
    kept = model.hf_quantizer.plan.kept["model.layers.0.mlp.down_proj"]
    assert kept == Kept("no tag of dynamic_config is 'mlp.down_proj'")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_config"]
    assert stored["mlp.up_proj"]["weight_quant_params"]["nbits"] == 2
    assert torch.equal(tiny.logits(load(tmp_path, dtype=torch.float32), "llama"), tiny.logits(model, "llama"))


def test_skip_modules_are_tags_or_names(dense: Path) -> None:
    skip = ["lm_head", "mlp.up_proj", "model.layers.1"]
    plan = load(dense, quantization_config=lowbit.HqqConfig(skip_modules=skip)).hf_quantizer.plan
    assert all(".0." in name and "up_proj" not in name for name in plan.quantized)
    assert len(plan.quantized) == 6


def test_old_arguments_of_hqq_have_no_effect() -> None:
    with pytest.warns(UserWarning, match="quant_zero, offload_meta has no effect"):
        config = lowbit.HqqConfig(quant_zero=True, quant_scale=False, offload_meta=True)
    assert config.to_dict() == lowbit.HqqConfig().to_dict()
    data = lowbit.HqqConfig(3, 16, axis=0, skip_modules=["a"]).to_dict()
    assert lowbit.HqqConfig.from_dict(data).to_dict() == data
    assert (
        lowbit.HqqConfig.from_dict({"nbits": 3, "group_size": 16, "axis": 0, "skip_modules": ["a"]}).to_dict() == data
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"nbits": 7},
        {"nbits": 4.5},
        {"axis": 2},
        {"group_size": 20},
        {"group_size": 0},
        {"dynamic_config": 3},
        {"dynamic_config": {"mlp.up_proj": 3}},
        {"dynamic_config": {"mlp.up_proj": {"nbits": 9}}},
    ],
)
def test_arguments_of_hqq_that_are_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="range|multiple|maps tags|an object"):
        lowbit.HqqConfig(**arguments)


@pytest.mark.parametrize("arguments", [{"weights": "int3"}, {"activations": "int4"}, {"qmap": {}}])
def test_arguments_of_quanto_that_are_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="range|non-empty"):
        lowbit.QuantoConfig(**arguments)


def test_ternary_weights_are_not_made(dense: Path) -> None:
    with pytest.raises(PlanError, match=r"1\.58 bits are read but not made"):
        load(dense, quantization_config=lowbit.HqqConfig(1.58))


def test_configs_as_objects_and_dicts_of_transformers(dense: Path) -> None:
    for config in (
        transformers.QuantoConfig(weights="int4"),
        {"quant_method": "quanto", "weights": "int2"},
        {"quant_method": "hqq", "nbits": 2, "group_size": 16},
        lowbit.HqqConfig(2).to_dict(),
    ):
        assert len(load(dense, quantization_config=config).hf_quantizer.plan.quantized) == 14


def test_a_map_says_how_each_module_is_quantized(dense: Path, tmp_path: Path) -> None:
    """Also on the fly, and it is stored where types differ."""
    four, eight = ({"weights": name, "activations": "none"} for name in ("qint4", "qint8"))
    names = [name for name in load(dense).state_dict() if name.endswith("proj.weight")]
    qmap = {name.removesuffix(".weight"): eight if "down" in name else four for name in names}
    model = load(dense, quantization_config=lowbit.QuantoConfig(qmap=qmap), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / QMAP).read_text()) == qmap
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["qmap"] == qmap
    assert torch.equal(tiny.logits(load(tmp_path, dtype=torch.float32), "llama"), tiny.logits(model, "llama"))
    same = lowbit.QuantoConfig(qmap=dict.fromkeys(qmap, eight))
    assert (same.weights, same.activations, same.qmap) == ("int8", None, None)


def test_gpt2_is_kept_in_its_own_layout(tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path / "dense")
    for name in ("hqq-3-whole", "quanto-int4"):
        model = load(tmp_path / "dense", quantization_config=CONFIGS[name](), dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        assert torch.equal(tiny.logits(load(tmp_path / name, dtype=torch.float32), "gpt2"), tiny.logits(model, "gpt2"))


def test_a_saved_model_is_freed(dense: Path, tmp_path: Path) -> None:
    model = load(dense, quantization_config=lowbit.QuantoConfig())
    model.save_pretrained(tmp_path)
    layer = weakref.ref(model.get_submodule("model.layers.0.mlp.up_proj"))
    del model
    gc.collect()
    assert layer() is None


def random_hqq(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    wire, settings = HqqWire(), HqqSettings(4, 64)
    spec = wire.spec_for(settings, shape, torch.float16)
    layout = spec.tensors(shape)
    tensors = {
        "codes": torch.randint(0, 256, layout["codes"][0], dtype=torch.uint8),
        "scales": torch.rand(layout["scales"][0]).to(torch.float16),
        "zeros": torch.rand(layout["zeros"][0]).to(torch.float16),
    }
    return wire.write(settings, QuantTensor(spec, tensors, shape).validate())


def pack(config: transformers.LlamaConfig, folder: Path) -> int:
    """Write a model with random HQQ weights; returns its size in fp16, were it dense."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    stored = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items() if "proj" not in name}
    for name in shapes.keys() - stored.keys():
        own = random_hqq((shapes[name][0], shapes[name][1]))
        stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in own.items()}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    data = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    data["quantization_config"] = HqqWire().config(HqqSettings(4, 64))
    (folder / "config.json").write_text(json.dumps(data))
    return sum(shape.numel() * 2 for shape in shapes.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory_of_loading_hqq(tmp_path: Path) -> None:
    """File size, one layer and a constant; measured in a process of its own."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8, "vocab_size": 1024}
    pack(transformers.LlamaConfig(num_hidden_layers=1, **sizes), tmp_path / "small")
    dense_size = pack(transformers.LlamaConfig(num_hidden_layers=12, **sizes), tmp_path / "large")
    command = [sys.executable, "-c", PROBE, str(tmp_path / "small"), str(tmp_path / "large")]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert measured["peak"] < size + LAYER + CONSTANT < dense_size
    assert measured["footprint"] < size
    assert measured["generating"] < LAYER + CONSTANT
