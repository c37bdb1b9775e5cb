"""Blocks whose weights are brought from the disk for as long as they are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def load_block(
    module: nn.Module,
    prefix: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights in the places of a module's parameters and buffers that are on the meta device.

    Args:
        module: named `prefix` in its model.
        weights: by full name; read when asked for.
        device: where the module goes as a whole.
        dtype: what floating-point numbers are cast to; None for what they are.
    """
    for name, child in module.named_modules():
        path = f"{prefix}.{name}" if name else prefix
        for own, parameter in child._parameters.items():
            if parameter is not None:
                value = weights[f"{path}.{own}"] if parameter.is_meta else parameter.data
                child._parameters[own] = nn.Parameter(_placed(value, device, dtype), requires_grad=False)
        for own, buffer in child._buffers.items():
            if buffer is not None:
                value = weights[f"{path}.{own}"] if buffer.is_meta else buffer
                child._buffers[own] = _placed(value, device, None)


def unload_block(module: nn.Module) -> None:
    """Give the memory of a module's parameters back; buffers, which are small, go to the CPU."""
    for child in module.modules():
        for own, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[own] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        for own, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[own] = buffer.to("cpu")


@contextmanager
def loaded(
    module: nn.Module,
    prefix: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Iterator[nn.Module]:
    """:func:`load_block` for as long as the context lasts."""
    load_block(module, prefix, weights, device, dtype)
    try:
        yield module
    finally:
        unload_block(module)


def _placed(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    moved = value.to(device=device, dtype=wanted)
    # What comes from a mapped file must not be written through.
    return moved.clone() if moved.data_ptr() == value.data_ptr() else moved
