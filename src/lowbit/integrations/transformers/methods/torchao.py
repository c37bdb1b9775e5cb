"""torchao: integers and FP8, with or without quantized activations, per model or per module."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from lowbit.algorithms import AffineIntegers, Algorithm, Int4Additive, ScaledFloat8
from lowbit.core import Kept, QuantSpec
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire.torchao.config import FLOAT8, INT4, INT8, old_config
from lowbit.wire.torchao.wire import TorchAoSettings, TorchAoWire

_WIRE = TorchAoWire()
# torchao gives its int8 tensors this floor, whatever the dtype, and its intx tensors the dtype's own.
_INT8_FLOOR = torch.finfo(torch.float32).eps
_DEPTH = 8  # of objects inside of a config


class TorchAoConfig(QuantizationConfigMixin):
    """`transformers.TorchAoConfig`, which works without torchao.

    Args:
        quant_type: one of torchao's config objects; a dict as it stands in ``config.json``; or, as in Transformers 4,
            ``int4_weight_only``, ``int8_weight_only`` or ``int8_dynamic_activation_int8_weight``.
        modules_to_not_convert: patterns of modules that stay dense.
        include_input_output_embeddings: embeddings and output heads are packed; such checkpoints are read, but dense
            ones are not packed so on the fly.
        untie_embedding_weights: means something only with the former.
        kwargs: arguments of a `quant_type` that is a text: ``group_size`` and ``inner_k_tiles`` (which describes the
            layout of a kernel and is not used), or ``group_size``.

    Raises:
        FormatError: an unknown `quant_type`, an argument that it doesn't take, or a value out of range.
    """

    def __init__(
        self,
        quant_type: Any,
        modules_to_not_convert: list[str] | None = None,
        include_input_output_embeddings: bool = False,
        untie_embedding_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QuantizationMethod.TORCHAO
        self.quant_type = _stored(quant_type, kwargs)
        self.modules_to_not_convert = modules_to_not_convert
        self.include_input_output_embeddings = include_input_output_embeddings
        self.untie_embedding_weights = untie_embedding_weights
        _WIRE.parse(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        data["quant_type"] = {"default": data["quant_type"]}
        return data


def _stored(quant_type: Any, arguments: dict[str, Any]) -> Any:
    """A `quant_type` as torchao stores it."""
    if isinstance(quant_type, str):
        arguments.pop("quant_method", None)
        return old_config(quant_type, {**(arguments.pop("quant_type_kwargs", None) or {}), **arguments}).data
    if isinstance(quant_type, Mapping):
        inner = quant_type.get("default", quant_type)
        return dict(inner) if isinstance(inner, Mapping) else inner
    if isinstance(quant_type, type) or not dataclasses.is_dataclass(quant_type):
        raise FormatError("quant_type is a config of torchao, a dict or a text", found=repr(quant_type)[:80])
    return _encode(quant_type, _DEPTH)


def _encode(value: Any, depth: int) -> Any:
    """A config object of torchao's, by the names of its class and fields."""
    if depth == 0:
        raise FormatError("a config of torchao is nested too deep", found=repr(value)[:80])
    name = type(value).__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        version = fields.pop("version", getattr(value, "version", 1))
        return {"_type": name, "_version": version, "_data": _encode(fields, depth - 1)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {"_type": name, "_version": 1, "_data": _encode(value._asdict(), depth - 1)}
    if isinstance(value, enum.Enum):
        return {"_type": name, "_data": value.name}
    if isinstance(value, torch.dtype):
        return {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _encode(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry, depth - 1) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError("a config of torchao holds what can't be stored", found=name)


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """A torchao config, understood."""
    settings = _WIRE.parse(data)
    return Recipe(
        wire=_WIRE,
        settings=settings,
        algorithm=AffineIntegers(),
        skip=settings.kept or (),
        choose=partial(_choose, settings),
        algorithms=partial(_algorithm, settings),
    )


def _choose(settings: TorchAoSettings, module: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec | Kept:
    own = _WIRE.of(settings, module)
    if own.config is None:
        return Kept("FqnToConfig leaves it out")
    return _WIRE.spec_for(own, shape, dtype)


def _algorithm(settings: TorchAoSettings, module: str) -> Algorithm:
    config = _WIRE.of(settings, module).config
    if config is None:
        raise PlanError("no rule says how this weight is quantized")
    if config.kind == INT4:
        return Int4Additive()
    if config.kind == FLOAT8:
        return ScaledFloat8(in_dtype=True)
    floor = _INT8_FLOOR if config.kind == INT8 else 0.0
    return AffineIntegers(config.mapping, reduced=config.reduced, fitted=config.fitted, floor=floor)


def prepare(config: Any) -> None:
    """Refuse to pack embeddings on the fly; those of stored checkpoints are read.

    Raises:
        PlanError: the config asks for it.
    """
    if getattr(config, "include_input_output_embeddings", False):
        raise PlanError(
            "include_input_output_embeddings packs embeddings, which lowbit doesn't do on the fly; leave it out to "
            "keep them and the output head dense"
        )


METHOD = Method("torchao", TorchAoConfig, recipe, prepare=prepare)
