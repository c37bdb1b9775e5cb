"""Where a model repeats itself: the lists of blocks, found from the module tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lowbit.calibration.units import Unit, units_below
from lowbit.errors import PlanError
from lowbit.nn.swap import is_linear


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other.

    Attributes:
        name: of the list (``model.layers``).
        blocks: the names of its blocks, in order.
    """

    name: str
    blocks: tuple[str, ...]


def block_lists(model: nn.Module) -> list[str]:
    """The outermost module lists whose entries have linear layers in them, in the order of the module tree.

    A list of bare linear layers is none: its entries don't take each other's results.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{known}.") for known in found)
        if isinstance(module, nn.ModuleList) and not inside and any(map(_holds_linear, module)):
            found.append(name)
    return found


def _holds_linear(block: nn.Module) -> bool:
    return not is_linear(block) and any(map(is_linear, block.modules()))


def find_stacks(model: nn.Module, units: Sequence[Unit]) -> list[Stack]:
    """The lists of blocks that hold units.

    Raises:
        PlanError: there are none, so that nothing can be calibrated block by block.
    """
    lists = {name: model.get_submodule(name) for name in block_lists(model) if units_below(units, name)}
    stacks = [
        Stack(name, tuple(f"{name}.{number}" for number, _ in module.named_children()))
        for name, module in lists.items()
    ]
    if not stacks:
        raise PlanError("no list of repeated blocks holds what is to be quantized; nothing can be done block by block")
    return stacks
