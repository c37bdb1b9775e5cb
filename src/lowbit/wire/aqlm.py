"""AQLM: tiles of weights as sums of vectors from codebooks, additive quantization (arXiv:2401.06118).

============= ============================== ====================================================================
``codes``     int8, int16 or int32           two's complement of unsigned indices: read modulo ``2**bits``
              ``[out/og, in/ig, codebooks]``
``codebooks`` fp16, bf16 or fp32             the vectors, each a tile of ``og x ig`` weights
              ``[codebooks, 2**bits, og, ig]``
``scales``    as the codebooks               one per row of tiles
              ``[out/og, 1, 1, 1]``
============= ============================== ====================================================================

``tile[o, i] = scales[o] * sum over c of codebooks[c, codes[o, i, c] mod 2**bits]``. The sum is rounded to the dtype of
the codebooks, and so is the product.

The first forward on a CPU of AQLM's own layer transposes 8-bit codes in place, and a model that is saved after that
holds ``[in/ig, out/og, codebooks]``. The number of scales tells; where ``out/og`` equals ``in/ig`` nothing does, and
the codes are taken as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.core import Grouping, QuantSpec, QuantTensor, Scale, VectorCode
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, field, names_in, require_tensor, require_tensors

BITS = tuple(range(1, 25))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MAX_GROUP = 1 << 12
_MAX_ROWS = 1 << 31  # of all codebooks together: an index is 32 bits wide
_CPU_BITS = 8  # codes of this width are transposed by a forward on the CPU


@dataclass(frozen=True)
class AqlmSettings:
    """What ``config.json`` says.

    Attributes:
        codebooks: how many vectors are summed.
        bits: width of an index.
        in_group: weights along the input axis that a vector holds.
        out_group: the same along the output axis.
        skip: ``linear_weights_not_to_quantize``, which other readers need; here the files decide.
    """

    codebooks: int = 1
    bits: int = 16
    in_group: int = 8
    out_group: int = 1
    skip: tuple[str, ...] = ()

    @property
    def code(self) -> VectorCode:
        return VectorCode(self.codebooks, self.bits, self.out_group, self.in_group)


class AqlmWire(Wire[AqlmSettings]):
    """Any number of codebooks, of any size, over tiles of any shape."""

    name: ClassVar[str] = "aqlm"
    quant_method: ClassVar[str] = "aqlm"
    suffixes: ClassVar[tuple[str, ...]] = ("codes", "codebooks", "scales")
    marker: ClassVar[str] = "codebooks"

    def parse(self, config: Json) -> AqlmSettings:
        bits = field(config, "nbits_per_codebook", int, 16, allowed=BITS)
        codebooks = _positive(config, "num_codebooks", 1, _MAX_ROWS - 1 >> bits)
        return AqlmSettings(
            codebooks=codebooks,
            bits=bits,
            in_group=_positive(config, "in_group_size", 8, _MAX_GROUP),
            out_group=_positive(config, "out_group_size", 1, _MAX_GROUP),
            skip=names_in(config, "linear_weights_not_to_quantize"),
        )

    def config(self, settings: AqlmSettings) -> dict[str, Any]:
        return {
            "quant_method": "aqlm",
            "in_group_size": settings.in_group,
            "out_group_size": settings.out_group,
            "num_codebooks": settings.codebooks,
            "nbits_per_codebook": settings.bits,
            "linear_weights_not_to_quantize": list(settings.skip),
        }

    def settings_for(self, spec: QuantSpec) -> AqlmSettings:
        code = spec.code
        if not isinstance(code, VectorCode):
            raise FormatError("AQLM's codebooks are learned, not converted to", found=spec, expected="vector codes")
        return AqlmSettings(code.codebooks, code.bits, code.in_group, code.out_group)

    def spelling(self, settings: AqlmSettings, spec: QuantSpec) -> QuantSpec:
        return _spec(settings, spec.scale.dtype if spec.scale.dtype in _FLOATS else torch.float32)

    def join(self, settings: Mapping[str, AqlmSettings], kept: Collection[str]) -> AqlmSettings:
        return replace(super().join(settings, kept), skip=both_spellings(kept))

    def spec(self, settings: AqlmSettings) -> QuantSpec:
        return _spec(settings, torch.float16)

    def expected(self, settings: AqlmSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        code, (out_features, in_features) = settings.code, shape
        tiles = out_features // code.out_group, in_features // code.in_group
        return {
            "codes": ((*tiles, code.codebooks), code.index_dtype),
            "codebooks": ((code.codebooks, 1 << code.bits, code.out_group, code.in_group), spec.scale.dtype),
            "scales": ((tiles[0], 1, 1, 1), spec.scale.dtype),
        }

    def read(self, settings: AqlmSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, self.suffixes)
        codes, codebooks, scales = (tensors[name] for name in self.suffixes)
        require_tensor("codebooks", codebooks, dtypes=_FLOATS, dims=4)
        require_tensor("scales", scales, dims=4)
        require_tensor("codes", codes, dims=3)
        if _is_transposed(settings, codes, scales.shape[0]):
            codes = codes.transpose(0, 1)
        shape = (scales.shape[0] * settings.out_group, codes.shape[1] * settings.in_group)
        spec = _spec(settings, codebooks.dtype)
        for name, (wanted, dtype) in self.expected(settings, spec, shape).items():
            require_tensor(name, codes if name == "codes" else tensors[name], shape=wanted, dtypes=(dtype,))
        own = {"codes": codes.contiguous(), "codebooks": codebooks, "scales": scales.reshape(-1, 1)}
        return QuantTensor(spec, own, shape).validate()

    def write(self, settings: AqlmSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"AQLM can't spell this weight: {reason}", found=tensor.spec)
        own = tensor.tensors
        return {
            "codes": own["codes"],
            "codebooks": own["codebooks"],
            "scales": own["scales"].reshape(-1, 1, 1, 1),
        }

    def refusal(self, settings: AqlmSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        wanted = _spec(settings, spec.scale.dtype)
        if spec != wanted:
            return f"the checkpoint holds '{wanted}'"
        if shape[0] % settings.out_group or shape[1] % settings.in_group:
            return f"{shape[0]} x {shape[1]} is not a multiple of {settings.out_group} x {settings.in_group}"
        return None


def both_spellings(names: Collection[str]) -> tuple[str, ...]:
    """Modules that stay dense, with and without ``.weight``: older readers know the one, newer ones the other."""
    modules = dict.fromkeys(name.removesuffix(".weight") for name in names)
    return tuple(spelled for module in modules for spelled in (module, f"{module}.weight"))


def _spec(settings: AqlmSettings, dtype: torch.dtype) -> QuantSpec:
    return QuantSpec(
        code=settings.code,
        scale=Scale(dtype),
        grouping=Grouping(settings.out_group, 0),
        dtype=dtype,
        rounding="each",
    )


def _is_transposed(settings: AqlmSettings, codes: Tensor, rows: int) -> bool:
    return settings.bits == _CPU_BITS and codes.shape[0] != rows and codes.shape[1] == rows


def _positive(config: Json, name: str, default: int, most: int) -> int:
    value: int = field(config, name, int, default)
    if not 1 <= value <= most:
        raise FormatError(f"quantization_config.{name} is out of range", found=value, expected=f"1 to {most}")
    return value
