"""compressed-tensors: every variant that its library can make, in both directions, to the bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from apart import require, run
from lowbit.algorithms.minmax import MinMax
from lowbit.core import QuantTensor, linear
from lowbit.errors import PlanError
from lowbit.nn import QuantLinear
from lowbit.wire.compressed_tensors import PRESETS, CompressedTensorsWire

require("compressed_tensors")
SCRIPT = "original_compressed_tensors.py"
WIRE = CompressedTensorsWire()
SHAPE = [96, 256]


def config(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **more}
    return {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}}


def integers(bits: int, strategy: str = "group", symmetric: bool = False, **more: Any) -> dict[str, Any]:
    data = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **more}
    return {**data, "group_size": 32} if strategy == "group" else data


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
BLOCK = {"block_structure": [32, 64]}
VARIANTS: dict[str, tuple[dict[str, Any], str, list[int]]] = {
    **{
        name: ({**config({}), "config_groups": {name: ["Linear"]}}, "bfloat16", [160, 256])
        for name in PRESETS
        if name != "UNQUANTIZED"
    },
    **{f"asym_{bits}": (config(integers(bits)), "float16", SHAPE) for bits in range(2, 9)},
    **{f"rows_{bits}": (config(integers(bits, "channel")), "float32", [90, 260]) for bits in range(2, 9)},
    **{f"rows_sym_{bits}": (config(integers(bits, "channel", True)), "bfloat16", [90, 260]) for bits in range(2, 9)},
    "tensor_asym": (config(integers(4, "tensor")), "float16", SHAPE),
    "tensor_sym": (config(integers(4, "tensor", True)), "float32", SHAPE),
    "block_asym": (config(integers(5, "block", **BLOCK)), "bfloat16", SHAPE),
    "actorder_weight": (config(integers(4, actorder="weight")), "bfloat16", SHAPE),
    "int8_asym": (config(integers(8, "channel"), {**TOKENS, "symmetric": False}), "float32", SHAPE),
    "int8_tensor_asym": (config(integers(8, "tensor"), TOKENS), "bfloat16", SHAPE),
    "int8_block": (config(integers(8, "block", **BLOCK), TOKENS), "float16", SHAPE),
    "int4_stored_wide": (config(integers(4), TOKENS), "bfloat16", SHAPE),
    "static_asym": (
        config(integers(8, "channel", True), integers(8, "tensor"), output_activations=None),
        "bfloat16",
        SHAPE,
    ),
    "outputs": (
        config(
            integers(8, "channel", True), integers(8, "tensor", True), output_activations=integers(8, "tensor", True)
        ),
        "float16",
        SHAPE,
    ),
    "fp8_float16": (config(FP8, FP8), "float16", SHAPE),
    "fp8_per_tensor_dynamic": (config(FP8, {**FP8, "dynamic": True}), "bfloat16", SHAPE),
    "naive_fp8": (config({**FP8, "strategy": "channel"}), "bfloat16", SHAPE),
    "naive_fp8_groups": (config({**FP8, "strategy": "group", "group_size": 64}), "float32", SHAPE),
    "declared_naive_int": (config(integers(8, "channel", True), format="naive-quantized"), "bfloat16", SHAPE),
}


MODELS: dict[str, dict[str, Any]] = {
    "packed": {**config(integers(4)), "ignore": ["lm_head", r"re:.*layers\.1\.mlp\.down_proj$"]},
    "fp8": {**config({}), "config_groups": {"FP8_DYNAMIC": ["Linear"]}, "ignore": ["lm_head"]},
    "mixed": {
        **config({}),
        "config_groups": {
            "first": {"targets": ["re:.*self_attn.*"], "weights": FP8, "input_activations": FP8},
            "second": {"targets": ["Linear"], "weights": integers(3, "channel", True)},
        },
        "ignore": ["lm_head"],
    },
    "nvfp4": {**config({}), "config_groups": {"NVFP4": ["Linear"]}, "ignore": ["lm_head"]},
    "cache": {
        **config({}),
        "config_groups": {"MXFP4A16": ["Linear"]},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "ignore": ["lm_head"],
    },
}
ON_THE_FLY: dict[str, dict[str, Any]] = {
    "made_int4": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": integers(4, symmetric=True)}}},
    "made_int8": {"config_groups": {"W8A8": ["Linear"]}, "ignore": ["re:.*o_proj"]},
    "made_mxfp8": {"config_groups": {"MXFP8": ["re:.*mlp.*"], "FP8_DYNAMIC": ["Linear"]}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the library stores, and what it makes of what lowbit writes: two runs of it in all.

    Per variant: ``NAME.safetensors``, and ``dense.safetensors`` with what it decompresses of lowbit's rewriting. Per
    model: the folder NAME, for those that lowbit made as well, and ``NAME.loaded`` with the weights and logits of plain
    Transformers.
    """
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "variants.json").write_text(json.dumps(VARIANTS))
    (folder / "models.json").write_text(json.dumps(MODELS))
    # Transformers can't load a packed weight with zero points but to make it dense.
    (folder / "load.json").write_text(
        json.dumps({name: {"dequantize": True} if name == "packed" else {} for name in (*MODELS, *ON_THE_FLY)})
    )
    save_dense(folder / "source")
    run(SCRIPT, folder, "weights", "models")
    (folder / "written").mkdir()
    for name in VARIANTS:
        settings, stored, _ = variant(folder, name)
        save_file(WIRE.write(settings, WIRE.read(settings, stored)), folder / "written" / f"{name}.safetensors")
        (folder / "written" / f"{name}.json").write_text(json.dumps(WIRE.config(settings)))
    for name, arguments in ON_THE_FLY.items():
        quantize(folder / "source", arguments).save_pretrained(folder / name)
    run(SCRIPT, folder, "decompress", "load")
    return folder


