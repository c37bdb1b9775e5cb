"""AQLM: additive quantization with learned codebooks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from lowbit.algorithms.aqlm import AdditiveQuantization
from lowbit.core import Kept, Plan, QuantSpec, Scale
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire.aqlm import AqlmSettings, AqlmWire, both_spellings

_MAKING = ("beam", "epochs", "seed")


class AqlmConfig(transformers.AqlmConfig):
    """`transformers.AqlmConfig`, with what a dense model's codebooks are learned by.

    `linear_weights_not_to_quantize` is stored with and without ``.weight``: older versions of Transformers know
    ``lm_head.weight`` only, newer ones ``lm_head`` only.

    Args:
        args: of `transformers.AqlmConfig`.
        beam: how many sums the search for codes keeps; see :class:`lowbit.algorithms.aqlm.AdditiveQuantization`. Not
            stored, like the two that follow.
        epochs: turns of fitting the codebooks and searching codes, at most.
        seed: of the start of the codebooks.
        kwargs: of `transformers.AqlmConfig`.

    Raises:
        ValueError: `linear_weights_not_to_quantize` is not a list of texts, or `beam` or `epochs` out of range.
        TypeError: a size is not an integer.
    """

    def __init__(self, *args: Any, beam: int = 4, epochs: int = 8, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = self.linear_weights_not_to_quantize or []
        if not all(isinstance(name, str) for name in names):
            raise ValueError("linear_weights_not_to_quantize must be a list of strings")
        self.linear_weights_not_to_quantize = list(both_spellings(names))
        AdditiveQuantization(beam=beam, epochs=epochs, seed=seed)  # refuses what is out of range now, not while loading
        self.beam, self.epochs, self.seed = beam, epochs, seed

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in _MAKING}

    def leave_out(self, plan: Plan) -> None:
        """Name every module that stays dense: readers take all others for packed, the output head too."""
        dense = sorted(name for name, kept in plan.kept.items() if kept.reason != "embedding")
        self.linear_weights_not_to_quantize = list(both_spellings(dense))


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """An AQLM config, understood."""
    wire = AqlmWire()
    settings = wire.parse(data)
    making = {name: getattr(config, name) for name in _MAKING if hasattr(config, name)}
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=AdditiveQuantization(**making),
        skip=settings.skip,
        choose=partial(_choose, wire, settings),
    )


def _choose(
    wire: AqlmWire, settings: AqlmSettings, module: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantSpec | Kept:
    """Codebooks and scales in 16 bits: bf16 where the model is, else fp16."""
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    return replace(wire.spec(settings), scale=Scale(stored), dtype=stored)


def without_data(config: Any) -> None:
    """Warn that codebooks which are learned while a model loads know nothing of the layers' inputs."""
    warnings.warn(
        "AQLM without calibration data: codebooks are learned from the weights alone, as if all inputs of a layer "
        "mattered alike; at 2 bits that costs much quality, which calibration keeps",
        stacklevel=2,
    )


METHOD = Method("aqlm", AqlmConfig, recipe, without_data=without_data, not_stored=frozenset(_MAKING))
