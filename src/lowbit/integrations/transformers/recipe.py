"""What a quantization config asks for, in lowbit's own terms."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowbit.algorithms import Algorithm, BlockwiseTable, Int8Rows, RoundToNearest
from lowbit.core import QuantSpec
from lowbit.errors import FormatError, PlanError
from lowbit.wire import Wire, find_wire
from lowbit.wire.bitsandbytes import is_bitsandbytes

_LAYOUT = ("bits", "group_size", "sym", "desc_act")  # what GPTQModel's `dynamic` may change that files depend on


@dataclass(frozen=True)
class Recipe:
    """A quantization config, understood.

    Attributes:
        wire: spells the checkpoint.
        settings: of the wire.
        algorithm: quantizes on the fly.
        skip: the user's patterns of modules that stay dense.
        compute_dtype: what layers cast their inputs to, None for the inputs' own dtype.
        kernel: a kernel that the user insists on, None for the best.
        only_blocks: readers of this format look for quantized layers in the repeated blocks only.
        dense_on_cpu: modules that a device map puts on the CPU or on disk stay dense, in fp32.
        follows_dtype: the spec takes over the dtype of the weight that is quantized.
    """

    wire: Wire[Any]
    settings: Any
    algorithm: Algorithm
    skip: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    kernel: str | None = None
    only_blocks: bool = False
    dense_on_cpu: bool = False
    follows_dtype: bool = False

    @property
    def spec(self) -> QuantSpec:
        spec: QuantSpec = self.wire.spec(self.settings)
        return spec

    def spec_for(self, dtype: torch.dtype) -> QuantSpec:
        """The spec for a weight of `dtype` that is quantized on the fly."""
        return replace(self.spec, dtype=dtype) if self.follows_dtype else self.spec


RecipeMaker = Callable[[Any], Recipe]
_makers: dict[str, RecipeMaker] = {}


def set_recipe_maker(quant_method: str, maker: RecipeMaker | None) -> None:
    """Say how configs of a method become recipes; None takes that back."""
    if maker is None:
        _makers.pop(quant_method, None)
    else:
        _makers[quant_method] = maker


def make_recipe(config: Any) -> Recipe:
    """The recipe of a quantization config (an object of Transformers', ours, or anything with `to_dict`).

    Raises:
        FormatError: the config is of an unknown method or has values out of range.
        PlanError: it asks for something that lowbit doesn't do.
    """
    data = dict(config.to_dict())
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if method in _makers:
        return _makers[method](config)
    if is_bitsandbytes(data):
        return _bitsandbytes(config, data)
    wire = find_wire(data | {"quant_method": method})
    settings = wire.parse(data)
    if wire.name == "gptq":
        return _gptq(config, data, wire, settings)
    if wire.name == "awq":
        return _awq(data, wire, settings)
    raise PlanError(f"the wire '{wire.name}' has no quantization method of its own; add one with register_method")


def _bitsandbytes(config: Any, data: Mapping[str, Any]) -> Recipe:
    _default_to_8bit(config)
    data = {**data, "load_in_8bit": config.load_in_8bit, "load_in_4bit": config.load_in_4bit}
    if data.get("llm_int8_has_fp16_weight"):
        raise PlanError(
            "llm_int8_has_fp16_weight keeps the weights in 16 bits to train them; load the model dense for that"
        )
    wire = find_wire(data)
    settings = wire.parse(data)
    four = wire.name == "bitsandbytes-4bit"
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=BlockwiseTable() if four else Int8Rows(),
        skip=tuple(data.get("llm_int8_skip_modules") or ()),
        compute_dtype=settings.compute_dtype if four else None,
        dense_on_cpu=bool(data.get("llm_int8_enable_fp32_cpu_offload")),
        follows_dtype=four,
    )


def _default_to_8bit(config: Any) -> None:
    """Neither flag set means 8 bits, unless an argument of the 4-bit types says otherwise.

    The documentation's own examples set nothing but ``llm_int8_*`` and mean 8 bits.
    """
    if config.load_in_8bit or config.load_in_4bit:
        return
    plain = (torch.float32, "fp4", False)
    given = (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
    config.load_in_4bit = given != plain
    config.load_in_8bit = not config.load_in_4bit


def _gptq(config: Any, data: Mapping[str, Any], wire: Wire[Any], settings: Any) -> Recipe:
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=RoundToNearest(symmetric=settings.symmetric),
        skip=(*(data.get("modules_to_not_convert") or ()), *_excluded(data)),
        kernel="torch" if getattr(config, "use_exllama", None) is False else None,
        only_blocks=True,
    )


def _excluded(data: Mapping[str, Any]) -> list[str]:
    """The patterns of modules that GPTQModel's ``dynamic`` leaves dense.

    Raises:
        FormatError: it gives some modules another layout.
    """
    rules = data.get("dynamic") or {}
    for pattern, changes in rules.items():
        if not pattern.startswith("-:") and any(changes.get(key, data.get(key)) != data.get(key) for key in _LAYOUT):
            raise FormatError(
                "modules with settings of their own are not supported yet", found=f"dynamic: {pattern}"[:80]
            )
    # There a match may end anywhere in the name.
    return [f"(?:{pattern[2:]}).*" for pattern in rules if pattern.startswith("-:")]


def _awq(data: Mapping[str, Any], wire: Wire[Any], settings: Any) -> Recipe:
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=RoundToNearest(symmetric=not settings.zero_point),
        skip=tuple(data.get("modules_to_not_convert") or ()),
        only_blocks=True,
    )


def sign(config: Any) -> None:
    """Name lowbit as the writer of a new GPTQ checkpoint: readers tell the dialect of its zero points by that."""
    if getattr(config, "quant_method", None) == "gptq" and getattr(config, "meta", None) is None:
        config.meta = {"quantizer": [f"lowbit:{_version('lowbit')}"]}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def warn_uncalibrated(config: Any) -> None:
    """Say that a dataset was given to a method whose calibration isn't there yet."""
    if getattr(config, "dataset", None) is not None:
        warnings.warn(
            "calibrated GPTQ is not implemented yet: the weights are rounded to nearest and the dataset is not used",
            stacklevel=2,
        )
