"""HQQ: half-quadratic quantization, one setting for all layers or one per kind of layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from lowbit.algorithms.hqq import HalfQuadratic
from lowbit.core import Kept, QuantSpec
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire.hqq.state import TERNARY
from lowbit.wire.hqq.wire import HqqSettings, HqqWire, tag_of

_FORMER = ("quant_zero", "quant_scale", "offload_meta")


class HqqConfig(QuantizationConfigMixin):
    """The arguments of `transformers.HqqConfig`, whose constructor needs hqq; this one doesn't.

    Args:
        nbits: 8, 6, 5, 4, 3, 2 or 1.
        group_size: weights per group, a multiple of 8; None for whole rows or columns.
        view_as_float: whether packed words are stored under the compute dtype.
        axis: 1 (None means the same) for groups along rows, 0 for groups along columns.
        dynamic_config: arguments by tag, a module's name without ``model``, ``layers`` and numbers
            (``self_attn.q_proj``); the other layers then stay dense.
        skip_modules: tags, or patterns of :func:`lowbit.nn.planning.matches`, of layers that stay dense.
        kwargs: `quant_zero`, `quant_scale` and `offload_meta` have no effect any more.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        nbits: float = 4,
        group_size: int | None = 64,
        view_as_float: bool = False,
        axis: int | None = None,
        dynamic_config: dict[str, Any] | None = None,
        skip_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if former := [name for name in _FORMER if kwargs.get(name)]:
            warnings.warn(f"HQQ no longer quantizes its scales: {', '.join(former)} has no effect", stacklevel=2)
        self.quant_method = QuantizationMethod.HQQ
        self.skip_modules = ["lm_head"] if skip_modules is None else list(skip_modules)
        if dynamic_config is None:
            own = {"nbits": nbits, "group_size": group_size, "view_as_float": view_as_float, "axis": axis}
            self.quant_config: dict[str, Any] = _checked(own)
        elif isinstance(dynamic_config, dict):
            self.quant_config = {tag: _checked(own) for tag, own in dynamic_config.items()}
        else:
            raise ValueError(f"dynamic_config maps tags to arguments, and this is {dynamic_config!r:.80}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what config.json holds, or from the arguments by name."""
        if "quant_config" not in config_dict:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = cls(skip_modules=config_dict.get("skip_modules"))
        config.quant_config = config_dict["quant_config"]
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_config": self.quant_config,
            "quant_method": self.quant_method,
            "skip_modules": self.skip_modules,
        }


def _checked(arguments: Any) -> dict[str, Any]:
    """The arguments of one setting as config.json has them."""
    if not isinstance(arguments, dict):
        raise ValueError(f"the settings of HQQ are an object, and this is {arguments!r:.80}")
    size = arguments.get("group_size", 64)
    if type(size) is int and size % 8:
        raise ValueError(f"group_size is a multiple of 8, not {size}")
    settings = HqqWire().parse({key: value for key, value in arguments.items() if key not in _FORMER})
    data: dict[str, Any] = HqqWire().config(settings)["quant_config"]
    return data


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """An HQQ config, understood."""
    wire = HqqWire()
    settings = wire.parse(data)
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=HalfQuadratic(),
        skip=settings.skip,
        choose=partial(_choose, wire, settings),
    )


def _choose(
    wire: HqqWire, settings: HqqSettings, module: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantSpec | Kept:
    own = settings.tagged(module)
    return Kept(f"no tag of dynamic_config is '{tag_of(module)}'") if own is None else wire.spec_for(own, shape, dtype)


def prepare(config: Any) -> None:
    """Refuse what can be read but not made.

    Raises:
        PlanError: 1.58 bits.
    """
    try:
        settings = HqqWire().parse(config.to_dict())
    except FormatError:
        return  # The recipe says it better.
    if any(own.nbits == TERNARY for own in (settings, *dict(settings.by_tag).values())):
        raise PlanError("weights of 1.58 bits are read but not made; take nbits=2")


METHOD = Method("hqq", HqqConfig, recipe, prepare=prepare)
