"""Complete little checkpoints, packed by the original libraries (:mod:`peers`), with the weights to expect of them.

Every function reads the dense Llama checkpoint in `src_dir`, writes a quantized one to `dst_dir` (made if need be) and
returns ``{module name: dequantized weight, [out, in]}`` for the layers that it quantized: all linears of the blocks.
Parameters are chosen by plain min/max and round to nearest, which says nothing of the originals' quality but makes
files of exactly their shape. The other tensors are stored as fp16, as both libraries do.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

import peers

Tensors = dict[str, torch.Tensor]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def group_index(in_features: int, group_size: int, desc_act: bool = False, seed: int = 0) -> torch.Tensor:
    """The group of each input column, int32 [in]; for act-order in a random order instead of the activations'."""
    size = in_features if group_size == -1 else group_size
    groups = torch.arange(in_features, dtype=torch.int32) // size
    if not desc_act:
        return groups
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
    return groups[order.argsort()]


def _grouped(weight: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in] as fp32 [out, G, in / G], the columns of each group together."""
    return weight.float()[:, groups.argsort(stable=True)].reshape(weight.shape[0], int(groups.max()) + 1, -1)


def gptq_parameters(
    weight: torch.Tensor, groups: torch.Tensor, bits: int, sym: bool, lowest_zero: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (fp32, but fp16 numbers) and zero points (fp32, whole), both [out, G], as auto-gptq's ``Quantizer``.

    `lowest_zero` is 1 for v1 files: no two libraries agree on what a zero point of 0 is there (see :mod:`peers`).
    """
    grouped, largest = _grouped(weight, groups), 2**bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / largest).clamp(min=1e-6).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if sym else (-low / scales).round()
    return scales, zeros.clamp(lowest_zero, largest)


def awq_parameters(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, both [out, G], as autoawq's ``pseudo_quantize_tensor``: 4 bits, asymmetric."""
    grouped = _grouped(weight, group_index(weight.shape[1], group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low).clamp(min=1e-5) / 15).half().float()
    return scales, (-(low / scales).round()).clamp(0, 15)


def on_the_grid(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor, bits: int
) -> torch.Tensor:
    """`weight` rounded to its grid: fp32 ``(q - z) * s`` [out, in], which is what the originals pack."""
    columns = groups.long()
    codes = ((weight.float() / scales[:, columns]).round() + zeros[:, columns]).clamp(0, 2**bits - 1)
    return (codes - zeros[:, columns]) * scales[:, columns]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _read_source(src_dir: str | Path) -> tuple[Tensors, dict[str, Any]]:
    source = Path(src_dir)
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors, json.loads((source / "config.json").read_text())


def _write(
    src_dir: str | Path,
    dst_dir: str | Path,
    tensors: Tensors,
    config: dict[str, Any],
    weights_name: str = "model.safetensors",
    metadata: dict[str, str] | None = None,
) -> None:
    target = Path(dst_dir)
    target.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(src_dir, target)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / weights_name, metadata={"format": "pt", **(metadata or {})})
    _write_json(target / "config.json", config)


def _copy_tokenizer(src_dir: str | Path, dst_dir: str | Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(src_dir) / name).is_file():
            shutil.copyfile(Path(src_dir) / name, Path(dst_dir) / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _is_block_linear(name: str, tensor: torch.Tensor) -> bool:
    return ".layers." in name and name.endswith(".weight") and tensor.dim() == 2


def _split(tensors: Tensors, skip: list[str] | None = None) -> tuple[Tensors, Tensors]:
    """``{module: weight}`` of the linears to quantize, and all other tensors in fp16.

    `skip` names modules as autoawq reads it: any module whose name contains one of them.
    """
    linears, rest = {}, {}
    for name, tensor in tensors.items():
        if _is_block_linear(name, tensor) and not any(part in name for part in skip or ()):
            linears[name.removesuffix(".weight")] = tensor
        else:
            rest[name] = tensor.half()
    return linears, rest


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ
# ---------------------------------------------------------------------------------------------------------------------


def write_gptq(
    src_dir: str | Path,
    dst_dir: str | Path,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = False,
    checkpoint_format: str = "gptq",
    with_g_idx: bool = True,
    sidecar: bool = False,
    weights_name: str = "model.safetensors",
) -> Tensors:
    """Write a GPTQ checkpoint: format ``"gptq"`` (v1) as auto-gptq 0.7.1 does, ``"gptq_v2"`` as gptqmodel 7.7.0 does.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: a divisor of every layer's input width, or -1.
        desc_act: act-order: ``g_idx`` isn't monotonic.
        with_g_idx: False leaves ``g_idx`` out of the file, as some converters do; not together with `desc_act`.
            Stock Transformers cannot load such a file (it reads uninitialised memory instead).
        sidecar: True writes ``quantize_config.json`` and leaves config.json as it was, like auto-gptq before 0.5
            (today's writes both). Transformers doesn't read it.
        weights_name: auto-gptq's own name is ``gptq_model-{bits}bit-{group_size}g.safetensors``; on the Hub files
            are nearly always renamed.

    Returns:
        fp16 weights as the writer's own library dequantizes them.
    """
    if desc_act and not with_g_idx:
        raise ValueError("act-order cannot be read without g_idx")
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}, expected 'gptq' or 'gptq_v2'")
    if sidecar and checkpoint_format == "gptq_v2":
        raise ValueError("auto-gptq, which wrote the sidecar, knows no gptq_v2")

    tensors, config = _read_source(src_dir)
    linears, stored = _split(tensors)
    expected: Tensors = {}
    for seed, (name, weight) in enumerate(linears.items()):
        groups = group_index(weight.shape[1], group_size, desc_act, seed)
        packed, expected[name] = _pack_gptq(weight, groups, bits, group_size, sym, desc_act, checkpoint_format)
        stored.update({f"{name}.{key}": value for key, value in packed.items() if with_g_idx or key != "g_idx"})

    quantization = _gptq_config(bits, group_size, sym, desc_act, checkpoint_format, weights_name)
    metadata = _gptq_metadata(quantization) if checkpoint_format == "gptq" else None
    if not sidecar:
        config["quantization_config"] = quantization
    _write(src_dir, dst_dir, stored, _as_fp16(config), weights_name, metadata)
    if sidecar:
        _write_json(Path(dst_dir) / "quantize_config.json", quantization)
    return expected


