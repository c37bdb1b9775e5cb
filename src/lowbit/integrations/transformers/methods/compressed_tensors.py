"""compressed-tensors: the schemes of llm-compressor, by name or in full."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers.utils.quantization_config import QuantizationMethod

from lowbit.algorithms.minmax import MinMax
from lowbit.core import Kept, Plan, QuantSpec
from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire.compressed_tensors import (
    METHOD as NAME,
)
from lowbit.wire.compressed_tensors import (
    PRESETS,
    CompressedTensorsSettings,
    CompressedTensorsWire,
    Scheme,
    first_match,
    flatten,
    spec_of,
)

_WIRE = CompressedTensorsWire()
_STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
_FUSED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class CompressedTensorsConfig(transformers.CompressedTensorsConfig):
    """The arguments of `transformers.CompressedTensorsConfig`, whose constructor needs compressed-tensors.

    Beyond it, a dense model is quantized as it is loaded: round to nearest, with activations whose scales are made as
    they come. ``CompressedTensorsConfig({"W4A16": ["Linear"]})`` is enough.

    Args:
        config_groups: schemes by any name, or targets by the name of a preset (``W4A16``, ``FP8_DYNAMIC``, ...).
        format: of the whole checkpoint.
        quantization_status: as stored; it has no effect, since the tensors say how they are stored.
        kv_cache_scheme: kept, as the scales are, and not acted on.
        global_compression_ratio: kept.
        ignore: names, ``re:`` expressions or classes of modules that stay dense.
        quant_method: ``compressed-tensors``.
        run_compressed: former name of the opposite of `dequantize`.
        dequantize: make the model dense as it is loaded.
        use_optimized_inference: lowbit always runs packed; this has no further effect.
        kwargs: other keys of the file, which are kept.

    Raises:
        ValueError: `quantization_status` or `quant_method` is unknown.
    """

    def __init__(
        self,
        config_groups: dict[str, Any] | None = None,
        format: str = "dense",
        quantization_status: Any = "initialized",
        kv_cache_scheme: dict[str, Any] | None = None,
        global_compression_ratio: float | None = None,
        ignore: list[str] | None = None,
        quant_method: str = NAME,
        run_compressed: bool | None = None,
        dequantize: bool = False,
        use_optimized_inference: bool = False,
        **kwargs: Any,
    ) -> None:
        if str(getattr(quant_method, "value", quant_method)) != NAME:
            raise ValueError(f"quant_method is {NAME!r}, not {quant_method!r}")
        status = getattr(quantization_status, "value", quantization_status)
        if status not in _STATUSES:
            raise ValueError(f"quantization_status is one of {_STATUSES}, not {quantization_status!r}")
        self.quant_method = QuantizationMethod.COMPRESSED_TENSORS
        self.quantization_config = None  # where Transformers keeps the library's own object
        self.config_groups = config_groups or {}
        self.format, self.quantization_status = format, status
        self.kv_cache_scheme, self.global_compression_ratio = kv_cache_scheme, global_compression_ratio
        self.ignore = list(ignore or [])
        self.dequantize = dequantize or run_compressed is False
        self.use_optimized_inference = use_optimized_inference
        self.others = kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what config.json holds, also below the ``quantization_config`` of older files."""
        config = cls(**{**flatten(config_dict), **kwargs})
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.others,
            "quant_method": NAME,
            "config_groups": self.config_groups,
            "format": self.format,
            "quantization_status": self.quantization_status,
            "kv_cache_scheme": self.kv_cache_scheme,
            "global_compression_ratio": self.global_compression_ratio,
            "ignore": self.ignore,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """As :meth:`to_dict`."""
        return self.to_dict()

    def post_init(self) -> None:
        """Nothing is left to check."""

    @property
    def is_quantized(self) -> bool:
        """Whether there are schemes."""
        return bool(self.config_groups)

    @property
    def is_quantization_compressed(self) -> bool:
        """Whether the weights are stored packed."""
        return self.is_quantized and self.quantization_status == "compressed"

    @property
    def has_fp8_modules(self) -> bool:
        """Whether a scheme has weights of FP8."""
        weights = [scheme.weights for scheme in _WIRE.parse(self.to_dict()).schemes]
        return any(args is not None and args.kind == "float" and args.bits == 8 for args in weights)

    def leave_out(self, plan: Plan) -> None:
        """Put every linear layer of a plan that stays dense, and that a target matches, on the ``ignore`` list.

        Warns of targets that match nothing.
        """
        targets = [target for scheme in _WIRE.parse(self.to_dict()).schemes for target in scheme.targets]
        dense = [name for name, kept in plan.kept.items() if _is_linear(kept) and first_match(targets, name)]
        # Routers are linear layers to readers that know the model in another form, and under other names.
        routers = [
            rf"re:.*\.{re.escape(name.rpartition('.')[2])}$" for name, kept in plan.kept.items() if _is_router(kept)
        ]
        found = [*map(_as_target, dense), *routers]
        self.ignore += [name for name in dict.fromkeys(found) if name not in set(self.ignore)]
        useless = [target for target in targets if not any(first_match([target], name) for name in plan)]
        if useless:
            warnings.warn(f"these targets match no layer: {useless}", stacklevel=2)


