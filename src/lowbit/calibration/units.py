"""The matrices of a model that are quantized one by one, and how to reach each in a block that is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.core import Plan, QuantSpec
from lowbit.errors import PlanError
from lowbit.nn.experts import Projection, find_projections
from lowbit.nn.swap import is_conv1d


@dataclass(frozen=True)
class Unit:
    """One weight ``[out, in]``: that of a linear layer, or one part of one expert's projection.

    Attributes:
        name: what it is filed under: the layer's module, or ``<experts>.<number>.<part>``.
        module: the module that holds the parameter.
        parameter: its name in the module.
        shape: ``(out, in)``.
        spec: what it becomes.
        expert: which expert's it is; None for linear layers.
        part: the part of the projection.
        projection: how the experts' parameter is laid out.
    """

    name: str
    module: str
    parameter: str
    shape: tuple[int, int]
    spec: QuantSpec
    expert: int | None = None
    part: str = ""
    projection: Projection | None = None

    @property
    def full_parameter(self) -> str:
        return f"{self.module}.{self.parameter}"

    def weight(self, module: nn.Module) -> Tensor:
        """``[out, in]``, a view of the parameter in `module`, which is the one named :attr:`module`."""
        parameter = getattr(module, self.parameter).detach()
        if self.projection is None or self.expert is None:
            return parameter.T if is_conv1d(module) else parameter
        return self.projection.split(parameter)[self.part][self.expert]


def find_units(model: nn.Module, plan: Plan) -> list[Unit]:
    """The units of a plan, in the order of the model's modules.

    Args:
        model: on any device, the meta device too.
        plan: with an entry per linear layer and per parameter of fused experts.
    """
    modules = dict(model.named_modules())
    units: list[Unit] = []
    for name, spec in plan.quantized.items():
        if name in modules:
            rows, cols = plan.shapes[name]
            units.append(Unit(name, name, "weight", (rows, cols), spec))
        else:
            units.extend(_experts(modules, name, spec))
    return units


def _experts(modules: dict[str, nn.Module], name: str, spec: QuantSpec) -> Iterator[Unit]:
    module, _, parameter = name.rpartition(".")
    projection = find_projections(modules[module]).get(parameter)
    if projection is None:
        raise PlanError(f"'{name}' is neither a linear layer nor a projection of experts")
    for part in projection.parts:
        for expert in range(projection.experts):
            own = f"{module}.{expert}.{part}"
            yield Unit(own, module, parameter, projection.part_shape, spec, expert, part, projection)


def units_below(units: Sequence[Unit], prefix: str) -> list[Unit]:
    """Those in the module `prefix`."""
    return [unit for unit in units if unit.module == prefix or unit.module.startswith(f"{prefix}.")]
