"""What torchao itself makes of weights and models; and what it reads in what lowbit wrote.

Arguments: a folder with a model in ``dense/`` and what lowbit made of it in ``ours/*``; and the folder of lowbit's own
sources, whose config class is given torchao's objects. Leaves in the folder:

- ``layers.json``, ``layers.safetensors``: single weights in all variants, their headers, and layers' outputs;
- ``models/*``, ``models/*.safetensors``: checkpoints, and their dequantized weights and logits;
- ``read/*.safetensors``: the same of ``ours/*``;
- ``configs.json``: every config as Transformers stores it and as lowbit does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torchao.core.config import config_to_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import PerAxis, PerGroup, PerRow, PerTensor, quant_api
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

# FP8 products run on any CPU in torch itself; torchao only asks for the GPUs that it was written for.
quant_api._check_hardware_support = lambda granularity: None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDS = torch.arange(3, 13)[None]
Tensors = dict[str, torch.Tensor]
_A, _S, _N = MappingType.ASYMMETRIC, MappingType.SYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR
_FITTED = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY


def intx(bits: int, group: int | None = 32, **more: Any) -> Any:
    granularity = PerGroup(group) if group else PerAxis(0)
    return quant_api.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, **more)


def variants() -> dict[str, Any]:
    """Configs by name."""
    found = {
        "int8": quant_api.Int8WeightOnlyConfig(),
        "int8-tensor": quant_api.Int8WeightOnlyConfig(granularity=PerTensor()),
        "int8-group": quant_api.Int8WeightOnlyConfig(granularity=PerGroup(16)),
        "int8-dynamic": quant_api.Int8DynamicActivationInt8WeightConfig(),
        "int8-dynamic-asymmetric": quant_api.Int8DynamicActivationInt8WeightConfig(act_mapping_type=_A),
        "int8-dynamic-reduced": quant_api.Int8DynamicActivationInt8WeightConfig(
            granularity=[PerTensor(), PerRow()], reduce_range=True
        ),
        "float8": quant_api.Float8WeightOnlyConfig(),
        "float8-tensor": quant_api.Float8WeightOnlyConfig(granularity=PerTensor()),
        "float8-group": quant_api.Float8WeightOnlyConfig(granularity=PerGroup(16)),
        "float8-e5m2": quant_api.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "float8-dynamic": quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        "float8-dynamic-tensor": quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()),
        "float8-dynamic-bound": quant_api.Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=0.5, activation_value_ub=2.0
        ),
        "8da4w": quant_api.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
        "8da4w-asymmetric": quant_api.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerAxis(0), weight_mapping_type=_A
        ),
        "8da8w-scales": quant_api.Int8DynamicActivationIntxWeightConfig(weight_scale_dtype=torch.bfloat16),
        "intx4-no-clipping": intx(4, mapping_type=_N),
        "intx4-fitted": intx(4, intx_choose_qparams_algorithm=_FITTED),
        "intx3-fitted-scales": intx(3, intx_choose_qparams_algorithm=_FITTED, scale_dtype=torch.bfloat16),
        "intx4-scales": intx(4, scale_dtype=torch.float32),
        "intx4-half-scales": intx(4, None, scale_dtype=torch.float16, mapping_type=_A),
    }
    for bits in range(1, 9):
        found[f"intx{bits}"] = intx(bits)
        found[f"intx{bits}-asymmetric"] = intx(bits, None if bits % 2 else 16, mapping_type=_A)
    return found


def dense(dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(7)) * 0.05
    weight[1] += 0.2
    weight[2, :3] = torch.tensor([1.0, -2.0, 0.5])
    weight[3] = weight[3].abs()
    return weight.to(dtype)


def of_zeros(dtype: torch.dtype) -> torch.Tensor:
    weight = dense(dtype)
    weight[1] = 0
    return weight


def make_layers() -> Iterator[tuple[str, Any, Tensors, str]]:
    """Name, config, tensors and header entry of single layers."""
    for name, config in variants().items():
        for called, dtype in DTYPES.items():
            if name.startswith("float8-dynamic") and "tensor" not in name and dtype != torch.bfloat16:
                continue  # torchao wants bf16 there
            weight = dense(dtype) if name.startswith("float8") else of_zeros(dtype)
            layer = torch.nn.Linear(64, 48, bias=False).to(dtype)
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            model = torch.nn.Sequential(layer)
            quant_api.quantize_(model, config)
            parts, metadata = flatten_tensor_state_dict(model.state_dict())
            tensors = {key.removeprefix("0."): value.contiguous() for key, value in parts.items()}
            inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(8)).to(dtype) * 3
            inputs[0, 1] = 0
            with torch.no_grad():
                tensors |= {"dense": weight, "inputs": inputs, "dequantized": model[0].weight.dequantize()}
                try:
                    tensors["outputs"] = model(inputs)
                except (RuntimeError, NotImplementedError):
                    print("no product on this machine:", name, called)
            yield f"{name}/{called}", config, tensors, metadata["0.weight"]


MODELS = ("int8", "int8-dynamic", "float8-dynamic", "8da4w")


def models() -> dict[str, Any]:
    """Configs of whole models."""
    found = {name: variants()[name] for name in MODELS}
    found["per-module"] = quant_api.FqnToConfig(
        {
            r"re:model\.layers\.\d+\.mlp\..*": intx(4, 16, mapping_type=_A),
            "model.layers.0.self_attn.q_proj": quant_api.Float8WeightOnlyConfig(),
            "model.layers.0.self_attn.k_proj": None,
            "_default": quant_api.Int8WeightOnlyConfig(),
        }
    )
    found["embeddings"] = quant_api.FqnToConfig({"model.embed_tokens": intx(8, None), "_default": variants()["8da4w"]})
    return found


@torch.no_grad()
def describe(model: Any) -> Tensors:
    """Dequantized weights by module, and logits; of int4, for which there are CUDA kernels only, the parts."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Int4Tensor":
            found |= {f"{name}.{part}": getattr(weight, part) for part in ("qdata", "scale", "zero_point")}
        elif hasattr(weight, "qdata"):
            found[name] = weight.dequantize().contiguous()
    return found if any(name.endswith("qdata") for name in found) else {**found, "logits": model(IDS).logits}


def load(path: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kwargs).eval()


def main(folder: Path, sources: Path) -> None:
    all_tensors, entries = {}, {}
    for name, config, tensors, header in make_layers():
        entries[name] = {"config": config_to_dict(config), "header": header}
        all_tensors |= {f"{name}/{part}": value.contiguous() for part, value in tensors.items()}
    save_file(all_tensors, folder / "layers.safetensors")
    (folder / "layers.json").write_text(json.dumps(entries))

    (folder / "models").mkdir()
    for name, config in models().items():
        wrapped = transformers.TorchAoConfig(config, include_input_output_embeddings=name == "embeddings")
        model = load(folder / "dense", quantization_config=wrapped)
        save_file(describe(model), folder / "models" / f"{name}.safetensors")
        model.save_pretrained(folder / "models" / name)

    (folder / "read").mkdir()
    for path in sorted((folder / "ours").iterdir()):
        save_file(describe(load(path)), folder / "read" / f"{path.name}.safetensors")

    sys.path.insert(0, str(sources))
    import lowbit

    pairs = {}
    for name, config in {**variants(), **models()}.items():
        stock = transformers.TorchAoConfig(config, modules_to_not_convert=["lm_head"]).to_dict()
        ours = lowbit.TorchAoConfig(config, modules_to_not_convert=["lm_head"]).to_dict()
        pairs[name] = [stock, ours]
    (folder / "configs.json").write_text(json.dumps(pairs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
