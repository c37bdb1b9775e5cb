"""EETQ: int8 rows, weights only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from lowbit.algorithms.eetq import HalfAwayRows
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wire_named


class EetqConfig(transformers.EetqConfig):
    """`transformers.EetqConfig`."""


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """An EETQ config, understood."""
    wire = wire_named("eetq")
    settings = wire.parse(data)
    return Recipe(wire=wire, settings=settings, algorithm=HalfAwayRows(), skip=settings.kept or ())


METHOD = Method("eetq", EetqConfig, recipe, default_dtype=lambda pre_quantized: "float16", names_defaults=True)