def save_dense(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, **sizes)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 13)[None]).logits


def quantize(folder: Path, arguments: dict[str, Any]) -> Any:
    asked = lowbit.CompressedTensorsConfig(**arguments)
    return lowbit.AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype="auto").eval()


def variant(folder: Path, name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tensors = load_file(folder / f"{name}.safetensors")
    stored = {key.removeprefix("stored."): value for key, value in tensors.items() if key.startswith("stored.")}
    settings = WIRE.of(WIRE.parse(json.loads((folder / f"{name}.json").read_text())), "layer")
    return settings, stored, tensors


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """To the bit, dtype and shape included."""
    raw = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def read(folder: Path, name: str) -> QuantTensor:
    settings, stored, _ = variant(folder, name)
    return WIRE.read(settings, stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_dequantize_to_the_librarys_bits(made: Path, name: str) -> None:
    tensor, (_, _, theirs) = read(made, name), variant(made, name)
    assert tensor.spec.dtype == theirs["dense"].dtype
    assert same(tensor.dequantize(tensor.spec.dtype), theirs["dense"])


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_again_has_the_same_bytes(made: Path, name: str) -> None:
    settings, stored, _ = variant(made, name)
    written = WIRE.write(settings, WIRE.read(settings, stored))
    assert set(written) == set(stored)
    assert all(same(written[key], stored[key]) for key in stored)
    layout = WIRE.expected(settings, WIRE.read(settings, stored).spec, WIRE.read(settings, stored).shape)
    assert {key: (tuple(value.shape), value.dtype) for key, value in stored.items()} == layout


@pytest.mark.parametrize("name", VARIANTS)
def test_the_library_decompresses_what_lowbit_wrote(made: Path, name: str) -> None:
    theirs = load_file(made / "dense.safetensors")[name]
    assert same(theirs, variant(made, name)[2]["dense"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_gives_the_librarys_outputs(made: Path, name: str) -> None:
    """Activations are rounded to the same bits, so that nothing is left but the order of a sum."""
    tensor, theirs = read(made, name), variant(made, name)[2]
    if "outputs" not in theirs:
        pytest.skip("the library's own layer can't run: its weight has another dtype than its inputs")
    ours = linear(theirs["inputs"], tensor.spec, tensor.tensors, tensor.shape)
    assert torch.equal(ours, theirs["outputs"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_spec_leads_back_to_the_scheme(made: Path, name: str) -> None:
    tensor = read(made, name)
    settings = WIRE.settings_for(tensor.spec)
    again = WIRE.parse(WIRE.config(WIRE.join({"a": settings}, ["lm_head"])))
    assert WIRE.spelling(WIRE.of(again, "a"), tensor.spec) == tensor.spec
    assert WIRE.read(WIRE.of(again, "a"), WIRE.write(WIRE.of(again, "a"), tensor)).equal(tensor)


@pytest.mark.parametrize("name", VARIANTS)
def test_rounding_to_nearest_gives_the_librarys_codes_and_scales(made: Path, name: str) -> None:
    tensor = read(made, name)
    original = variant(made, name)[2]["original"]
    if tensor.spec.activation.tensors():
        with pytest.raises(PlanError, match="calibration"):
            MinMax().quantize(original, tensor.spec)
        tensor = WIRE.read(*without_activations(made, name))
    assert MinMax().quantize(original, tensor.spec).equal(tensor)


def without_activations(folder: Path, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    settings, stored, _ = variant(folder, name)
    scheme = replace(settings.scheme, inputs=None, outputs=None, format=settings.module_format)
    weight_alone = {key: value for key, value in stored.items() if key.startswith("weight")}
    return replace(settings, schemes=(scheme,)), weight_alone


def load(folder: Path, name: str) -> Any:
    caches = pytest.warns(UserWarning, match="scales for a quantized cache") if name == "cache" else nullcontext()
    with caches:
        return lowbit.AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval()


def assert_same_model(model: Any, folder: Path, name: str) -> None:
    theirs = load_file(folder / f"{name}.loaded")
    logits = theirs.pop("logits")
    assert len(theirs) == 14
    for key, weight in theirs.items():
        assert torch.equal(model.get_submodule(key.removesuffix(".weight")).weight, weight), key
    if name == "cache":  # which the library rounds and lowbit doesn't
        return
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_the_library_wrote_gives_its_logits_and_is_saved_to_its_bytes(
    made: Path, name: str, tmp_path: Path
) -> None:
    model = load(made, name)
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == (13 if name == "packed" else 14)
    assert_same_model(model, made, name)
    model.save_pretrained(tmp_path)
    stored, saved = (load_file(path / "model.safetensors") for path in (made / name, tmp_path))
    assert set(stored) == set(saved) and all(same(stored[key], saved[key]) for key in stored)
    configs = [
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (made / name, tmp_path)
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ON_THE_FLY)
def test_plain_transformers_loads_what_lowbit_quantized(made: Path, name: str) -> None:
    assert_same_model(load(made, name), made, name)
    again = quantize(made / "source", ON_THE_FLY[name])
    assert torch.equal(logits_of(load(made, name)), logits_of(again))
