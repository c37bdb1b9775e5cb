"""bitsandbytes: LLM.int8(), FP4 and NF4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from lowbit.algorithms import BlockwiseTable, Int8Rows
from lowbit.core import QuantSpec
from lowbit.errors import PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import find_wire


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """`transformers.BitsAndBytesConfig`; an integer `llm_int8_threshold` is taken as the number that it is."""

    def __init__(self, *args: Any, llm_int8_threshold: float = 6.0, **kwargs: Any) -> None:
        if type(llm_int8_threshold) is int:
            llm_int8_threshold = float(llm_int8_threshold)
        super().__init__(*args, llm_int8_threshold=llm_int8_threshold, **kwargs)  # type: ignore[misc]


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """A bitsandbytes config, understood."""
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
        choose=partial(_in_dtype, wire.spec(settings)) if four else None,
    )


def _in_dtype(spec: QuantSpec, module: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec:
    return replace(spec, dtype=dtype)


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


METHOD = Method(
    "bitsandbytes",
    BitsAndBytesConfig,
    recipe,
    keys=("bitsandbytes_4bit", "bitsandbytes_8bit"),  # by the flags in the config
    default_dtype=lambda pre_quantized: None if pre_quantized else "float16",
)
