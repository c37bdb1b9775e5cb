"""What optimum-quanto itself makes of weights and models; and what it reads in what lowbit wrote.

``make FOLDER``: single weights in all types, and checkpoints. ``read FOLDER``: the checkpoints under ``ours/``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from optimum.quanto import (
    Calibration,
    MaxOptimizer,
    QLinear,
    QuantizedModelForCausalLM,
    WeightQBitsTensor,
    freeze,
    qint2,
    qint4,
    qtypes,
    quantize,
    quantize_weight,
)
from safetensors.torch import load_file, save_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WEIGHTS = ("qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e5m2")
# Groups of 128, 96, 64 and 32, whole rows, rows that don't fill bytes, and a single row.
SHAPES = ((32, 256), (24, 192), (24, 448), (24, 160), (24, 96), (7, 144), (3, 30), (1, 64))
IDS = torch.arange(3, 13)[None]
Tensors = dict[str, torch.Tensor]


def dense(shape: tuple[int, int], dtype: torch.dtype, *, with_zeros: bool) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.05
    if shape[0] > 3:
        weight[2] += 0.3
    if with_zeros and shape[0] > 1:
        weight[1] = 0
    return weight.to(dtype)


def plain(weight: torch.Tensor) -> torch.Tensor:
    """The dequantized weight, by the formula also where a kernel has taken the weight into its own layout."""
    return weight.dequantize()


def weights(folder: Path) -> None:
    sources, states, dequantized = {}, {}, {}
    for qtype in WEIGHTS:
        for dtype in DTYPES:
            for shape in SHAPES:
                if shape[0] == 1 and qtypes[qtype].bits < 8:
                    continue  # One group alone is reduced over the wrong axis there.
                name = f"{qtype}/{dtype}/{shape[0]}x{shape[1]}"
                # Zeros in float8 are 0 / 0 there.
                source = dense(shape, DTYPES[dtype], with_zeros="float" not in qtype)
                layer = torch.nn.Linear(shape[1], shape[0], bias=False)
                layer.weight = torch.nn.Parameter(source.clone(), requires_grad=False)
                quantized = QLinear.from_module(layer, weights=qtypes[qtype])
                quantized.freeze()
                sources[name], dequantized[name] = source, plain(quantized.weight).contiguous()
                states |= {f"{name}/{key}": value.contiguous() for key, value in quantized.state_dict().items()}
    for qtype in (qint2, qint4):
        name, source = f"{qtype.name}/whole", dense((24, 192), torch.float16, with_zeros=False)
        scale, shift = MaxOptimizer()(source, qtype, axis=0, group_size=96, zeropoint=True)
        weight = quantize_weight(source, qtype, 0, scale, shift, 96, optimized=False)
        state: Tensors = {}
        weight.save_to_state_dict(state, f"{name}/weight.", False)
        states |= state
        dequantized[name] = weight.dequantize()
    for name, tensors in (("sources", sources), ("states", states), ("dequantized", dequantized)):
        save_file(tensors, folder / f"{name}.safetensors")


CHECKPOINTS = {
    "int4": {"weights": qtypes["qint4"], "exclude": "lm_head"},
    "int2": {"weights": qtypes["qint2"], "exclude": "lm_head"},
    "int8": {"weights": qtypes["qint8"]},
    "float8": {"weights": qtypes["qfloat8"], "exclude": "lm_head"},
    "e5m2": {"weights": qtypes["qfloat8_e5m2"], "exclude": ["lm_head", "*.k_proj"]},
    "int8-activations": {"weights": qtypes["qint8"], "activations": qtypes["qint8"], "exclude": "lm_head"},
    "int4-activations": {"weights": qtypes["qint4"], "activations": qtypes["qfloat8"]},
    "float8-activations": {
        "weights": qtypes["qfloat8"],
        "activations": qtypes["qfloat8_e5m2"],
        "exclude": "lm_head",
    },
}


def checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=160, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
    dequantized, logits = {}, {}
    for name, arguments in CHECKPOINTS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense")
        quantized = calibrated(model, arguments) if "activations" in arguments else mixed(model, arguments, name)
        quantized.save_pretrained(folder / "theirs" / name)
        dequantized[name], logits[name] = weights_and_logits(folder / "theirs" / name)
    save_file({f"{name}/{key}": value for name, all_ in dequantized.items() for key, value in all_.items()},
              folder / "checkpoints.safetensors")  # fmt: skip
    save_file(logits, folder / "logits.safetensors")


def mixed(model: transformers.PreTrainedModel, arguments: dict, name: str) -> QuantizedModelForCausalLM:
    if name == "e5m2":
        quantize(model, weights=qint4, include="*.k_proj")
    return QuantizedModelForCausalLM.quantize(model, **arguments)


def calibrated(model: transformers.PreTrainedModel, arguments: dict) -> QuantizedModelForCausalLM:
    quantize(model, **arguments)
    with torch.no_grad(), Calibration():
        for start in range(3):
            model((IDS + 7 * start) % 64)
    freeze(model)
    return QuantizedModelForCausalLM(model)


def weights_and_logits(folder: Path) -> tuple[Tensors, torch.Tensor]:
    """As quanto loads them; where it then brings a weight into a kernel's layout, from before that."""
    model = QuantizedModelForCausalLM.from_pretrained(folder)
    stored, dequantized = load_file(folder / "model.safetensors"), {}
    for name, layer in model._wrapped.named_modules():
        if isinstance(layer, QLinear):
            dequantized[name] = before_kernels(layer, name, stored).contiguous()
    with torch.no_grad():
        logits = model(IDS).logits
    return dequantized, (logits.dequantize() if hasattr(logits, "qtype") else logits).contiguous()


def before_kernels(layer: QLinear, name: str, stored: Tensors) -> torch.Tensor:
    if layer.weight_qtype.bits == 8:
        return layer.weight.dequantize()
    weight = layer.weight
    again = WeightQBitsTensor.load_from_state_dict(
        dict(stored),
        f"{name}.weight.",
        layer.weight_qtype,
        0,
        layer.weight_group_size,
        weight.size(),
        weight.stride(),
        [],
    )
    return again.dequantize()


def read(folder: Path) -> None:
    dequantized, logits = {}, {}
    for path in sorted((folder / "ours").iterdir()):
        found, logits[path.name] = weights_and_logits(path)
        dequantized |= {f"{path.name}/{key}": value for key, value in found.items()}
    save_file(dequantized, folder / "read.safetensors")
    save_file(logits, folder / "read-logits.safetensors")


if __name__ == "__main__":
    job, place = sys.argv[1], Path(sys.argv[2])
    if job == "make":
        weights(place)
        checkpoints(place)
    else:
        read(place)
