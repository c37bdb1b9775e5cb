"""GGUF blocks as a wire: one tensor of bytes for each weight, and its type beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import BlockCode, IntCode, QuantSpec, QuantTensor
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, names_in, require_layout, require_tensor, require_tensors
from lowbit.wire.gguf.codec import read_blocks, spec_of, write_blocks
from lowbit.wire.gguf.codec import type_of as stored_type
from lowbit.wire.gguf.types import GgmlType

TYPES_KEY: Final = "gguf.types"  # in the header of a safetensors file: {"Q4_K": [modules]}
_MAX_TYPES: Final = 1 << 26  # bytes


@dataclass(frozen=True)
class GgufSettings:
    """What is said beside the blocks.

    Attributes:
        label: how the whole was asked for, a type or a mixture such as ``Q4_K_M``; means nothing to a reader.
        skip: patterns of modules that were to stay dense; mean nothing to a reader either.
        type: of one module's blocks; None for the whole checkpoint.
        types: of each module, where several are known.
    """

    label: str | None = None
    skip: tuple[str, ...] = ()
    type: GgmlType | None = None
    types: Mapping[str, GgmlType] = field(default_factory=dict)


class GgufWire(Wire[GgufSettings]):
    """``<module>.gguf``: the weight's blocks, ``uint8 [out, bytes per row]``, rows in Transformers' order.

    A GGUF file names its tensors' types itself. In safetensors files, where a loaded model is saved, the types are in
    the header, under ``gguf.types``.
    """

    name: ClassVar[str] = "gguf"
    quant_method: ClassVar[str] = "gguf"
    suffixes: ClassVar[tuple[str, ...]] = ("gguf",)
    marker: ClassVar[str] = "gguf"

    def parse(self, config: Json) -> GgufSettings:
        label = config.get("type")
        if label is not None and not isinstance(label, str):
            raise FormatError(
                "quantization_config.type has the wrong type", found=repr(label)[:80], expected="a name such as Q4_K_M"
            )
        return GgufSettings(label, names_in(config, "modules_to_not_convert"))

    def config(self, settings: GgufSettings) -> dict[str, Any]:
        skip = {"modules_to_not_convert": list(settings.skip)} if settings.skip else {}
        return {"quant_method": self.quant_method} | ({"type": settings.label} if settings.label else {}) | skip

    def bind(self, settings: GgufSettings, metadata: Mapping[str, str]) -> GgufSettings:
        """Add the types that the header names.

        Raises:
            FormatError: they are not there or not as :meth:`metadata` writes them.
        """
        stored = metadata.get(TYPES_KEY)
        if stored is None:
            return settings
        return replace(settings, types=_parse_types(stored))

    def metadata(
        self, settings: GgufSettings, weights: Mapping[str, tuple[QuantSpec, tuple[int, int]]], others: Collection[str]
    ) -> dict[str, str]:
        return {TYPES_KEY: types_text({module: type_of(spec) for module, (spec, _) in weights.items()})}

    def of(self, settings: GgufSettings, module: str) -> GgufSettings:
        return GgufSettings(settings.label, type=settings.types.get(module, settings.type))

    def settings_for(self, spec: QuantSpec) -> GgufSettings:
        return GgufSettings(type=nearest_type(spec))

    def spelling(self, settings: GgufSettings, spec: QuantSpec) -> QuantSpec:
        return self.spec(settings)

    def join(self, settings: Mapping[str, GgufSettings], kept: Collection[str]) -> GgufSettings:
        return GgufSettings(types={module: _type(entry) for module, entry in settings.items()})

    def spec(self, settings: GgufSettings) -> QuantSpec:
        return spec_of(_type(settings))

    def expected(self, settings: GgufSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        return {"gguf": ((shape[0], type_of(spec).row_bytes(shape[1])), torch.uint8)}

    def read(self, settings: GgufSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        """One weight; its bytes may come with more than one leading axis, which together are its rows."""
        require_tensors(tensors, self.suffixes)
        stored, kind = tensors["gguf"], _type(settings)
        require_tensor("gguf", stored, dtypes=(torch.uint8,))
        if stored.dim() < 2 or stored.shape[-1] % kind.block_bytes:
            raise FormatError(
                f"a row is not a whole number of {kind.name} blocks", tensor="gguf", found=list(stored.shape),
                expected=f"a multiple of {kind.block_bytes} bytes",
            )  # fmt: skip
        raw = stored.flatten(0, -2)
        shape = (raw.shape[0], raw.shape[1] // kind.block_bytes * kind.block_elements)
        tensor = read_blocks(kind, raw, shape)
        if isinstance(tensor.spec.code, BlockCode):  # A view: the weight would need its file as long as it lives.
            return QuantTensor(tensor.spec, {"codes": tensor.tensors["codes"].clone()}, shape)
        return tensor

    def write(self, settings: GgufSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        kind = type_of(tensor.spec)
        if settings.type not in (None, kind):
            raise FormatError("the weight is of another type", found=kind.name, expected=_type(settings).name)
        tensors = {"gguf": write_blocks(kind, tensor)}
        require_layout(tensors, self.expected(settings, tensor.spec, tensor.shape))
        return tensors

    def refusal(self, settings: GgufSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        try:
            kind = type_of(spec)
        except FormatError as error:
            return str(error)
        if shape[1] % kind.block_elements:
            return f"{shape[1]} inputs are not a whole number of {kind.name} blocks of {kind.block_elements}"
        return None


def type_of(spec: QuantSpec) -> GgmlType:
    """The type whose blocks mean `spec`, whatever dtype it is dequantized to.

    Raises:
        FormatError: GGUF has none.
    """
    kind = stored_type(spec)
    if kind.dense:
        raise FormatError("plain numbers are not blocks", found=str(spec))
    return kind


def nearest_type(spec: QuantSpec) -> GgmlType:
    """The type in which a weight of `spec` can be written, if need be in another spelling of the same numbers.

    Raises:
        FormatError: GGUF has none; says what it has.
    """
    with contextlib.suppress(FormatError):
        return type_of(spec)
    if not isinstance(spec.code, IntCode) or spec.grouping.flat or spec.grouping.strided:
        raise FormatError(
            "GGUF has no type of this kind", found=str(spec), expected="integers in groups along the inputs"
        )
    if spec.zero is not None and spec.zero.kind == "integer":
        return GgmlType.Q8_0  # Its numbers have no zero points and room for those of the codes.
    shifted = spec.zero is not None
    for bits, plain, with_minimum in ((4, GgmlType.Q4_0, GgmlType.Q4_1), (5, GgmlType.Q5_0, GgmlType.Q5_1)):
        if spec.bits <= bits:
            return with_minimum if shifted else plain
    if shifted:
        raise FormatError("GGUF has no type with minimums of more than 5 bits", found=str(spec))
    return GgmlType.Q8_0


def types_text(types: Mapping[str, GgmlType]) -> str:
    """The types of modules as :meth:`GgufWire.bind` reads them."""
    groups: dict[str, list[str]] = {}
    for module, kind in types.items():
        groups.setdefault(kind.name, []).append(module)
    return json.dumps(groups, separators=(",", ":"))


def _parse_types(text: str) -> dict[str, GgmlType]:
    try:
        groups = json.loads(text) if len(text) <= _MAX_TYPES else None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{TYPES_KEY} in the header is not JSON: {error}") from error
    if not isinstance(groups, dict):
        raise FormatError(f"{TYPES_KEY} in the header is not an object", found=text[:80])
    types: dict[str, GgmlType] = {}
    for name, modules in groups.items():
        kind = GgmlType.__members__.get(name)
        if kind is None or kind.dense or not isinstance(modules, list):
            raise FormatError(f"{TYPES_KEY} in the header names no type of blocks", found=name[:80])
        for module in modules:
            if not isinstance(module, str) or module in types:
                raise FormatError(f"{TYPES_KEY} in the header names a module twice", found=repr(module)[:80])
            types[module] = kind
    return types


def _type(settings: GgufSettings) -> GgmlType:
    if settings.type is None:
        raise FormatError("nothing says of which type the blocks are", expected=f"{TYPES_KEY} in the file's header")
    return settings.type
