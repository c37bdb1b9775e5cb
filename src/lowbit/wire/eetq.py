"""EETQ: int8 rows in the byte order that CUTLASS' mixed GEMM reads on compute capability 7.5 to 8.9.

================= ================ ==========================================================
``weight``         int8 [in, out]   codes, reordered (see :func:`to_cutlass`); ``in`` runs across tiles
``weight_scales``  fp16 [out]
================= ================ ==========================================================

``W[n, k] = weight_scales[n] * q[n, k]`` with q from -128 to 127. The shape on disk is that of a plain transposed matrix
and says nothing of the order of the bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, field, require_layout, require_tensor, require_tensors
from lowbit.wire.checks import names_of, require_finite

_TILE: Final = 64  # inputs of one output that lie together; outputs come in such numbers, too
_STEP: Final = 16  # inputs that are reordered among themselves
# The input that stands at each place of a step: pairs of two 8-wide halves, alternating.
_ORDER: Final = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)

_SPEC: Final = QuantSpec(
    code=IntCode(8, signed=True), scale=Scale(torch.float16), grouping=Grouping.per_channel(), dtype=torch.float16
)


@dataclass(frozen=True)
class EetqSettings:
    """What ``config.json`` says.

    Attributes:
        kept: linear layers that stay dense; readers take every other one as packed. None for what they keep by default.
    """

    kept: tuple[str, ...] | None = None


class EetqWire(Wire[EetqSettings]):
    """The layout for compute capability 7.5 to 8.9."""

    name: ClassVar[str] = "eetq"
    quant_method: ClassVar[str] = "eetq"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scales")
    marker: ClassVar[str] = "weight_scales"

    def parse(self, config: Json) -> EetqSettings:
        field(config, "weights", str, "int8", allowed=("int8",))
        return EetqSettings(names_of(config, "modules_to_not_convert"))

    def config(self, settings: EetqSettings) -> dict[str, Any]:
        kept = None if settings.kept is None else list(settings.kept)
        return {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": kept}

    def settings_for(self, spec: QuantSpec) -> EetqSettings:
        if not isinstance(spec.code, IntCode) or spec.activation.kind != "none":
            raise FormatError("EETQ has int8 rows and leaves activations alone", found=spec, expected=_SPEC)
        return EetqSettings()

    def join(self, settings: Mapping[str, EetqSettings], kept: Collection[str]) -> EetqSettings:
        return EetqSettings(tuple(sorted(kept)) or None)

    def spec(self, settings: EetqSettings) -> QuantSpec:
        return _SPEC

    def expected(self, settings: EetqSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        out_features, in_features = shape
        return {
            "weight": ((in_features, out_features), torch.int8),
            "weight_scales": ((out_features,), torch.float16),
        }

    def read(self, settings: EetqSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, self.suffixes)
        require_tensor("weight", tensors["weight"], dims=2)
        in_features, out_features = tensors["weight"].shape
        shape = (out_features, in_features)
        require_layout(tensors, self.expected(settings, _SPEC, shape))
        require_finite("weight_scales", tensors["weight_scales"])
        if reason := _unfit(shape):
            raise FormatError(f"no packer makes such a weight: {reason}", tensor="weight", found=[*reversed(shape)])
        codes = from_cutlass(tensors["weight"].reshape(-1), shape)
        return QuantTensor(_SPEC, {"codes": codes, "scales": tensors["weight_scales"].unsqueeze(1)}, shape).validate()

    def write(self, settings: EetqSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"EETQ can't spell this weight: {reason}", found=tensor.spec)
        own = tensor.tensors
        return {
            "weight": to_cutlass(own["codes"]).view(tensor.shape[1], tensor.shape[0]),
            "weight_scales": own["scales"].squeeze(1).contiguous(),
        }

    def refusal(self, settings: EetqSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        return _unfit(shape) if spec == _SPEC else f"EETQ holds '{_SPEC}' in fp16"


def to_cutlass(codes: Tensor) -> Tensor:
    """Reorder ``int8 [out, in]``, both multiples of 64, into one run of bytes.

    Inputs are reordered in steps of 16; 64 inputs of one output are followed by those of the next, two outputs taking
    turns; 128 is added, so that codes are unsigned; and of every four bytes, the middle two are exchanged.
    """
    out_features, in_features = codes.shape
    order = torch.tensor(_ORDER, device=codes.device)
    steps = codes.view(out_features, in_features // _STEP, _STEP).index_select(2, order)
    tiles = steps.reshape(out_features // 2, 2, in_features // _TILE, _TILE).transpose(1, 2)
    unsigned = tiles.reshape(-1, 2, 2).view(torch.uint8) ^ 0x80
    return unsigned.transpose(1, 2).reshape(-1).view(torch.int8)


def from_cutlass(run: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_cutlass`: ``int8 [out, in]``."""
    out_features, in_features = shape
    order = torch.tensor(_ORDER, device=run.device).argsort()
    signed = (run.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)
    tiles = signed.view(-1, 2, 2).transpose(1, 2).reshape(out_features // 2, in_features // _TILE, 2, _TILE)
    steps = tiles.transpose(1, 2).reshape(out_features, in_features // _STEP, _STEP)
    return steps.index_select(2, order).view(shape)


def _unfit(shape: tuple[int, int]) -> str | None:
    if shape[0] % _TILE or shape[1] % _TILE or 0 in shape:
        return f"{shape[0]} x {shape[1]} is not made of {_TILE} x {_TILE} tiles, which EETQ's layout consists of"
    return None
