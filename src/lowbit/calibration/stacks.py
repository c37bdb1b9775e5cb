"""Where a model repeats itself: the lists of blocks, found from the module tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lowbit.calibration.units import Unit, units_below
from lowbit.errors import PlanError


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other.

    Attributes:
        name: of the list (``model.layers``).
        blocks: the names of its blocks, in order.
    """

    name: str
    blocks: tuple[str, ...]


def find_stacks(model: nn.Module, units: Sequence[Unit]) -> list[Stack]:
    """The outermost module lists that hold units, in the order of the module tree.

    Raises:
        PlanError: there are none, so that nothing can be calibrated block by block.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{known.name}.") for known in stacks):
            continue
        if units_below(units, name):
            stacks.append(Stack(name, tuple(f"{name}.{number}" for number in range(len(module)))))
    if not stacks:
        raise PlanError("no list of repeated blocks holds what is to be quantized; nothing can be done block by block")
    return stacks
