"""What ``config.json`` says, of the whole checkpoint and of one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.errors import FormatError
from lowbit.wire.base import Json
from lowbit.wire.compressed_tensors.schemes import (
    QUANTIZED,
    Args,
    Scheme,
    Sparsity,
    names_of,
    parse_scheme,
    preset,
)
from lowbit.wire.compressed_tensors.specs import spec_of


@dataclass(frozen=True)
class CompressedTensorsSettings:
    """What ``config.json`` says.

    Attributes:
        schemes: of the whole checkpoint; of one module none or one.
        ignore: targets that have no scheme.
        format: of the whole checkpoint; schemes may name their own.
        kv_cache: how attention's cache was meant to be quantized. lowbit keeps the scales and caches in full precision.
        sparsity: which weights are stored without their zeros; of one module whether it is.
    """

    schemes: tuple[Scheme, ...] = ()
    ignore: tuple[str, ...] = ()
    format: str = "dense"
    kv_cache: Args | None = None
    sparsity: Sparsity | None = None

    @property
    def scheme(self) -> Scheme:
        """The one scheme of a module's settings."""
        if len(self.schemes) != 1 or self.schemes[0].weights is None:
            raise FormatError("no config group quantizes this module", found=f"{len(self.schemes)} groups")
        return self.schemes[0]

    @property
    def weights(self) -> Args:
        """How the weight of a module is quantized."""
        return self.scheme.weights or Args()

    @property
    def module_format(self) -> str:
        """The format of a module: its scheme's, the checkpoint's, or the one that the scheme implies."""
        for spelled in (self.scheme.format, self.format):
            if spelled in QUANTIZED:
                return str(spelled)
        return self.scheme.inferred_format


def flatten(config: Json) -> Json:
    """The configuration, taken out of the ``quantization_config`` that older files put it in."""
    nested = config.get("quantization_config")
    if not isinstance(nested, Mapping):
        return config
    outer = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**outer, **nested}


def parse_groups(groups: object) -> tuple[Scheme, ...]:
    """The schemes of ``config_groups``.

    Raises:
        FormatError: one is not a scheme, or a preset that is unknown.
    """
    if groups is None:
        return ()
    if not isinstance(groups, Mapping):
        raise FormatError("config_groups is not an object", found=repr(groups)[:80])
    return tuple(
        preset(name, names_of(group, f"config_groups.{name}"))
        if isinstance(group, list | tuple)
        else parse_scheme(group, f"config_groups.{name}")
        for name, group in groups.items()
    )


def check_format(settings: CompressedTensorsSettings) -> None:
    """Raise a FormatError where format and scheme contradict each other, or the scheme has no spec."""
    weights, spelled = settings.weights, settings.module_format
    spec_of(settings.scheme)
    fits = {
        "pack-quantized": weights.kind == "int",
        "int-quantized": weights.kind == "int",
        "float-quantized": weights.kind == "float" and weights.bits == 8 and not weights.exponents,
        "naive-quantized": weights.kind == "int" or (weights.bits == 8 and not weights.exponents),
        "nvfp4-pack-quantized": weights.strategy == "tensor_group",
        "mxfp4-pack-quantized": weights.exponents and weights.bits == 4,
        "mxfp6-pack-quantized": weights.exponents and weights.bits == 6,
        "mxfp8-quantized": weights.exponents and weights.bits == 8,
    }[spelled]
    if not fits:
        raise FormatError(
            "the scheme is none of this format", found=f"{weights.bits}-bit {weights.kind}", expected=spelled
        )
