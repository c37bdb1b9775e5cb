"""Which inputs the units of a block see: a block runs, and whoever asked is shown them.

Linear layers are watched by hooks. Experts that are parameters of three dimensions have no module each: products with
a slice of such a parameter are noticed as they are computed, whatever the module's own code looks like. So are products
of a linear layer's weight with columns, which go past the layer's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.calibration.units import Unit

See = Callable[[Unit, Tensor], None]
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}


class Stopped(Exception):
    """All that was to be seen has been seen."""


class Watch:
    """Shows the inputs of units while a block runs.

    Args:
        block: in memory, named `prefix` in its model.
        units: of the block.
        see: called with a unit and its inputs ``[..., in]``; for experts, with the rows that were routed to them, once
            for each part that shares the product.
        stop: whether the forward is cut short once every linear layer among the units was seen.
    """

    def __init__(self, block: nn.Module, prefix: str, units: Sequence[Unit], see: See, *, stop: bool = False) -> None:
        self.see = see
        self._linear = {unit.module: unit for unit in units if unit.expert is None}
        self._experts = [unit for unit in units if unit.expert is not None]
        self._block, self._prefix = block, prefix
        self._missing: set[str] = set()
        self._stop = stop and not self._experts
        self._open = ExitStack()

    def __enter__(self) -> Watch:
        for unit in self._linear.values():
            handle = self._module(unit).register_forward_pre_hook(self._hook(unit), with_kwargs=True)
            self._open.callback(handle.remove)
        self._open.enter_context(_Products(self._parameters(), self._weights(), self._see_linear, self.see))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, forward: Callable[[], Any]) -> None:
        """Run the block once, to the end or to where nothing more is to be seen."""
        self._missing = set(self._linear)
        with suppress(Stopped):
            forward()

    def _hook(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            self._see_linear(unit, args[0] if args else next(iter(kwargs.values())))

        return hook

    def _see_linear(self, unit: Unit, inputs: Tensor) -> None:
        self.see(unit, inputs)
        self._missing.discard(unit.module)
        if self._stop and not self._missing:
            raise Stopped

    def _weights(self) -> dict[int, Unit]:
        """By the address of a linear layer's weight: its unit."""
        return {self._module(unit).weight.data_ptr(): unit for unit in self._linear.values()}

    def _module(self, unit: Unit) -> Any:
        return self._block.get_submodule(unit.module.removeprefix(self._prefix).removeprefix("."))

    def _parameters(self) -> dict[int, tuple[Tensor, dict[int, list[Unit]]]]:
        """By the address of a parameter's memory: itself, and the units of each expert in it."""
        found: dict[int, tuple[Tensor, dict[int, list[Unit]]]] = {}
        for unit in self._experts:
            parameter: Tensor = getattr(self._module(unit), unit.parameter)
            _, experts = found.setdefault(parameter.untyped_storage().data_ptr(), (parameter, {}))
            experts.setdefault(unit.expert or 0, []).append(unit)
        return found


class _Products(TorchFunctionMode):
    """Notices products with slices of watched parameters, and of watched weights with columns."""

    def __init__(
        self,
        parameters: dict[int, tuple[Tensor, dict[int, list[Unit]]]],
        weights: dict[int, Unit],
        see_linear: See,
        see: See,
    ) -> None:
        super().__init__()
        self.parameters, self.weights, self.see_linear, self.see = parameters, weights, see_linear, see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            self._notice(args[0], args[1])
        return out

    def _notice(self, inputs: Tensor, weight: Tensor) -> None:
        unit = self.weights.get(inputs.data_ptr())
        if unit is not None and inputs.dim() == 2 and inputs.shape == unit.shape and weight.dim() > 1:
            self.see_linear(unit, weight.transpose(-1, -2))
            return
        entry = self.parameters.get(weight.untyped_storage().data_ptr())
        if entry is None:
            return
        parameter, experts = entry
        size = parameter[0].numel()
        if weight.dim() == 3:  # all experts at once, each with its own rows; those of others are zeros
            for expert, units in experts.items():
                rows = inputs[expert]
                self._show(units, rows[rows.any(-1)])
        else:
            first = (weight.storage_offset() - parameter.storage_offset()) // size
            self._show(experts.get(first, []), inputs)

    def _show(self, units: list[Unit], rows: Tensor) -> None:
        for unit in units:
            self.see(unit, rows)


def execution_stages(
    block: nn.Module, prefix: str, units: Sequence[Unit], forward: Callable[[], Any]
) -> list[list[Unit]]:
    """The units in the order in which they run, those with the same inputs together.

    Units that didn't run are in a stage of their own, the last.
    """
    stages: list[list[Unit]] = []
    keys: list[Any] = []
    seen: set[str] = set()
    alive: list[Tensor] = []  # so that no address is used twice

    def see(unit: Unit, inputs: Tensor) -> None:
        if unit.name in seen:
            return
        seen.add(unit.name)
        alive.append(inputs)
        key = (unit.module, unit.parameter) if unit.expert is not None else (inputs.data_ptr(), tuple(inputs.shape))
        if key in keys:
            stages[keys.index(key)].append(unit)
        else:
            keys.append(key)
            stages.append([unit])

    with Watch(block, prefix, units, see) as watch:
        watch.run(forward)
    unseen = [unit for unit in units if unit.name not in seen]
    for unit in [unit for unit in unseen if unit.expert is not None]:
        if (unit.module, unit.parameter) in keys:  # an expert to which this batch brought no token
            stages[keys.index((unit.module, unit.parameter))].append(unit)
            unseen.remove(unit)
    return [*stages, unseen] if unseen else stages
