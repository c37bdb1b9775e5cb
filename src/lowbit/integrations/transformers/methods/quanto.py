"""quanto: weights of 2, 4 and 8 bits, and activations of 8 bits where a checkpoint holds their scales."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers

from lowbit.algorithms.quanto import WeightRange
from lowbit.core import QuantSpec
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire.quanto import QuantoSettings, QuantoWire


class QuantoConfig(transformers.QuantoConfig):
    """`transformers.QuantoConfig`, with ``float8_e5m2`` and with the types of single modules.

    Args:
        weights: ``int8``, ``int4``, ``int2``, ``float8`` (e4m3) or ``float8_e5m2``.
        activations: None, ``int8``, ``float8`` or ``float8_e5m2``; only checkpoints whose scales were measured have
            them.
        modules_to_not_convert: names or patterns of modules that stay dense.
        qmap: what quanto keeps in ``quanto_qmap.json``: by module, ``{"weights": "qint4", "activations": "none"}``.
            Where it says the same of all modules, it becomes `weights` and `activations`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        weights: str = "int8",
        activations: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        qmap: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.qmap: dict[str, Any] | None = None
        if qmap is not None:
            settings = QuantoWire().parse({"qmap": qmap})
            same = QuantoWire().config(settings)
            weights, activations = same.get("weights", weights), same.get("activations", activations)
            self.qmap = dict(qmap) if settings.by_module else None
        super().__init__(weights, activations, modules_to_not_convert, **kwargs)

    def post_init(self) -> None:
        """Check the arguments."""
        QuantoWire().parse(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        if self.qmap is None:
            del data["qmap"]
        return data


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """A quanto config, understood."""
    wire = QuantoWire()
    settings = wire.parse(data)
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=WeightRange(),
        skip=settings.skip,
        choose=partial(_choose, wire, settings),
    )


def _choose(
    wire: QuantoWire, settings: QuantoSettings, module: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantSpec:
    return wire.spec_for(wire.of(settings, module), shape, dtype)


def prepare(config: Any) -> None:
    """Refuse activations on the fly: their scales have to be measured.

    Raises:
        PlanError: activations are asked for.
    """
    try:
        settings = QuantoWire().parse(config.to_dict())
    except FormatError:
        return  # The recipe says it better.
    if any(types != "none" for types in (settings.activations, *(own[1] for _, own in settings.by_module))):
        raise PlanError(
            "quanto's activations are rounded by scales that have to be measured, which is not done while loading; "
            "quantize the weights alone, or load a checkpoint that quanto has calibrated"
        )


METHOD = Method("quanto", QuantoConfig, recipe, prepare=prepare)
