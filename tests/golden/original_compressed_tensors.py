"""compressed-tensors itself: makes weights of every variant, and decompresses what lowbit wrote.

Usage: ``original_compressed_tensors.py FOLDER TASK...``

``weights``: reads ``variants.json`` (name -> config, dtype, shape), writes per variant ``NAME.safetensors``: what it
stores (``stored.*``), the weight that it decompresses (``dense``), inputs and what its layer makes of them.
``decompress``: reads ``NAME.safetensors`` and ``NAME.json`` of ``written``, writes ``dense.safetensors`` by name.
``models``: reads the dense model in ``source`` and ``models.json`` (name -> config), writes a checkpoint for each.
``load``: loads the checkpoints named in ``load.json`` (name -> arguments of a config) with plain Transformers, writes
weights and logits for each.
"""

# ruff: noqa: E402 - the path is cleared before anything is imported
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def hide_the_others(folder: Path) -> None:
    """Leave nothing on the path but what is needed: Transformers imports every library that it finds, for seconds."""
    for name in [name for name in sys.path if (Path(name) / "compressed_tensors").is_dir()]:
        sys.path.remove(name)
        folder.mkdir(exist_ok=True)
        for kind in ("compressed_tensors*", "loguru*"):
            for found in Path(name).glob(kind):
                if not (folder / found.name).exists():
                    (folder / found.name).symlink_to(found)
        sys.path.append(str(folder))


hide_the_others(Path(sys.argv[1]) / "path")

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def extremes(value: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of what shares a scale."""
    if args.strategy == "tensor":
        return value.amin().reshape(1), value.amax().reshape(1)
    if args.strategy == "channel":
        return value.amin(1, keepdim=True), value.amax(1, keepdim=True)
    if args.strategy == "block":
        rows, cols = args.block_structure
        padded = torch.nn.functional.pad(value, (0, -value.shape[1] % cols, 0, -value.shape[0] % rows))
        tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, cols)).transpose(1, 2).flatten(2)
        return tiles.amin(-1), tiles.amax(-1)
    groups = value.unflatten(-1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def fill(module: torch.nn.Module, name: str, value: torch.Tensor, args: QuantizationArgs) -> None:
    """Give a layer the scales and zero points that a plain minimum and maximum lead to."""
    shared = None
    if args.strategy == "tensor_group":
        shared = generate_gparam(value.amin(), value.amax())
        getattr(module, f"{name}_global_scale").data = shared
    if args.dynamic:
        return
    scale, zero = calculate_qparams(*extremes(value, args), args, global_scale=shared)
    parameter = getattr(module, f"{name}_scale")
    parameter.data = scale.reshape(parameter.shape).to(parameter.dtype)
    if hasattr(module, f"{name}_zero_point"):
        getattr(module, f"{name}_zero_point").data = zero.reshape(parameter.shape)


def quantize(model: torch.nn.Module, config: dict[str, Any], inputs: torch.Tensor | None) -> ModelCompressor:
    parsed = QuantizationConfig.model_validate(config)
    apply_quantization_config(model, parsed, show_progress=False)
    for module in model.modules():
        for name in ("k_scale", "v_scale"):  # of attention, whose cache is quantized
            if hasattr(module, name):
                getattr(module, name).data.fill_(0.01)
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        fill(module, "weight", module.weight.data, scheme.weights)
        width = module.weight.shape[1]
        seen = torch.randn(8, width, dtype=module.weight.dtype) if inputs is None else inputs
        if scheme.input_activations:
            fill(module, "input", seen, scheme.input_activations)
        if scheme.output_activations:
            fill(module, "output", torch.nn.functional.linear(seen, module.weight), scheme.output_activations)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


def weights(folder: Path) -> None:
    for name, (config, dtype, (rows, cols)) in json.loads((folder / "variants.json").read_text()).items():
        torch.manual_seed(len(name))
        inputs = torch.randn(2, 5, cols).to(DTYPES[dtype])
        model = torch.nn.Module()
        model.layer = torch.nn.Linear(cols, rows, bias=False)
        with torch.no_grad():
            model.layer.weight.mul_(torch.rand(rows, 1) * 4)
            model.layer.weight[:, cols // 2 :].add_(0.01)
        model.to(DTYPES[dtype])
        saved = {"original": model.layer.weight.detach().clone(), "inputs": inputs}
        compressor = quantize(model, config, inputs)
        saved |= {f"stored.{key}": value.clone() for key, value in model.layer.state_dict().items()}
        written = compressor.quantization_config.model_dump()
        compressor.decompress_model(model)
        saved["dense"] = model.layer.weight.detach()
        if saved["dense"].dtype == inputs.dtype:
            saved["outputs"] = model.layer(inputs).detach()
        save_file({key: value.contiguous() for key, value in saved.items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(written, default=str))


def decompress(folder: Path) -> None:
    dense = {}
    for path in sorted((folder / "written").glob("*.safetensors")):
        config = QuantizationConfig.model_validate(json.loads(path.with_suffix(".json").read_text()))
        (scheme,) = config.config_groups.values()
        spelled = scheme.format or infer_module_format(torch.nn.Linear, scheme)
        compressor = BaseCompressor.get_value_from_registry(getattr(spelled, "value", spelled))
        dense[path.stem] = compressor.decompress(load_file(path), scheme)["weight"].contiguous()
    save_file(dense, folder / "dense.safetensors")


def models(folder: Path) -> None:
    import transformers

    for name, config in json.loads((folder / "models.json").read_text()).items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", dtype="auto")
        compressor = quantize(model, config, None)
        model.save_pretrained(folder / name)
        compressor.update_config(folder / name)


def load(folder: Path) -> None:
    import transformers

    for name, arguments in json.loads((folder / "load.json").read_text()).items():
        config = {"quantization_config": transformers.CompressedTensorsConfig(**arguments)} if arguments else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto", **config).eval()
        with torch.no_grad():
            logits = model(torch.arange(3, 13)[None]).logits
        dense = {key: value.contiguous() for key, value in model.state_dict().items() if key.endswith("proj.weight")}
        save_file({"logits": logits, **dense}, (folder / name).with_suffix(".loaded"))


if __name__ == "__main__":
    for task in sys.argv[2:]:
        {"weights": weights, "decompress": decompress, "models": models, "load": load}[task](Path(sys.argv[1]))
