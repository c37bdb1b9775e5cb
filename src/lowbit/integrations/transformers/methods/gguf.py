"""GGUF: types of llama.cpp, in files of its own or in safetensors, and on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.algorithms.ggml import GgmlBlocks
from lowbit.core import Kept, Plan, QuantSpec
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.recipe import Choose, Method, Recipe
from lowbit.wire import wire_named
from lowbit.wire.gguf.architectures import Architecture
from lowbit.wire.gguf.codec import spec_of
from lowbit.wire.gguf.metadata import facts_of
from lowbit.wire.gguf.mixtures import Mixture, ModelFacts, fitting, is_quantized, mixture
from lowbit.wire.gguf.names import architecture_for, to_gguf
from lowbit.wire.gguf.types import GgmlType


class GgufConfig(QuantizationConfigMixin):
    """How a GGUF file is loaded, or in which of its types a dense model is quantized.

    Args:
        gguf_file: Transformers fills in what ``from_pretrained(..., gguf_file=...)`` names.
        dequantize: turn the loaded file into a dense model.
        type: a type (``Q4_K``) or a mixture (``Q4_K_M``) to quantize a dense model to; the smallest, such as
            ``IQ2_XS``, need calibration data.
        modules_to_not_convert: patterns of modules that stay dense, see :func:`lowbit.nn.planning.matches`.

    Raises:
        FormatError: `type` is not a name, or `modules_to_not_convert` not a list of texts.
    """

    def __init__(
        self,
        gguf_file: str | None = None,
        dequantize: bool = False,
        type: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        del kwargs  # Transformers passes what other versions of this class have.
        if type is not None and not isinstance(type, str):
            raise FormatError("the type is a name such as Q4_K_M", found=repr(type)[:80])
        if modules_to_not_convert is not None and not (
            isinstance(modules_to_not_convert, list) and all(isinstance(name, str) for name in modules_to_not_convert)
        ):
            raise FormatError("modules_to_not_convert is a list of names", found=repr(modules_to_not_convert)[:80])
        self.quant_method: Any = "gguf"
        self.gguf_file, self.dequantize = gguf_file, dequantize
        self.type, self.modules_to_not_convert = type, modules_to_not_convert

    def leave_out(self, plan: Plan) -> None:
        """Patterns stay as they were given: tensors say what is dense, and a file for llama.cpp is made by these."""

    def to_dict(self) -> dict[str, Any]:
        """As it is stored: where the weights came from is of no use to a reader."""
        kept = {"type": self.type, "modules_to_not_convert": self.modules_to_not_convert}
        return {"quant_method": self.quant_method} | {name: value for name, value in kept.items() if value is not None}


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """A GGUF config, understood."""
    wire = wire_named("gguf")
    settings = wire.parse(data)
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=GgmlBlocks(),
        skip=settings.skip,
        choose_for=partial(choose_for, settings.label),
    )


def choose_for(label: str | None, model: Any, calibrated: bool) -> Choose:
    """How llama.cpp would choose the type of each weight of a model, with an importance matrix or without one.

    Raises:
        PlanError: no type is given, or one that isn't made without calibration data.
        FormatError: there is no such type.
    """
    if label is None:
        raise PlanError("to quantize a dense model, give GgufConfig a type, such as Q4_K_M")
    chosen = mixture(label, importance=calibrated)
    config = model.config.get_text_config(decoder=True).to_dict()
    try:
        row = architecture_for(config)
    except FormatError:  # GGUF has no names for this model's weights: all get the type of most.
        return partial(_one_type, chosen)
    return partial(_as_in_files, chosen, row, facts_of(row, config))


def _one_type(chosen: Mixture, module: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec | Kept:
    return _spec(fitting(chosen.base, shape[-1]))


def _as_in_files(
    chosen: Mixture, row: Architecture, facts: ModelFacts, module: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantSpec | Kept:
    found = to_gguf(row, f"{module}.weight")
    if found is None:
        return _one_type(chosen, module, shape, dtype)
    name, expert = found
    stacked = shape if expert is None else (facts.experts, *shape)
    return _spec(chosen(name, stacked, facts)) if is_quantized(name, shape) else Kept("llama.cpp keeps it in fp32")


def _spec(kind: GgmlType) -> QuantSpec | Kept:
    return Kept(f"stored as {kind.name}") if kind.dense else spec_of(kind)


METHOD = Method("gguf", GgufConfig, recipe, not_stored=frozenset({"gguf_file", "dequantize"}))
