"""GGUF: types of llama.cpp, in files of its own or in safetensors, and on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.algorithms.ggml import MAKERS, GgmlBlocks
from lowbit.core import Kept, QuantSpec
from lowbit.core.ggml import GGML_SPECS
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wire_named


class GgufConfig(QuantizationConfigMixin):
    """How a GGUF file is loaded, or in which of its types a dense model is quantized.

    Args:
        gguf_file: Transformers fills in what ``from_pretrained(..., gguf_file=...)`` names.
        dequantize: turn the loaded file into a dense model.
        type: a type (``Q4_K``) or a mixture (``Q4_K_M``) to quantize a dense model to.
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
        skip=tuple(data.get("modules_to_not_convert") or ()),
        choose=partial(choose, settings.label),
    )


def choose(label: str | None, module: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec | Kept:
    """The type of one weight that is quantized on the fly.

    Raises:
        PlanError: no type is given, or one that there isn't.
    """
    del module, dtype
    if label is None:
        raise PlanError("to quantize a dense model, give GgufConfig a type, such as Q4_K")
    spec = GGML_SPECS.get(label)
    if spec is None:
        raise PlanError(f"there is no type '{label}' of GGUF; there are {', '.join(MAKERS)}")
    return spec


METHOD = Method("gguf", GgufConfig, recipe, not_stored=frozenset({"gguf_file", "dequantize"}))
