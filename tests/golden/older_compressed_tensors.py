"""compressed-tensors 0.9.4, which still had what 0.20 can no longer read: makes ``older_compressed_tensors.json``.

Usage: ``PYTHONPATH=FOLDER_WITH_THAT_VERSION older_compressed_tensors.py``

Holds, by name: a configuration; and in base64 a safetensors file of a weight's tensors, with the dense weight that the
library makes of them under ``expected``.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import save

Tensors = dict[str, torch.Tensor]


def scales_of(weight: torch.Tensor, groups: torch.Tensor, bits: int, symmetric: bool) -> tuple[Any, Any]:
    """Scales and int8 zero points, one per row and group."""
    parts = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    if symmetric:
        scale = torch.maximum(-low, high) / ((1 << bits) - 1) * 2
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    scale = (high - low) / ((1 << bits) - 1)
    return scale, (-(1 << bits - 1) - low / scale).round().to(torch.int8)


def packed(bits: int, rows: int, symmetric: bool, actorder: bool = False) -> tuple[dict[str, Any], Tensors]:
    weight = torch.randn(rows, 64).to(torch.bfloat16)
    data = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    data |= {"actorder": "group"} if actorder else {}
    groups = torch.arange(64, dtype=torch.int32) // 32
    index = groups[torch.randperm(64)] if actorder else None
    scale, zero = scales_of(weight, groups if index is None else index, bits, symmetric)
    args = QuantizationArgs(**data)
    compressor = PackedQuantizationCompressor()
    tensors = compressor.compress_weight(weight, scale, args, zero, g_idx=index) | {"weight_scale": scale}
    integers = quantize(weight, scale, zero, args, dtype=torch.int8, g_idx=index)
    dense = dequantize(integers, scale, zero, args, g_idx=index)
    if index is not None:
        tensors["weight_g_idx"] = index
    return config("pack-quantized", data), tensors | {"expected": dense}


def config(spelled: str, weights: dict[str, Any] | None = None, sparsity: str | None = None) -> dict[str, Any]:
    data: dict[str, Any] = {"quant_method": "compressed-tensors", "format": spelled, "quantization_status": "frozen"}
    if weights:
        data["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if sparsity:
        data["sparsity_config"] = {"format": sparsity, "targets": ["Linear"], "ignore": ["lm_head"]}
    return data


def sparse(dtype: torch.dtype, quarters: bool) -> tuple[dict[str, Any], Tensors]:
    weight = torch.randn(6, 20)
    if quarters:
        keep = weight.view(-1, 4).abs().topk(2).indices
        weight = torch.zeros(30, 4).scatter(1, keep, weight.view(-1, 4).gather(1, keep)).view(6, 20)
    else:
        weight[torch.rand(6, 20) < 0.6] = 0
    values = (weight * 30).round().to(torch.int8) if dtype == torch.int8 else weight.to(dtype)
    if quarters:
        tensors = Sparse24BitMaskTensor.from_dense(values, "2:4").dict("x.weight")
    else:
        tensors = BitmaskTensor.from_dense(values).dict("x")
    tensors = {name.removeprefix("x."): value for name, value in tensors.items()}
    spelled = "sparse-24-bitmask" if quarters else "sparse-bitmask"
    if dtype in (torch.bfloat16, torch.float32):
        return config("dense", sparsity=spelled), tensors | {"expected": values}
    scale = torch.rand(6, 1, dtype=torch.float32)
    kind = {torch.int8: ("int-quantized", "int")}.get(dtype, ("float-quantized", "float"))
    data = {"num_bits": 8, "type": kind[1], "strategy": "channel"}
    dense = dequantize(values, scale, None, QuantizationArgs(**data))
    return config(kind[0], data, spelled), tensors | {"weight_scale": scale, "expected": dense}


def main() -> None:
    torch.manual_seed(0)
    cases = {f"padded_{bits}": packed(bits, 3, True) for bits in (3, 5, 6, 7)}
    cases |= {f"padded_asym_{bits}": packed(bits, 32 // bits, False) for bits in (3, 5, 6, 7)}
    cases |= {"actorder": packed(4, 4, True, actorder=True), "actorder_asym": packed(4, 8, False, actorder=True)}
    for quarters in (False, True):
        for dtype in (torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn):
            cases[f"sparse{'24' if quarters else ''}_{str(dtype)[6:]}"] = sparse(dtype, quarters)
    stored = {
        name: {
            "config": data,
            "tensors": base64.b64encode(save({key: value.contiguous() for key, value in tensors.items()})).decode(),
        }
        for name, (data, tensors) in cases.items()
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
