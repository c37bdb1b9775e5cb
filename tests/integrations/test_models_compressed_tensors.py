"""compressed-tensors through the front door: quantized on the fly, saved, loaded, made dense, and refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
import tiny
from lowbit.core import FloatCode
from lowbit.errors import FormatError, PlanError
from lowbit.nn import QuantLinear

ASYM = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny.save("llama", folder, torch.bfloat16)
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    config = {"quantization_config": lowbit.CompressedTensorsConfig(**arguments)} if arguments else {}
    return lowbit.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **config).eval()


def packed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def stored_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.fixture(scope="module")
def asym(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asym")
    load(llama, config_groups=ASYM).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        {"config_groups": ASYM},
        {"config_groups": {"MXFP4": ["Linear"]}},
        {"config_groups": {"NVFP4A16": ["re:.*mlp.*"], "W8A8": ["Linear"]}, "ignore": ["re:.*layers.0.*o_proj"]},
        {
            "config_groups": {
                "g": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
                    "input_activations": TOKENS,
                }
            }
        },
    ],
    ids=["asymmetric", "mxfp4", "mixed", "blocks"],
)
def test_on_the_fly_saved_and_loaded(llama: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = load(llama, **arguments)
    assert len(packed(model)) == (13 if "ignore" in arguments else 14)
    logits = tiny.logits(model, "llama")
    assert torch.isfinite(logits).all()
    dense = tiny.logits(load(llama), "llama")
    assert torch.nn.functional.cosine_similarity(logits.float(), dense.float(), dim=-1).min() > 0.9
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert packed(again) == packed(model)
    assert torch.equal(tiny.logits(again, "llama"), logits)
    config = stored_config(tmp_path)
    assert config["quantization_status"] == "compressed"
    assert "lm_head" in config["ignore"]
    assert [scheme["format"] for scheme in config["config_groups"].values()]


def test_the_config_alone_says_what_is_dense(llama: Path, tmp_path: Path) -> None:
    """Readers that go by targets find every layer as the config says it is."""
    model = load(llama, config_groups=ASYM, ignore=["re:.*layers.1.mlp.*"])
    model.save_pretrained(tmp_path)
    config = stored_config(tmp_path)
    wire = lowbit.open_checkpoint(tmp_path).wire
    settings = wire.parse(config)
    linears = {name for name, module in load(llama).named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linears if wire.of(settings, name).schemes} == set(packed(model))


def test_a_target_that_matches_nothing_is_said(llama: Path) -> None:
    with pytest.warns(UserWarning, match="match no layer.*nowhere"):
        load(llama, config_groups={"W8A8": ["Linear"], "W8A16": ["re:.*nowhere"]})
    with pytest.raises(PlanError, match="nothing in this model"):
        load(llama, config_groups={"W8A8": ["re:.*nowhere"]})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"config_groups": {"FP8": ["Linear"]}}, "need calibration"),
        ({"config_groups": {"NVFP4": ["Linear"]}}, "need calibration"),
        ({"config_groups": {"UNQUANTIZED": ["Linear"]}}, "quantizes no weights"),
        ({}, "quantizes no weights"),
        ({"config_groups": ASYM, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"config_groups": ASYM, "sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"group_size": 32, "actorder": "group"}}}},
            "actorder",
        ),
    ],
)
def test_what_needs_data_is_refused_on_the_fly(llama: Path, arguments: dict[str, Any], reason: str) -> None:
    config = lowbit.CompressedTensorsConfig(**arguments)
    with pytest.raises(PlanError, match=reason):
        lowbit.AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)


def test_groups_that_dont_divide_are_kept_and_said(llama: Path) -> None:
    model = load(llama, config_groups={"W4A16": ["Linear"]})  # groups of 128: only down_proj has as many inputs
    assert all(name.endswith("down_proj") for name in packed(model))
    assert "don't divide" in str(model.hf_quantizer.plan)


@pytest.mark.parametrize("arguments", [{"dequantize": True}, {"run_compressed": False}])
def test_dense_on_request(asym: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = load(asym, **arguments)
    assert not packed(model) and not hasattr(model.config, "quantization_config")
    for name, module in load(asym).named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(model.get_submodule(name).weight, module.weight)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(tiny.logits(load(tmp_path), "llama"), tiny.logits(model, "llama"))


def test_a_config_that_contradicts_the_stored_one_is_refused(asym: Path) -> None:
    with pytest.raises(PlanError, match="config_groups"):
        load(asym, config_groups={"W8A8": ["Linear"]})
    assert packed(load(asym, config_groups=stored_config(asym)["config_groups"]))


@pytest.mark.parametrize("key", ["compression_config", "nested"])
def test_older_places_of_the_config(asym: Path, tmp_path: Path, key: str) -> None:
    config = json.loads((asym / "config.json").read_text())
    inner = config.pop("quantization_config")
    config |= {key: inner} if key != "nested" else {"quantization_config": {"quantization_config": inner}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(asym / "model.safetensors")
    assert torch.equal(tiny.logits(load(tmp_path), "llama"), tiny.logits(load(asym), "llama"))
    assert lowbit.open_checkpoint(tmp_path).format == "compressed-tensors"


def test_the_scales_of_a_cache_are_kept(asym: Path, tmp_path: Path) -> None:
    config = json.loads((asym / "config.json").read_text())
    # Two generations of files: beside attention, and beside the layers whose outputs are cached.
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    attention = [f"model.layers.{number}.self_attn." for number in (0, 1)]
    endings = ("k_scale", "v_scale", "k_proj.output_scale")
    scales = {path + ending: torch.ones(1) * len(ending) for path in attention for ending in endings}
    save_file({**load_file(asym / "model.safetensors"), **scales}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="4 scales for a quantized cache"):
        model = load(tmp_path)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in scales.items())
    assert stored_config(tmp_path / "again")["kv_cache_scheme"] == config["quantization_config"]["kv_cache_scheme"]


def test_a_sparse_model(llama: Path, tmp_path: Path) -> None:
    """A weight of every four has two that are not 0; layers that are none of the targets are stored as they are."""
    wire = lowbit.wire.wire_named("compressed-tensors")
    tensors = load_file(llama / "model.safetensors")
    sparsity = {
        "format": "sparse-24-bitmask",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "sparsity_structure": "2:4",
    }
    quantization = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    settings = wire.parse(quantization)
    stored, dense = {}, {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if "proj" not in name:
            stored[name] = weight
            continue
        weight[:, 1::2] = 0
        dense[name] = weight
        spec = lowbit.QuantSpec(FloatCode(weight.dtype), *wire_parts(wire, settings, module), dtype=weight.dtype)
        tensor = lowbit.QuantTensor(spec, {"codes": weight}, tuple(weight.shape))
        stored |= {f"{module}.{key}": value for key, value in wire.write(wire.of(settings, module), tensor).items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert all(
        torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, weight) for name, weight in dense.items()
    )
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert set(saved) == set(stored) and all(torch.equal(saved[name], value) for name, value in stored.items())


def wire_parts(wire: Any, settings: Any, module: str) -> tuple[Any, Any]:
    spec = wire.spec(wire.of(settings, module))
    return spec.scale, spec.grouping


def test_models_can_be_copied_pickled_and_compiled(llama: Path) -> None:
    model = load(llama, config_groups={"MXFP4": ["re:.*self_attn.*"], "FP8_DYNAMIC": ["Linear"]})
    logits = tiny.logits(model, "llama")
    assert torch.equal(tiny.logits(copy.deepcopy(model), "llama"), logits)
    recipe = model.hf_quantizer.recipe
    assert pickle.loads(pickle.dumps(recipe)).settings == recipe.settings
    inputs = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(inputs), layer(inputs))


def test_transformers_loads_with_lowbit_registered(asym: Path) -> None:
    import transformers

    lowbit.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(asym, dtype="auto")
        assert len(packed(model)) == 14
    finally:
        lowbit.unregister()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"quantization_status": "half"}, ValueError), ({"quant_method": "gptq"}, ValueError)],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        lowbit.CompressedTensorsConfig(**arguments)


def test_a_dict_is_as_good_as_an_object(llama: Path) -> None:
    asked = {"quant_method": "compressed-tensors", "config_groups": {"W8A8": ["Linear"]}}
    model = lowbit.AutoModelForCausalLM.from_pretrained(llama, dtype="auto", quantization_config=asked)
    assert len(packed(model)) == 14
    with pytest.raises(FormatError, match="unknown preset"):
        lowbit.AutoModelForCausalLM.from_pretrained(
            llama, quantization_config={"quant_method": "compressed-tensors", "config_groups": {"W9A9": ["Linear"]}}
        )


def test_experts_and_their_router(tmp_path: Path) -> None:
    tiny.save("mixtral", tmp_path / "dense", torch.bfloat16)
    model = load(tmp_path / "dense", config_groups={"MXFP4": ["re:.*experts.*"], "FP8_DYNAMIC": ["Linear"]})
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["model.layers.0.block_sparse_moe.experts.0.w1.weight_packed"].dtype == torch.uint8
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert r"re:.*\.gate$" in stored_config(tmp_path / "packed")["ignore"]
    assert torch.equal(tiny.logits(load(tmp_path / "packed"), "mixtral"), tiny.logits(model, "mixtral"))
