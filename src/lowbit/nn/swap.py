"""Replacing dense layers by quantized ones and back; works on any `nn.Module`."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor, nn

from lowbit.core import Plan, QuantSpec, QuantTensor
from lowbit.nn.experts import QuantExperts, quantize_experts
from lowbit.nn.linear import QuantLinear


class Quantize(Protocol):
    """What makes a quantized weight of a dense one."""

    def __call__(self, weight: Tensor, spec: QuantSpec) -> QuantTensor: ...


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Transformers' `Conv1D` (GPT-2), a linear layer that stores its weight as ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a dense linear layer that can be swapped; subclasses may compute something else."""
    return type(module) is nn.Linear or is_conv1d(module) or _is_falcons(module)


def _is_falcons(module: nn.Module) -> bool:
    """Whether this is Falcon's own subclass, which computes the same."""
    kind = type(module)
    return kind.__name__ == "FalconLinear" and kind.__module__ == "transformers.models.falcon.modeling_falcon"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a dense linear layer."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    rows, cols = weight.shape
    return (cols, rows) if is_conv1d(module) else (rows, cols)


def swap_linear(
    model: nn.Module,
    name: str,
    tensor: QuantTensor,
    *,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> QuantLinear:
    """Put a quantized layer in the place of the dense layer `name`; bias and training mode are taken over."""
    dense = model.get_submodule(name)
    bias = dense.bias if isinstance(dense.bias, nn.Parameter) else None
    layer = QuantLinear.from_tensor(tensor, bias=bias, compute_dtype=compute_dtype, dtype=dtype)
    layer.train(dense.training)
    model.set_submodule(name, layer)
    return layer


def quantize_model(
    model: nn.Module, plan: Plan, quantize: Quantize, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Quantize the weights of a plan in place, one layer at a time."""
    parameters = dict(model.named_parameters())
    for name, spec in plan.quantized.items():
        if name in parameters:  # of fused experts; a linear layer's weight goes by its module
            quantize_experts(model, name, functools.partial(quantize, spec=spec), compute_dtype)
            continue
        dense = model.get_submodule(name)
        weight = dense.weight.detach()  # type: ignore[operator]
        dtype = weight.dtype
        tensor = quantize(weight.T if is_conv1d(dense) else weight, spec)
        swap_linear(model, name, tensor, compute_dtype=compute_dtype, dtype=dtype)


def dense_linear(layer: QuantLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain ``nn.Linear`` with the layer's dequantized weight, on the device of its packed tensors.

    Args:
        dtype: of weight and bias; None for the dtype that the layer works in.
    """
    weight = layer.dequantize(dtype or layer.dense_dtype)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return dense.train(layer.training)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized layer by a dense one in place, one layer at a time; `dtype` as above."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, dense_linear(layer, dtype))
        elif isinstance(layer, QuantExperts):
            model.set_submodule(name, layer.unpack(dtype))
