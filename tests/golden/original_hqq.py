"""What hqq itself makes of weights and models; and what it reads in what lowbit wrote.

``make FOLDER``: single weights in all variants, older ones, and checkpoints. ``read FOLDER``: dequantizes the weights
of ``ours.safetensors`` and runs the checkpoints under ``ours/``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import load_file, save_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 128}
IDS = torch.arange(3, 13)[None]
Tensors = dict[str, torch.Tensor]


def variants() -> dict[str, tuple[dict[str, Any], str, tuple[int, int]]]:
    """Arguments of hqq's config, compute dtype and shape, by name."""
    found: dict[str, tuple[dict[str, Any], str, tuple[int, int]]] = {}
    for bits in (8, 6, 5, 4, 3, 2, 1):
        for axis in (0, 1):
            for size in (32, None):
                dtype = "bfloat16" if size else "float16"
                found[f"{bits}-{axis}-{size}"] = ({"nbits": bits, "axis": axis, "group_size": size}, dtype, (48, 64))
        as_float = {"nbits": bits, "group_size": 64, "view_as_float": True}
        found[f"{bits}-float"] = (as_float, "bfloat16" if bits != 3 else "float32", (32, 128))
    found["ternary"] = ({"nbits": 1.58, "group_size": 32}, "bfloat16", (48, 64))
    found["straddling"] = ({"nbits": 4, "group_size": 64}, "float32", (48, 96))
    found["strided-straddling"] = ({"nbits": 2, "group_size": 72, "axis": 0}, "float32", (48, 96))
    return found


def dense(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + shape[1])) * 0.05
    weight[1] = 0
    weight[2] += 0.3
    return weight.to(dtype)


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def flat(state: dict[str, Any], prefix: str = "") -> Tensors:
    """A state dict with dictionaries in it, as tensors: what docs/formats/hqq.md tells to do with older files."""
    tensors: Tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= flat(value, "" if name == "meta" else f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, (torch.Size, tuple)):
            tensors[prefix + name] = torch.tensor(value)
        elif isinstance(value, (bool, int)):
            tensors[prefix + name] = torch.tensor(value, dtype=torch.int32)
        elif value is not None:
            tensors[prefix + name] = torch.tensor(list(str(value).encode()), dtype=torch.uint8)
    return tensors


def with_quantized_scales(weight: torch.Tensor, zero_too: bool, stacked: bool) -> HQQLinear:
    """As hqq 0.1 made them; the code that reads them is still there."""
    eight = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
    whole = {"nbits": 8, "channel_wise": False, "group_size": None, "optimize": False}
    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=0 if stacked else 1)
    layer = HQQLinear(None, config, compute_dtype=torch.float16, device="cpu", initialize=False)
    layer.quantize(weight, config["weight_quant_params"], eight, (eight if stacked else whole) if zero_too else None)
    layer.encoded_state_dict = False
    return layer


def weights(folder: Path) -> None:
    sources, states, dequantized = {}, {}, {}
    for name, (arguments, dtype, shape) in variants().items():
        sources[name] = dense(name, shape, DTYPES[dtype])
        config = BaseQuantizeConfig(**arguments)
        layer = HQQLinear(linear(sources[name]), config, compute_dtype=DTYPES[dtype], device="cpu")
        states |= {f"{name}/{key}": value.clone() for key, value in layer.state_dict().items()}
        dequantized[name] = layer.dequantize()
    for name, zero_too, stacked in (
        ("old-scale", False, False),
        ("old-both", True, False),
        ("old-stacked", True, True),
    ):
        layer = with_quantized_scales(dense(name, (64, 128), torch.float16), zero_too, stacked)
        dequantized[name] = layer.dequantize()
        state = flat(layer.state_dict())
        if stacked:  # What offload_meta did, which needs a GPU.
            state["zero_scale"] = torch.stack((state.pop("zero_q"), state.pop("scale_q")))
        states |= {f"{name}/{key}": value for key, value in state.items()}
    save_file(sources, folder / "sources.safetensors")
    save_file({name: value.contiguous() for name, value in states.items()}, folder / "states.safetensors")
    save_file({name: value.contiguous() for name, value in dequantized.items()}, folder / "dequantized.safetensors")


def checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=1, **SIZES)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    plain = {"nbits": 3, "group_size": 32}
    tagged = {
        "self_attn.q_proj": {"nbits": 8, "group_size": 64},
        "mlp.down_proj": {"nbits": 2, "group_size": 16, "axis": 0},
    }
    both: dict[str, Any] = {"plain": BaseQuantizeConfig(**plain)}
    both["tagged"] = {tag: BaseQuantizeConfig(**arguments) for tag, arguments in tagged.items()}
    for name, config in both.items():
        dtype = torch.float32 if name == "plain" else torch.bfloat16
        quantized = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=dtype)
        AutoHQQHFModel.quantize_model(quantized, config, compute_dtype=dtype, device="cpu")
        AutoHQQHFModel.save_to_safetensors(quantized, str(folder / name), verbose=False)
        layers = {key: layer for key, layer in quantized.named_modules() if isinstance(layer, HQQLinear)}
        save_file({key: layer.dequantize() for key, layer in layers.items()}, folder / f"{name}.safetensors")
        save_file({"logits": logits(folder / name)}, folder / f"{name}-logits.safetensors")
    for name, config in both.items():
        stored = json.loads((folder / name / "config.json").read_text())
        stored["quantization_config"] = {"quant_config": config, "quant_method": "hqq", "skip_modules": ["lm_head"]}
        target = folder / f"{name}-transformers"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(stored))
        (target / "model.safetensors").write_bytes((folder / name / "model.safetensors").read_bytes())


def logits(path: Path) -> torch.Tensor:
    """Of a checkpoint whose packed layers are made into hqq's; its own loader wants pickled files."""
    tensors = load_file(path / "model.safetensors")
    dtype = tensors["model.norm.weight"].dtype
    config = transformers.AutoConfig.from_pretrained(path)
    quantized = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name in [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]:
        quantized.set_submodule(name, HQQLinear(None, None, compute_dtype=dtype, device="cpu"))
    quantized.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        return quantized(IDS).logits.contiguous()


def load(state: Tensors, dtype: torch.dtype) -> HQQLinear:
    layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    layer.load_state_dict(state)
    return layer


def read(folder: Path) -> None:
    stored = load_file(folder / "ours.safetensors")
    names = dict.fromkeys(key.partition("/")[0] for key in stored)
    dequantized = {}
    for name in names:
        state = {key.partition("/")[2]: value for key, value in stored.items() if key.startswith(f"{name}/")}
        dequantized[name] = load(state, state["scale"].dtype).dequantize()
    save_file(dequantized, folder / "theirs.safetensors")
    found = {path.name: logits(path) for path in sorted((folder / "ours").iterdir())}
    save_file(found, folder / "logits.safetensors")


if __name__ == "__main__":
    job, place = sys.argv[1], Path(sys.argv[2])
    if job == "make":
        weights(place)
        checkpoints(place)
    else:
        read(place)
