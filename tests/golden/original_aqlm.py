"""AQLM itself, in a process of its own: ``write FOLDER`` makes layers and models, ``read FOLDER`` reads lowbit's.

Its codebooks are random here: how they are learned is no part of the format, and no part of this library.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
from safetensors.torch import load_file, save_file
from transformers.quantizers.quantizer_aqlm import replace_with_aqlm_linear

# codebooks, bits, out group, in group
VARIANTS = {
    "1x16": (1, 16, 1, 8),
    "2x8": (2, 8, 1, 8),
    "8x8": (8, 8, 1, 32),
    "4x8": (4, 8, 1, 16),
    "1x12": (1, 12, 1, 4),
    "3x5": (3, 5, 2, 4),
    "5x10": (5, 10, 4, 8),
    "1x18": (1, 18, 2, 2),
    "2x1": (2, 1, 1, 8),
}
MODELS = {"1x10": (1, 10, 1, 8), "2x8": (2, 8, 1, 8), "2x8-tiles": (2, 8, 2, 4)}


def fill(layer: QuantizedLinear, dtype: torch.dtype) -> None:
    """Random numbers of the size that weights have; codes use the whole range."""
    bits = layer.nbits_per_codebook
    codes = torch.randint(0, 2**bits, layer.codes.shape)
    codes.view(-1)[:2] = torch.tensor([0, 2**bits - 1])
    layer.codes.data = pack_int_data(codes, bits)
    layer.codebooks.data = torch.randn(layer.codebooks.shape).to(dtype)
    layer.scales.data = (torch.rand(layer.scales.shape) * 0.05 + 0.01).to(dtype)


def dense(layer: QuantizedLinear) -> torch.Tensor:
    codes = layer.codes.data
    if codes.shape[0] != layer.out_features // layer.out_group_size:
        codes = codes.transpose(0, 1)
    return _dequantize_weight(unpack_int_data(codes, layer.nbits_per_codebook), layer.codebooks, layer.scales)


def make(variant: tuple[int, ...], shape: tuple[int, int]) -> QuantizedLinear:
    codebooks, bits, out_group, in_group = variant
    return QuantizedLinear(shape[1], shape[0], in_group, out_group, codebooks, bits, bias=False)


def write(folder: Path) -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, variant in VARIANTS.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            layer = make(variant, (32, 128))
            fill(layer, dtype)
            key = f"{name}.{str(dtype).removeprefix('torch.')}"
            tensors |= {f"{key}.{part}": value.clone() for part, value in layer.state_dict().items()}
            tensors[f"{key}.dense"] = dense(layer)
            if variant[1] == 8:
                layer.prepare_matmul_op(torch.zeros(1, 128))
                tensors[f"{key}.transposed"] = layer.codes.data.clone()
    save_file(tensors, folder / "layers.safetensors")
    for name, variant in MODELS.items():
        write_model(folder / name, variant)


def write_model(folder: Path, variant: tuple[int, ...]) -> None:
    codebooks, bits, out_group, in_group = variant
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=128, **sizes)).half()
    config = transformers.AqlmConfig(
        in_group, out_group, codebooks, bits, linear_weights_not_to_quantize=["lm_head.weight"]
    )
    replace_with_aqlm_linear(model.model, [], config)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for layer in layers.values():
        layer.to_empty(device="cpu")
        fill(layer, torch.float16)
    if bits == 8 and out_group == 1:
        for layer in layers.values():
            layer.prepare_matmul_op(torch.zeros(1, 64))  # as after a forward on the CPU
    model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = config.to_dict()
    (folder / "config.json").write_text(json.dumps(stored))
    save_file({name: dense(layer) for name, layer in layers.items()}, folder / "dense.st")


def read(folder: Path) -> None:
    """Load every model there with stock Transformers and AQLM; leave what its weights are."""
    for name in filter(lambda name: (folder / name).is_dir(), MODELS):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float16)
        layers = {key: module for key, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        save_file({key: dense(layer) for key, layer in layers.items()}, folder / name / "read.st")
    tensors = load_file(folder / "layers.safetensors")
    found = {}
    for key in {name.rpartition(".")[0] for name in tensors}:
        layer = make(VARIANTS[key.split(".")[0]], (32, 128))
        parts = {part: tensors[f"{key}.{part}"] for part in ("codes", "codebooks", "scales")}
        layer.to(parts["codebooks"].dtype).load_state_dict(parts)
        found[key] = dense(layer)
    save_file(found, folder / "layers_read.safetensors")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
