"""Modules whose weights are packed: plain parameters that move as bytes and are never cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound="PackedModule")


class PackedModule(nn.Module):
    """Base of modules that hold packed tensors as parameters without gradient.

    Placement, offloading and `state_dict` work as on any module. Casting the module leaves codes and scales alone.
    """

    _names: tuple[str, ...] = ()

    @property
    def packed(self) -> list[Tensor]:
        """The packed tensors, in the order of the kernel's layout."""
        return [getattr(self, name) for name in self._names]

    @property
    def packed_names(self) -> tuple[str, ...]:
        return self._names

    def _place(self, tensors: dict[str, Tensor]) -> None:
        for name in self._names:
            del self._parameters[name]
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """Move the packed tensors as bytes, so that a cast leaves codes and scales alone."""
        before = self.packed[0].device.type if self._names else None
        packed = {name: self._parameters.pop(name) for name in self._names}
        try:
            super()._apply(fn, recurse)
            for name, tensor in packed.items():
                if tensor is not None:
                    moved = fn(tensor.data.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)
                    packed[name] = nn.Parameter(moved, requires_grad=False)
        finally:
            self._parameters.update(packed)
        if self._names and self.packed[0].device.type != before:
            self.select_kernel()
        return self

    def select_kernel(self, name: str | None = None) -> None:
        """Bring the weight into the layout of the kernel `name`, by default of the best one for its device.

        Called wherever the module has changed its device. Here there is nothing to choose from.
        """


def working_dtype(inputs: Tensor) -> torch.dtype:
    """What a linear layer computes in: the inputs' dtype, or autocast's where that is switched on."""
    place = inputs.device.type
    return torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else inputs.dtype
