"""The operators: schemas, fake implementations and derivatives. Every kernel runs behind these two.

A weight travels as the list of its kernel's tensors, in the order of the kernel's layout, beside two strings: the spec
as JSON and the kernel's name. So one schema serves every format, `torch.compile` sees one opaque node per layer, and
whatever a kernel decides from the shapes at run time (batch size, outliers) stays inside.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lowbit.core import QuantSpec
from lowbit.kernels.registry import kernel_named

_library = torch.library.Library("lowbit", "DEF")
_library.define(
    "linear(Tensor inputs, Tensor[] weight, Tensor? bias, str spec, str kernel, int out_features) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "dequantize(Tensor[] weight, str spec, str kernel, int out_features, int in_features, ScalarType dtype) -> Tensor"
)


def linear(
    inputs: Tensor, weight: list[Tensor], bias: Tensor | None, spec: str, kernel: str, out_features: int
) -> Tensor:
    """``inputs @ W.T + bias``; differentiable in `inputs` and `bias`.

    Args:
        inputs: ``[..., in]``, floating point.
        weight: the tensors of the kernel's layout, in its order.
        bias: ``[out]`` or None.
        spec: :meth:`QuantSpec.to_json`.
        kernel: name of the kernel in whose layout the weight is.
    """
    result: Tensor = torch.ops.lowbit.linear(inputs, weight, bias, spec, kernel, out_features)
    return result


def dequantize(
    weight: list[Tensor], spec: str, kernel: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight ``[out, in]``; not differentiable."""
    result: Tensor = torch.ops.lowbit.dequantize(weight, spec, kernel, out_features, in_features, dtype)
    return result


@functools.lru_cache(maxsize=4096)
def _resolve(spec: str, kernel: str) -> tuple[QuantSpec, Any, tuple[str, ...]]:
    """The parsed spec, the kernel, and the names of its tensors, which don't depend on the shape."""
    parsed, found = QuantSpec.from_json(spec), kernel_named(kernel)
    return parsed, found, tuple(found.layout(parsed, (1, 1)))


def _linear(
    inputs: Tensor, weight: list[Tensor], bias: Tensor | None, spec: str, kernel: str, out_features: int
) -> Tensor:
    parsed, found, names = _resolve(spec, kernel)
    tensors = dict(zip(names, weight, strict=True))
    result: Tensor = found.apply(inputs, parsed, (out_features, inputs.shape[-1]), tensors, bias)
    return result


def _dequantize(
    weight: list[Tensor], spec: str, kernel: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    parsed, found, names = _resolve(spec, kernel)
    tensors = dict(zip(names, weight, strict=True))
    result: Tensor = found.dequantize(parsed, (out_features, in_features), tensors, dtype)
    return result


def _linear_fake(
    inputs: Tensor, weight: list[Tensor], bias: Tensor | None, spec: str, kernel: str, out_features: int
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def _dequantize_fake(
    weight: list[Tensor], spec: str, kernel: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return weight[0].new_empty(out_features, in_features, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, weight, bias, ctx.spec, ctx.kernel, ctx.out_features = inputs
    ctx.in_features, ctx.bias_dtype = activations.shape[-1], None if bias is None else bias.dtype
    ctx.count = len(weight)
    ctx.save_for_backward(*weight)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dx = dy @ W`` and ``db = sum(dy)``. Int8 activations are passed straight through, as bitsandbytes does."""
    grad_inputs = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = dequantize(list(ctx.saved_tensors), ctx.spec, ctx.kernel, ctx.out_features, ctx.in_features, grad.dtype)
        grad_inputs = grad @ dense
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_inputs, [None] * ctx.count, grad_bias, None, None, None


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::linear", _linear_fake, lib=_library)
torch.library.register_fake("lowbit::dequantize", _dequantize_fake, lib=_library)
torch.library.register_autograd("lowbit::linear", _linear_backward, setup_context=_setup_context, lib=_library)
