"""AQLM: additive quantization with learned codebooks; read, run, trained on and saved, but not made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from lowbit.algorithms import RoundToNearest
from lowbit.errors import PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire.aqlm import AqlmWire, both_spellings


class AqlmConfig(transformers.AqlmConfig):
    """`transformers.AqlmConfig`; `linear_weights_not_to_quantize` with and without ``.weight``.

    Older versions of Transformers know ``lm_head.weight`` only, newer ones ``lm_head`` only: each name is stored in
    both ways.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = self.linear_weights_not_to_quantize or []
        if not all(isinstance(name, str) for name in names):
            raise ValueError("linear_weights_not_to_quantize must be a list of strings")
        self.linear_weights_not_to_quantize = list(both_spellings(names))


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """An AQLM config, understood."""
    wire = AqlmWire()
    settings = wire.parse(data)
    return Recipe(wire=wire, settings=settings, algorithm=RoundToNearest(), skip=settings.skip)


def prepare(config: Any) -> None:
    """Refuse to quantize on the fly.

    Raises:
        PlanError: always.
    """
    raise PlanError(
        "AQLM's codebooks are learned from data over hours, so that a model can't be quantized to it while it loads; "
        "load a checkpoint that is in this format already"
    )


METHOD = Method("aqlm", AqlmConfig, recipe, prepare=prepare)
