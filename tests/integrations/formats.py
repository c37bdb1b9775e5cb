"""One config for every format that lowbit quantizes to on the fly, and a checkpoint for the one that it only reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.core import QuantTensor
from lowbit.wire.aqlm import AqlmWire

AQLM = {
    "quant_method": "aqlm",
    "in_group_size": 8,
    "out_group_size": 1,
    "num_codebooks": 2,
    "nbits_per_codebook": 8,
    "linear_weights_not_to_quantize": ["lm_head.weight"],
}


def preset(name: str) -> Any:
    return lowbit.CompressedTensorsConfig(config_groups={name: ["Linear"]}, ignore=["lm_head"])


CONFIGS: dict[str, Callable[[], Any]] = {
    "bitsandbytes-nf4": lambda: lowbit.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes-int8": lambda: lowbit.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: lowbit.GPTQConfig(4, group_size=64),
    "awq": lambda: lowbit.AwqConfig(4, group_size=64),
    "hqq": lambda: lowbit.HqqConfig(4, group_size=64),
    "hqq-axis0": lambda: lowbit.HqqConfig(3, group_size=64, axis=0),
    "quanto-int4": lambda: lowbit.QuantoConfig("int4"),
    "quanto-float8": lambda: lowbit.QuantoConfig("float8"),
    "torchao-int8": lambda: lowbit.TorchAoConfig("int8_weight_only"),
    "torchao-int8-dynamic": lambda: lowbit.TorchAoConfig("int8_dynamic_activation_int8_weight"),
    "torchao-int4": lambda: lowbit.TorchAoConfig("int4_weight_only", group_size=64),
    "compressed-tensors-W4A16": lambda: preset("W4A16"),
    "compressed-tensors-FP8_DYNAMIC": lambda: preset("FP8_DYNAMIC"),
    "compressed-tensors-NVFP4A16": lambda: preset("NVFP4A16"),
    "eetq": lambda: lowbit.EetqConfig("int8"),
    "fbgemm_fp8": lowbit.FbgemmFp8Config,
    "gguf-Q4_K": lambda: lowbit.GgufConfig(type="Q4_K"),
    "gguf-TQ2_0": lambda: lowbit.GgufConfig(type="TQ2_0"),
}
FORMATS = [*CONFIGS, "aqlm"]


def make_dense(folder: Path) -> None:
    """A Llama of one block, with shapes that every format holds."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_checkpoint(name: str, dense: Path, folder: Path) -> None:
    """Write the dense model in a format."""
    if name == "aqlm":
        _write_aqlm(dense, folder)
        return
    model = lowbit.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=CONFIGS[name](), dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)


def _write_aqlm(dense: Path, folder: Path) -> None:
    """Random codes and codebooks, scaled to the weights that they stand for."""
    wire = AqlmWire()
    settings = wire.parse(AQLM)
    state = load_file(dense / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        weight = state.pop(name)
        spec, shape = wire.spec(settings), (weight.shape[0], weight.shape[1])
        tensors = {
            part: torch.randint(-128, 128, size, generator=generator).to(dtype)
            if not dtype.is_floating_point
            else torch.randn(size, generator=generator).to(dtype) * (0.1 if part == "codebooks" else 0.0)
            for part, (size, dtype) in spec.tensors(shape).items()
        }
        tensors["scales"] = tensors["scales"] + 1
        written = wire.write(settings, QuantTensor(spec, tensors, shape))
        state |= {f"{name.removesuffix('.weight')}.{suffix}": value for suffix, value in written.items()}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(dense / "generation_config.json", folder)
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": AQLM}))
