"""What a model and a checkpoint take, counted from their tensors and files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lowbit.nn import QuantLinear
from lowbit.nn.experts import QuantStack
from lowbit.nn.swap import is_linear, linear_shape


def bits_per_weight(model: nn.Module) -> float:
    """Bits that a linear weight takes in memory on average, scales and zeros included.

    Counts the quantized layers and experts only; in a model that has none, the dense linear layers.

    Returns:
        0 for a model without linear layers.
    """
    quantized = [layer for layer in model.modules() if isinstance(layer, QuantLinear | QuantStack)]
    if quantized:
        held = sum(tensor.numel() * tensor.element_size() for layer in quantized for tensor in layer.packed)
        weights = sum(_weights(layer) for layer in quantized)
    else:
        dense = [module for module in model.modules() if is_linear(module)]
        held = sum(parameter_bytes(module) for module in dense)
        weights = sum(torch.Size(linear_shape(module)).numel() for module in dense)
    return 8 * held / weights if weights else 0.0


def _weights(layer: QuantLinear | QuantStack) -> int:
    return layer.shape[0] * layer.shape[1] * (layer.experts if isinstance(layer, QuantStack) else 1)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the weight of one dense layer."""
    weight = module.weight
    return weight.numel() * weight.element_size() if isinstance(weight, torch.Tensor) else 0


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of the weight files in a checkpoint's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
