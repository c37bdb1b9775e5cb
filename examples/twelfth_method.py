"""A twelfth method: 5-bit integers stored as a plane of nibbles and a plane of sign bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.algorithms import RoundToNearest
from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale, pack, unpack
from lowbit.integrations.transformers import Recipe, register_method, unregister_method
from lowbit.wire import Wire, field, register_wire, require_layout, require_tensor, require_tensors, unregister_wire


class PlanesConfig(QuantizationConfigMixin):  # what users pass to from_pretrained, and what config.json stores
    def __init__(self, group_size: int = 64, modules_to_not_convert: list[str] | None = None, **_: Any) -> None:
        self.quant_method, self.group_size, self.modules_to_not_convert = "planes5", group_size, modules_to_not_convert


@dataclass(frozen=True)
class PlanesSettings:
    group_size: int


class PlanesWire(Wire[PlanesSettings]):
    name = quant_method = "planes5"
    suffixes = ("nibbles", "signs", "scales")
    marker = "nibbles"

    def parse(self, config: Mapping[str, Any]) -> PlanesSettings:
        return PlanesSettings(field(config, "group_size", int, 64, allowed=(32, 64, 128)))

    def config(self, settings: PlanesSettings) -> dict[str, Any]:
        return {"quant_method": "planes5", "group_size": settings.group_size}

    def spec(self, settings: PlanesSettings) -> QuantSpec:  # two's complement, one fp16 scale per group, no zero point
        return QuantSpec(IntCode(5, signed=True), Scale(torch.float16), Grouping.groups(settings.group_size))

    def expected(self, settings: PlanesSettings, spec: QuantSpec, shape: tuple[int, int]) -> dict[str, Any]:
        out, columns = shape
        planes = {"nibbles": ((out, columns // 2), torch.uint8), "signs": ((out, columns // 8), torch.uint8)}
        return planes | {"scales": (spec.grouping.counts(shape), torch.float16)}

    def read(self, settings: PlanesSettings, tensors: Mapping[str, torch.Tensor]) -> QuantTensor:
        require_tensors(tensors, self.suffixes)
        require_tensor("nibbles", tensors["nibbles"], dims=2)
        spec, shape = self.spec(settings), (tensors["nibbles"].shape[0], 2 * tensors["nibbles"].shape[1])
        require_layout(tensors, self.expected(settings, spec, shape))
        low, high = unpack(tensors["nibbles"], 4, shape[1]), unpack(tensors["signs"], 1, shape[1])
        return QuantTensor(spec, {"codes": pack(low | high << 4, 5), "scales": tensors["scales"]}, shape).validate()

    def write(self, settings: PlanesSettings, tensor: QuantTensor) -> dict[str, torch.Tensor]:
        codes = unpack(tensor.tensors["codes"], 5, tensor.shape[1])
        return {"nibbles": pack(codes & 15, 4), "signs": pack(codes >> 4, 1), "scales": tensor.tensors["scales"]}

    def refusal(self, settings: PlanesSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if spec != self.spec(settings):
            return f"the checkpoint holds '{self.spec(settings)}'"
        return f"groups don't divide {shape[1]} inputs" if shape[1] % settings.group_size else None


def recipe(config: PlanesConfig) -> Recipe:
    wire = PlanesWire()
    return Recipe(wire, wire.parse(config.to_dict()), RoundToNearest(), skip=tuple(config.modules_to_not_convert or ()))


def register() -> None:
    register_wire(PlanesWire())
    register_method("planes5", PlanesConfig, recipe)


def unregister() -> None:
    unregister_method("planes5")
    unregister_wire("planes5")
