"""FBGEMM FP8: e4m3 rows, activations rounded to e4m3 per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from lowbit.algorithms import ScaledFloat8
from lowbit.core import QuantSpec
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wire_named
from lowbit.wire.fbgemm_fp8 import LEAST_SCALE


class FbgemmFp8Config(transformers.FbgemmFp8Config):
    """`transformers.FbgemmFp8Config`; `activation_scale_ub` may be changed when a quantized checkpoint is loaded."""


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """An FBGEMM FP8 config, understood."""
    wire = wire_named("fbgemm_fp8")
    settings = wire.parse(data)
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=ScaledFloat8(floor=LEAST_SCALE),
        skip=settings.kept or (),
        choose=partial(_in_dtype, wire.spec(settings)),
    )


def _in_dtype(spec: QuantSpec, module: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec:
    return replace(spec, dtype=dtype)


METHOD = Method(
    "fbgemm_fp8",
    FbgemmFp8Config,
    recipe,
    default_dtype=lambda pre_quantized: "bfloat16",
    loading=frozenset({"activation_scale_ub"}),
    names_defaults=True,
)