def _pack_gptq(
    weight: torch.Tensor,
    groups: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    checkpoint_format: str,
) -> tuple[Tensors, torch.Tensor]:
    v1 = checkpoint_format == "gptq"
    scales, zeros = gptq_parameters(weight, groups, bits, sym, lowest_zero=1 if v1 else 0)
    rounded = on_the_grid(weight, scales, zeros, groups, bits)
    if v1:
        packed = peers.autogptq_pack(rounded, scales, zeros, groups if desc_act else None, bits, group_size)
        return packed, peers.autogptq_dequantize(packed, bits, group_size)
    packed = peers.gptqmodel_pack(rounded, scales, zeros, groups, bits, group_size, checkpoint_format)
    return packed, peers.gptqmodel_dequantize(packed, bits, group_size, checkpoint_format)


def _gptq_config(
    bits: int, group_size: int, sym: bool, desc_act: bool, checkpoint_format: str, weights_name: str
) -> dict[str, Any]:
    """What the library of `checkpoint_format` writes; for v1 auto-gptq's keys in its order."""
    if checkpoint_format == "gptq_v2":
        return peers.gptqmodel_config(bits, group_size, sym, desc_act, checkpoint_format)
    return {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": desc_act,
        "static_groups": False,
        "sym": sym,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": Path(weights_name).stem,
        "is_marlin_format": False,
        "quant_method": "gptq",
    }


def _gptq_metadata(quantization: dict[str, Any]) -> dict[str, str]:
    """The safetensors metadata of auto-gptq 0.7.1."""
    keys = ("bits", "group_size", "desc_act", "damp_percent", "is_marlin_format")
    return {"auto_gptq_version": "0.7.1", **{f"gptq_{key}": str(quantization[key]) for key in keys}}


def _as_fp16(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, **{key: "float16" for key in ("dtype", "torch_dtype") if key in config}}


# ---------------------------------------------------------------------------------------------------------------------
# AWQ
# ---------------------------------------------------------------------------------------------------------------------


def write_awq(
    src_dir: str | Path,
    dst_dir: str | Path,
    version: str = "gemm",
    group_size: int = 128,
    modules_to_not_convert: list[str] | None = None,
) -> Tensors:
    """Write a 4-bit AWQ checkpoint as autoawq 0.2.9 does, without the search for its smoothing scales.

    Args:
        version: ``"gemm"``, ``"gemv"`` or ``"gemv_fast"``.
        group_size: -1 or a divisor of every layer's input width; for gemv and gemv_fast not below 32.
        modules_to_not_convert: layers whose name contains one of these stay dense.

    Returns:
        fp16 weights: gemm's by autoawq's own reader, the others as :func:`peers.autoawq_dequantize` says.
    """
    tensors, config = _read_source(src_dir)
    linears, stored = _split(tensors, modules_to_not_convert)
    expected: Tensors = {}
    for name, weight in linears.items():
        groups = group_index(weight.shape[1], group_size)
        scales, zeros = awq_parameters(weight, group_size)
        packed = peers.autoawq_pack(on_the_grid(weight, scales, zeros, groups, 4), scales, zeros, group_size, version)
        expected[name] = peers.autoawq_dequantize(packed, version, group_size)
        stored.update({f"{name}.{key}": value for key, value in packed.items()})
    config["quantization_config"] = {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": group_size,
        "bits": 4,
        "version": version,
        "modules_to_not_convert": modules_to_not_convert,
    }
    _write(src_dir, dst_dir, stored, _as_fp16(config))
    return expected


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes
# ---------------------------------------------------------------------------------------------------------------------


def write_bitsandbytes(src_dir: str | Path, dst_dir: str | Path, **settings: Any) -> Tensors:
    """Write a checkpoint with stock Transformers and bitsandbytes; `settings` go to ``BitsAndBytesConfig``.

    Returns the weights, see :func:`peers.bitsandbytes_save`: bf16 for ``load_in_4bit``, fp32 for ``load_in_8bit``.
    """
    expected = peers.bitsandbytes_save(src_dir, dst_dir, settings)
    _copy_tokenizer(src_dir, dst_dir)
    return expected
