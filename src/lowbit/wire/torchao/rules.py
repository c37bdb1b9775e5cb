"""Which of torchao's configs a weight has: by its name (``FqnToConfig``), or by what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from lowbit.core import FloatCode, IntCode, QuantSpec, patterns
from lowbit.errors import FormatError, SpecError
from lowbit.wire.base import Json
from lowbit.wire.torchao.config import PER_TOKEN, AoConfig, granularity_of, parse_config, stored_dtype

Rules = tuple[tuple[str, AoConfig | None], ...]
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
_DEFAULT: Final = "_default"
_AXIS: Final = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}


def parse_rules(fields: Json) -> Rules:
    """The entries of ``FqnToConfig``, in their order.

    Raises:
        FormatError: there are none, a pattern is not one, or a config inside is not understood.
    """
    entries = fields.get("fqn_to_config") or fields.get("module_fqn_to_config")
    if not isinstance(entries, Mapping) or not entries:
        raise FormatError("FqnToConfig maps names to configs", found=repr(entries)[:80])
    rules: list[tuple[str, AoConfig | None]] = []
    for name, entry in entries.items():
        if name.startswith("re:"):
            _matches(name, "")
        try:
            rules.append((name, None if entry is None else parse_config(entry)))
        except FormatError as error:
            raise error.located(tensor=f"quant_type of '{name}'"[:200]) from error
    return tuple(rules)


def store_rules(rules: Rules) -> dict[str, Any]:
    """The inverse of :func:`parse_rules`, with class and version."""
    entries = {name: None if config is None else config.data for name, config in rules}
    return {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": entries, "module_fqn_to_config": entries},
    }


def rule_of(rules: Rules, module: str) -> AoConfig | None:
    """Names of the weight, then of the module, then the first pattern that matches either, then the default."""
    exact = dict(rules)
    for name in (f"{module}.weight", module):
        if name in exact:
            return exact[name]
    for name, config in rules:
        if name.startswith("re:") and (_matches(name, f"{module}.weight") or _matches(name, module)):
            return config
    return exact.get(_DEFAULT)


def _matches(pattern: str, name: str) -> bool:
    try:
        return patterns.fullmatch(pattern.removeprefix("re:"), name)
    except SpecError as error:
        raise FormatError(f"quant_type: {error}", found=pattern[:80]) from error


def nearest_config(spec: QuantSpec) -> tuple[str, dict[str, Any]]:
    """The config that makes weights of a spec, and those of its fields that are not as by default.

    Raises:
        FormatError: torchao has nothing of the kind.
    """
    grouping = granularity_of(spec.grouping.rows, spec.grouping.cols)
    if isinstance(spec.code, FloatCode) and spec.code.dtype.itemsize == 1:
        number = stored_dtype(str(spec.code))
        if spec.activation.kind == "none":
            return "Float8WeightOnlyConfig", {"weight_dtype": number, "granularity": grouping}
        inputs = granularity_of(0 if spec.activation.per == "tensor" else 1, spec.activation.size)
        return "Float8DynamicActivationFloat8WeightConfig", {
            "weight_dtype": number,
            "activation_dtype": stored_dtype(spec.activation.number),
            "granularity": [inputs, grouping],
            "activation_value_ub": spec.activation.bound or None,
        }
    if not isinstance(spec.code, IntCode):
        raise FormatError("torchao has integers and FP8 numbers", found=spec)
    if spec.zero is not None and spec.zero.kind == "additive":
        if spec.code != IntCode(4, signed=True) or not spec.grouping.cols:
            raise FormatError("torchao has signed 4-bit integers with additive zeros, in groups", found=spec)
        return "Int4WeightOnlyConfig", {"group_size": spec.grouping.cols}
    return _nearest_integers(spec, spec.code, grouping)


def _nearest_integers(spec: QuantSpec, code: IntCode, grouping: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if spec.activation.kind != "none" and spec.activation != PER_TOKEN:
        inputs = granularity_of(0 if spec.activation.per == "tensor" else 1, 0)
        mapping = "SYMMETRIC" if spec.activation.symmetric else "ASYMMETRIC"
        return "Int8DynamicActivationInt8WeightConfig", {
            "granularity": [inputs, grouping],
            "act_mapping_type": {"_type": "MappingType", "_data": mapping},
            "reduce_range": spec.activation.number == "int7",
        }
    if code.bits == 8 and spec.scale.dtype == torch.float32 and spec.zero is None and spec.activation.kind == "none":
        return "Int8WeightOnlyConfig", {"granularity": grouping}
    if spec.grouping.rows != 1:
        raise FormatError("torchao has one scale per tensor for int8 with fp32 scales only", found=spec)
    along = (
        granularity_of(1, spec.grouping.cols)
        if spec.grouping.cols
        else {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    )
    prefix = "" if spec.activation.kind == "none" else "weight_"
    name = "Int8DynamicActivationIntxWeightConfig" if prefix else "IntxWeightOnlyConfig"
    scale_dtype = spec.scale.dtype if spec.scale.dtype in FLOATS else torch.float32
    return name, {
        "weight_dtype": stored_dtype(f"int{code.bits}"),
        f"{prefix}granularity": along,
        f"{prefix}mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if spec.zero is None else "ASYMMETRIC"},
        f"{prefix}scale_dtype": None
        if scale_dtype == spec.dtype
        else stored_dtype(str(scale_dtype).removeprefix("torch.")),
    }
