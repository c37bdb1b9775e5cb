"""FBGEMM FP8: rows of e4m3 with one fp32 scale each; activations are rounded to e4m3 per token.

================= =================== ==========================================================
``weight``         e4m3 [out, in]
``weight_scale``   fp32 [out, 1]       ``absmax / 448`` of the row
``input_scale_ub`` fp32 [1]            in old files; repeats ``activation_scale_ub`` of the config and is not read
================= =================== ==========================================================

``W[n, k] = weight[n, k] * weight_scale[n]``. Llama 4 holds its experts in two 3-D parameters, transposed: see
:func:`read_experts`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import Activation, FloatCode, Grouping, QuantSpec, QuantTensor, Scale
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, require_layout, require_tensor, require_tensors
from lowbit.wire.checks import names_of, require_finite, require_positive

_NUMBER: Final = torch.float8_e4m3fn
# fbgemm's least scale of activations and weights.
LEAST_SCALE: Final = 1 / (448 * 512)
EXPERTS: Final = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class FbgemmFp8Settings:
    """What ``config.json`` says.

    Attributes:
        bound: absolute maxima of activations are cut off here; 0 for nowhere.
        kept: linear layers that stay dense; readers take every other one as packed. None for what they keep by default.
    """

    bound: float = 1200.0
    kept: tuple[str, ...] | None = None


class FbgemmFp8Wire(Wire[FbgemmFp8Settings]):
    """Linear layers; their activations are part of the format."""

    name: ClassVar[str] = "fbgemm_fp8"
    quant_method: ClassVar[str] = "fbgemm_fp8"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "input_scale_ub")
    marker: ClassVar[str] = "weight_scale"
    fused_suffixes: ClassVar[tuple[str, ...]] = ("", "_scale")

    def parse(self, config: Json) -> FbgemmFp8Settings:
        bound = config.get("activation_scale_ub", 1200.0)
        # Comparisons with NaN are false, so it is refused as well.
        if type(bound) not in (int, float) or not 0 < bound < float("inf"):
            raise FormatError(
                "quantization_config.activation_scale_ub is out of range",
                found=repr(bound)[:80],
                expected="a positive number",
            )
        return FbgemmFp8Settings(float(bound), names_of(config, "modules_to_not_convert"))

    def config(self, settings: FbgemmFp8Settings) -> dict[str, Any]:
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": settings.bound,
            "modules_to_not_convert": None if settings.kept is None else list(settings.kept),
        }

    def settings_for(self, spec: QuantSpec) -> FbgemmFp8Settings:
        settings = FbgemmFp8Settings(spec.activation.bound or 1200.0)
        wanted = self.spec(settings)
        if (spec.code, spec.activation) != (wanted.code, wanted.activation):
            raise FormatError("FBGEMM FP8 has one layout", found=spec, expected=wanted)
        return settings

    def spelling(self, settings: FbgemmFp8Settings, spec: QuantSpec) -> QuantSpec:
        return self._spec(settings, spec.dtype)

    def join(self, settings: Mapping[str, FbgemmFp8Settings], kept: Collection[str]) -> FbgemmFp8Settings:
        return FbgemmFp8Settings(super().join(settings, kept).bound, tuple(sorted(kept)) or None)

    def spec(self, settings: FbgemmFp8Settings) -> QuantSpec:
        return self._spec(settings, torch.bfloat16)

    def _spec(self, settings: FbgemmFp8Settings, dtype: torch.dtype) -> QuantSpec:
        return QuantSpec(
            code=FloatCode(_NUMBER),
            scale=Scale(torch.float32),
            grouping=Grouping.per_channel(),
            activation=Activation(
                "dynamic", number="float8_e4m3fn", per="token", bound=settings.bound, floor=LEAST_SCALE
            ),
            dtype=dtype,
        )

    def expected(self, settings: FbgemmFp8Settings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        return {"weight": (shape, _NUMBER), "weight_scale": ((shape[0], 1), torch.float32)}

    def read(self, settings: FbgemmFp8Settings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        require_tensors(tensors, ("weight", "weight_scale"))
        require_tensor("weight", tensors["weight"], dims=2)
        shape = (tensors["weight"].shape[0], tensors["weight"].shape[1])
        spec = self.spec(settings)
        require_layout(tensors, self.expected(settings, spec, shape))
        require_positive("weight_scale", tensors["weight_scale"])
        require_finite("weight", tensors["weight"])
        return QuantTensor(spec, {"codes": tensors["weight"], "scales": tensors["weight_scale"]}, shape).validate()

    def write(self, settings: FbgemmFp8Settings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"FBGEMM FP8 can't spell this weight: {reason}", found=tensor.spec)
        return {"weight": tensor.tensors["codes"], "weight_scale": tensor.tensors["scales"]}

    def read_fused(self, settings: FbgemmFp8Settings, name: str, tensors: Mapping[str, Tensor]) -> list[QuantTensor]:
        require_tensors(tensors, self.fused_suffixes)
        return read_experts(self, settings, name, tensors[""], tensors["_scale"])

    def write_fused(self, settings: FbgemmFp8Settings, name: str, experts: Sequence[QuantTensor]) -> dict[str, Tensor]:
        written = write_experts(self, settings, name, list(experts))
        return {suffix: written[f"{name}{suffix}"] for suffix in self.fused_suffixes}

    def refusal(self, settings: FbgemmFp8Settings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        wanted = self._spec(settings, spec.dtype)
        return None if spec == wanted else f"the checkpoint holds '{wanted}'"


def read_experts(
    wire: FbgemmFp8Wire, settings: FbgemmFp8Settings, name: str, weight: Tensor, scale: Tensor
) -> list[QuantTensor]:
    """The experts of Llama 4, one weight ``[out, in]`` each.

    Args:
        name: ``gate_up_proj`` or ``down_proj``.
        weight: ``e4m3 [experts, in, out]``.
        scale: ``fp32 [experts, 1, out]`` of gate_up_proj, ``[experts, out, 1]`` of down_proj.

    Raises:
        FormatError: shapes or dtypes are others, or a scale is not a positive number.
    """
    require_tensor(name, weight, dims=3, dtypes=(_NUMBER,))
    experts, _, out_features = weight.shape
    wanted = (experts, 1, out_features) if name == EXPERTS[0] else (experts, out_features, 1)
    require_tensor(f"{name}_scale", scale, shape=wanted, dtypes=(torch.float32,))
    rows = scale.reshape(experts, out_features, 1)
    # FP8 tensors don't copy transposed on every device; their bytes do.
    codes = weight.view(torch.uint8).transpose(1, 2).contiguous().view(_NUMBER)
    return [
        wire.read(settings, {"weight": codes[expert], "weight_scale": rows[expert].contiguous()})
        for expert in range(experts)
    ]


def write_experts(
    wire: FbgemmFp8Wire, settings: FbgemmFp8Settings, name: str, experts: list[QuantTensor]
) -> dict[str, Tensor]:
    """The inverse of :func:`read_experts`: the parameter `name` and its ``_scale``."""
    written = [wire.write(settings, expert) for expert in experts]
    codes = torch.stack([tensors["weight"].view(torch.uint8) for tensors in written])
    scales = torch.stack([tensors["weight_scale"] for tensors in written])
    return {
        name: codes.transpose(1, 2).contiguous().view(_NUMBER),
        f"{name}_scale": scales.transpose(1, 2).contiguous() if name == EXPERTS[0] else scales,
    }