def _is_linear(kept: Kept) -> bool:
    return kept.reason != "embedding" and not kept.reason.endswith("is not a linear layer")


def _is_router(kept: Kept) -> bool:
    kind = kept.reason.removesuffix("is not a linear layer")
    return kind != kept.reason and ("Router" in kind or "Gate" in kind or "Gating" in kind)


def _as_target(name: str) -> str:
    """A layer by its name; fused experts, which the format knows one by one, by an expression."""
    experts, _, parameter = name.rpartition(".")
    return rf"re:{re.escape(experts)}\..*" if experts.endswith("experts") and parameter in _FUSED else name


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """A compressed-tensors config, understood."""
    settings = _WIRE.parse(data)
    return Recipe(wire=_WIRE, settings=settings, algorithm=MinMax(), choose=partial(_choose, settings))


def _choose(
    settings: CompressedTensorsSettings, module: str, shape: tuple[int, int], dtype: torch.dtype
) -> QuantSpec | Kept:
    schemes = _WIRE.of(settings, module).schemes
    if not schemes:
        ignored = first_match(settings.ignore, module)
        return Kept(f"ignored by '{ignored}'" if ignored else "no target of a config group with weights matches")
    if dtype not in _SCALES:
        raise PlanError(f"{module}: weights of {dtype} can't be quantized to compressed-tensors")
    return spec_of(schemes[0], dtype)


def prepare(config: Any) -> None:
    """Write presets out, choose the formats, and mark the checkpoint as compressed.

    Raises:
        PlanError: nothing is quantized, or something needs calibration.
    """
    try:
        settings = _WIRE.parse(config.to_dict())
    except FormatError:
        return  # The recipe says it better.
    schemes = [replace(scheme, format=scheme.format or _format(settings, scheme)) for scheme in settings.schemes]
    for scheme in schemes:
        _check_without_data(scheme)
    if settings.sparsity or settings.kv_cache:
        raise PlanError("sparse weights and scales of the cache can be read, not made: leave out "
                        f"{'sparsity_config' if settings.sparsity else 'kv_cache_scheme'}")  # fmt: skip
    if not any(scheme.weights for scheme in schemes):
        raise PlanError(f"config_groups quantizes no weights; name a preset, one of {sorted(PRESETS)}, or a scheme")
    formats = {scheme.format for scheme in schemes if scheme.weights}
    config.config_groups = {f"group_{number}": scheme.to_dict() for number, scheme in enumerate(schemes)}
    config.format = formats.pop() if len(formats) == 1 else "mixed-precision"
    config.quantization_status = "compressed"


def _format(settings: CompressedTensorsSettings, scheme: Scheme) -> str | None:
    return replace(settings, schemes=(scheme,)).module_format if scheme.weights else None


def _check_without_data(scheme: Scheme) -> None:
    """Raise a PlanError where a scheme needs to see activations."""
    for args, what in ((scheme.inputs, "input"), (scheme.outputs, "output")):
        if args is not None and args.dynamic != "yes":
            raise PlanError(
                f"stored scales of {what} activations need calibration, which quantizing on the fly has not; "
                f"use a scheme with dynamic activations or none, for {list(scheme.targets)}"
            )
    if scheme.weights and scheme.weights.actorder:
        raise PlanError("actorder 'group' needs calibration, which quantizing on the fly has not")


METHOD = Method(
    NAME,
    CompressedTensorsConfig,
    recipe,
    prepare=prepare,
    not_stored=frozenset({"quantization_status", "global_compression_ratio", "format"}),
    loading=frozenset({"dequantize", "use_optimized_inference"}),
)
