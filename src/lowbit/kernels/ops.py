"""The operators: schemas, fake implementations and derivatives. Every kernel runs behind these.

A weight travels as the list of its kernel's tensors, in the order of the kernel's layout, beside two strings: the spec
as JSON and the kernel's name. So one schema serves every format, `torch.compile` sees one opaque node per layer, and
whatever a kernel decides from the shapes at run time (batch size, outliers) stays inside.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.core import QuantSpec
from lowbit.kernels.registry import kernel_named

# A GPU that decodes has this many rows or fewer; it picks each row's expert instead of waiting for the host to sort.
_FEW_ROWS: Final = 16

_library = torch.library.Library("lowbit", "DEF")
_library.define(
    "linear(Tensor inputs, Tensor[] weight, Tensor? bias, str spec, str kernel, int out_features) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "dequantize(Tensor[] weight, str spec, str kernel, int out_features, int in_features, ScalarType dtype) -> Tensor"
)
_library.define(
    "expert_linear(Tensor inputs, Tensor experts, Tensor[] weight, Tensor? bias, str spec, str kernel, "
    "int out_features) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "expert_linear_backward(Tensor grad, Tensor experts, Tensor[] weight, str spec, str kernel, int in_features) "
    "-> Tensor"
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


def expert_linear(
    inputs: Tensor,
    experts: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    spec: str,
    kernel: str,
    out_features: int,
) -> Tensor:
    """``inputs[i] @ W[experts[i]].T + bias[experts[i]]``; differentiable in `inputs` and `bias`.

    Args:
        inputs: ``[rows, in]``, floating point.
        experts: ``[rows]``, which expert each row goes to; a number past the last expert gives a row of zeros.
        weight: the tensors of the kernel's layout, in its order, each with a first axis of experts.
        bias: ``[experts, out]`` or None.
        spec: :meth:`QuantSpec.to_json`, the same for all experts.
        kernel: name of the kernel in whose layout each expert's weight is.
    """
    result: Tensor = torch.ops.lowbit.expert_linear(inputs, experts, weight, bias, spec, kernel, out_features)
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


def _expert_linear(
    inputs: Tensor,
    experts: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    spec: str,
    kernel: str,
    out_features: int,
) -> Tensor:
    parsed, found, names = _resolve(spec, kernel)
    outputs = inputs.new_zeros(inputs.shape[0], out_features)
    stacks = weight if bias is None else [*weight, bias]
    for rows, tensors in _by_expert(experts, stacks, parsed):
        own = dict(zip(names, tensors[: len(weight)], strict=True))
        own_bias = None if bias is None else tensors[-1]
        outputs[rows] = found.apply(inputs[rows], parsed, (out_features, inputs.shape[-1]), own, own_bias)
    return _without_idle(outputs, experts, len(weight[0]))


def _expert_linear_backward(
    grad: Tensor, experts: Tensor, weight: list[Tensor], spec: str, kernel: str, in_features: int
) -> Tensor:
    parsed, found, names = _resolve(spec, kernel)
    result = grad.new_zeros(grad.shape[0], in_features)
    for rows, tensors in _by_expert(experts, weight, parsed):
        own = dict(zip(names, tensors, strict=True))
        result[rows] = grad[rows] @ found.dequantize(parsed, (grad.shape[-1], in_features), own, grad.dtype)
    return _without_idle(result, experts, len(weight[0]))


def _by_expert(experts: Tensor, stacks: list[Tensor], spec: QuantSpec) -> Iterator[tuple[Any, list[Tensor]]]:
    """Indices of rows that go to one expert, with that expert's slice of every stack."""
    count = len(stacks[0])
    alone = len(experts) <= _FEW_ROWS and spec.activation.kind == "none"  # else rows may share a scale
    if experts.is_cuda and (alone or torch.cuda.is_current_stream_capturing()):
        yield from _row_by_row(experts, stacks)
        return
    order = torch.argsort(experts, stable=True)
    sizes = torch.bincount(experts.clamp(0, count), minlength=count + 1)[:count].tolist()
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield order[start : start + size], [stack[expert] for stack in stacks]
        start += size


def _row_by_row(experts: Tensor, stacks: list[Tensor]) -> Iterator[tuple[Any, list[Tensor]]]:
    """As :func:`_by_expert`, but the host never learns which experts there are; rows past the last get any expert."""
    within = experts.clamp(0, len(stacks[0]) - 1)
    for row in range(len(experts)):
        yield slice(row, row + 1), [_pick(stack, within[row : row + 1]) for stack in stacks]


def _pick(stack: Tensor, index: Tensor) -> Tensor:
    # Not every device can index 8-bit floats.
    raw = stack.view(torch.uint8) if stack.dtype.itemsize == 1 else stack
    return raw.index_select(0, index).squeeze(0).view(stack.dtype)


def _without_idle(rows: Tensor, experts: Tensor, count: int) -> Tensor:
    """Rows that belong to no expert here are zero."""
    return rows.masked_fill_((experts >= count).unsqueeze(-1), 0) if rows.is_cuda else rows


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::linear", _linear_fake, lib=_library)
torch.library.register_fake("lowbit::dequantize", _dequantize_fake, lib=_library)
torch.library.register_autograd("lowbit::linear", _linear_backward, setup_context=_setup_context, lib=_library)


def _expert_linear_fake(
    inputs: Tensor,
    experts: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    spec: str,
    kernel: str,
    out_features: int,
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features)


def _expert_linear_backward_fake(
    grad: Tensor, experts: Tensor, weight: list[Tensor], spec: str, kernel: str, in_features: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _expert_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, experts, weight, bias, ctx.spec, ctx.kernel, _ = inputs
    ctx.in_features, ctx.count = activations.shape[-1], len(weight)
    ctx.bias_shape, ctx.bias_dtype = (None, None) if bias is None else (bias.shape, bias.dtype)
    ctx.save_for_backward(experts, *weight)


def _expert_linear_grads(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    experts, *weight = ctx.saved_tensors
    grad_inputs = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_inputs = torch.ops.lowbit.expert_linear_backward(
            grad, experts, weight, ctx.spec, ctx.kernel, ctx.in_features
        )
    if ctx.bias_shape is not None and ctx.needs_input_grad[3]:
        count = ctx.bias_shape[0]
        total = grad.new_zeros(count + 1, ctx.bias_shape[1]).index_add(0, experts.clamp(0, count), grad)
        grad_bias = total[:count].to(ctx.bias_dtype)
    return grad_inputs, None, [None] * ctx.count, grad_bias, None, None, None


_library.impl("expert_linear", _expert_linear, "CompositeExplicitAutograd")
_library.impl("expert_linear_backward", _expert_linear_backward, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::expert_linear", _expert_linear_fake, lib=_library)
torch.library.register_fake("lowbit::expert_linear_backward", _expert_linear_backward_fake, lib=_library)
torch.library.register_autograd(
    "lowbit::expert_linear", _expert_linear_grads, setup_context=_expert_setup_context, lib=_library
)
