"""A weight's tensors: which there are, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from lowbit.core import FloatCode, Grouping, IntCode, QuantSpec, Scale, TableCode
from lowbit.core.packing import packed_bytes
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import require_tensor, require_tensors
from lowbit.wire.compressed_tensors import packing
from lowbit.wire.compressed_tensors.schemes import Args
from lowbit.wire.compressed_tensors.settings import CompressedTensorsSettings
from lowbit.wire.compressed_tensors.specs import SCALE_DTYPES, TABLES

_NAMES: Final = {"input_zero": "input_zero_point"}  # where the spec has other names
_PACKED_ZEROS: Final = ("group", "channel")  # the strategies under which pack-quantized packs zero points
STORED: Final = {  # what the codes are stored as, by format
    "pack-quantized": ("weight_packed", torch.int32),
    "nvfp4-pack-quantized": ("weight_packed", torch.uint8),
    "mxfp4-pack-quantized": ("weight_packed", torch.uint8),
    "mxfp6-pack-quantized": ("weight_packed", torch.uint8),
}


def dense_spec(dtype: torch.dtype) -> QuantSpec:
    """A weight that is stored without its zeros and else as it is."""
    return QuantSpec(FloatCode(dtype), Scale(dtype, stored=False), Grouping.per_tensor(), dtype=dtype)


def plain_dtype(weights: Args) -> torch.dtype:
    """Of codes that are stored one to an element."""
    return torch.int8 if weights.kind == "int" else torch.float8_e4m3fn


def shape_of(settings: CompressedTensorsSettings, tensors: Mapping[str, Tensor], codes: Tensor) -> tuple[int, int]:
    """The weight's ``(out, in)``, of its codes and, where they are packed, of what is stored of it.

    Raises:
        FormatError: the two don't agree.
    """
    rows, cols = codes.shape
    spelled, bits = settings.module_format, settings.weights.bits
    if spelled in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized"):
        return rows, cols * 8 // bits
    if spelled != "pack-quantized":
        return rows, cols
    require_tensors(tensors, ("weight_shape",))
    stored = tensors["weight_shape"]
    require_tensor("weight_shape", stored, shape=(2,), dtypes=(torch.int64, torch.int32))
    outputs, inputs = stored.tolist()
    widths = {packing.words_of(inputs, bits), packing.padded_words_of(inputs, bits)} if inputs > 0 else set()
    if outputs != rows or cols not in widths:
        raise FormatError("the packed weight is not of this shape", tensor="weight_shape", found=[outputs, inputs],
                          expected=f"{rows} rows and what {cols} words of {bits}-bit values hold")  # fmt: skip
    return outputs, inputs


def weight_layout(settings: CompressedTensorsSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
    """What the weight itself has, by name."""
    rows, cols = shape
    counts = spec.grouping.counts(shape)
    weights, spelled = settings.weights, settings.module_format
    if spelled == "pack-quantized":
        codes: TensorLayout = {
            "weight_packed": ((rows, packing.words_of(cols, spec.bits)), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
    elif spelled in STORED:
        codes = {"weight_packed": ((rows, packed_bytes(cols, spec.bits)), torch.uint8)}
    else:
        codes = {"weight": (shape, plain_dtype(weights))}
    scale = torch.uint8 if spec.scale.dtype == torch.float8_e8m0fnu else spec.scale.dtype
    per_group = (1,) if weights.strategy == "tensor" else counts
    codes["weight_scale"] = (per_group, torch.float8_e4m3fn if spec.scale.second else scale)
    if spec.scale.second:
        codes["weight_global_scale"] = ((1,), torch.float32)
    if spec.zero is not None and _packs_zeros(settings):
        codes["weight_zero_point"] = ((packing.words_of(rows, spec.bits), counts[1]), torch.int32)
    elif spec.zero is not None:
        codes["weight_zero_point"] = (per_group, torch.int8)
    if weights.actorder:
        codes["weight_g_idx"] = ((cols,), torch.int32)
    return codes


def activation_layout(spec: QuantSpec) -> TensorLayout:
    """What its activations have, by name."""
    return {_NAMES.get(name, name): entry for name, entry in spec.activation.tensors().items()}


def _packs_zeros(settings: CompressedTensorsSettings) -> bool:
    return settings.module_format == "pack-quantized" and settings.weights.strategy in _PACKED_ZEROS


def check_shapes(tensors: Mapping[str, Tensor], layout: TensorLayout) -> None:
    """Raise a FormatError unless all tensors are there; words may be padded, single numbers of any form."""
    require_tensors(tensors, [name for name in layout if name != "weight_g_idx"])
    for name, (shape, dtype) in layout.items():
        if name in ("weight_shape", "weight_packed") or name not in tensors:
            continue
        found = tensors[name]
        if name == "output_scale":
            dtype = found.dtype if found.dtype in SCALE_DTYPES else dtype
        if name == "weight_g_idx" and found.dtype == torch.int64:
            dtype = torch.int64
        if shape == (1,) and found.numel() == 1 and found.dim() <= 2:
            shape = tuple(found.shape)
        if name == "weight_zero_point" and dtype == torch.int32:
            require_tensor(name, found, dtypes=(dtype,), dims=2)
            require_tensor(name, found, shape=(found.shape[0], shape[1]))
        else:
            require_tensor(name, found, shape=shape, dtypes=(dtype,))


def is_permuted(settings: CompressedTensorsSettings, index: Tensor | None, shape: tuple[int, int]) -> bool:
    """Whether a group index says anything else than that the groups are consecutive; -1 throughout says nothing."""
    weights = settings.weights
    if index is None or not weights.group:
        return False
    require_tensor("weight_g_idx", index, shape=(shape[1],), dtypes=(torch.int32, torch.int64))
    low, high, groups = int(index.min()), int(index.max()), -(-shape[1] // weights.group)
    if low == high == -1:
        return False
    if low < 0 or high >= groups:
        raise FormatError("a column's group is out of range", tensor="weight_g_idx", found=f"{low}..{high}",
                          expected=f"0..{groups - 1}")  # fmt: skip
    plain = torch.arange(shape[1], dtype=index.dtype, device=index.device) // weights.group
    if torch.equal(index, plain):
        return False
    if not weights.actorder:
        raise FormatError("there is a group index, but the scheme has no actorder", tensor="weight_g_idx",
                          found="actorder: null", expected="actorder: group")  # fmt: skip
    return True


def read_codes(settings: CompressedTensorsSettings, spec: QuantSpec, codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes as the spec has them.

    Raises:
        FormatError: they are more or fewer than the shape says, or out of range.
    """
    if settings.module_format == "pack-quantized":
        stream = packing.to_stream("weight_packed", codes, shape[1], spec.bits)
        if spec.zero is not None:
            return stream
        stream = packing.flip_sign(stream, shape[1], spec.bits)
        return stream.view(torch.int8) if spec.bits == 8 else stream
    if isinstance(spec.code, IntCode):
        return packing.from_int8("weight", codes, spec.bits, signed=spec.code.signed)
    return codes


def write_codes(settings: CompressedTensorsSettings, spec: QuantSpec, codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`read_codes`."""
    if settings.module_format == "pack-quantized":
        stream = codes.view(torch.uint8)
        return packing.to_words(stream if spec.zero else packing.flip_sign(stream, shape[1], spec.bits))
    if isinstance(spec.code, IntCode):
        return packing.to_int8(codes, shape[1], spec.bits, signed=spec.code.signed)
    return codes


def read_scales(spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The scales of the weight, of both levels, and the table that its codes point into."""
    scales = tensors["weight_scale"].reshape(spec.grouping.counts(shape))
    own = {"scales": scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales}
    if spec.scale.second:
        own["super_scales"] = tensors["weight_global_scale"].reshape(1)
    if isinstance(spec.code, TableCode):
        own["table"] = torch.tensor(TABLES[spec.bits][1], dtype=torch.float32, device=scales.device)
    return own


def write_scales(settings: CompressedTensorsSettings, spec: QuantSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`read_scales`.

    Raises:
        FormatError: the table is not the format's.
    """
    if isinstance(spec.code, TableCode):
        table = torch.tensor(TABLES[spec.bits][1], device=own["table"].device)
        if not torch.equal(own["table"], table):
            raise FormatError("the table is not that of the format", tensor="table", expected=spec.code.name)
    scales = own["scales"]
    if settings.weights.strategy == "tensor":
        scales = scales.reshape(1)
    written = {"weight_scale": scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales}
    if spec.scale.second:
        written["weight_global_scale"] = own["super_scales"]
    return written


def read_zeros(settings: CompressedTensorsSettings, spec: QuantSpec, zeros: Tensor, shape: tuple[int, int]) -> Tensor:
    """The zero points, unsigned and packed along groups.

    Raises:
        FormatError: they are more or fewer than the shape says, or out of range.
    """
    if _packs_zeros(settings):
        return packing.read_packed_zeros(zeros, shape[0], spec.bits)
    zeros = zeros.reshape(spec.grouping.counts(shape))
    return packing.from_int8("weight_zero_point", zeros, spec.bits, signed=False)


def write_zeros(settings: CompressedTensorsSettings, spec: QuantSpec, zeros: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`read_zeros`."""
    groups = spec.grouping.counts(shape)[1]
    if _packs_zeros(settings):
        return packing.write_packed_zeros(zeros, groups, spec.bits)
    plain = packing.to_int8(zeros, groups, spec.bits, signed=False)
    return plain.reshape(1) if settings.weights.strategy == "tensor" else plain


def read_activations(spec: QuantSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored scales of activations.

    Raises:
        FormatError: there is a zero point that the scheme doesn't have.
    """
    if spec.activation.symmetric and (zero := tensors.get("input_zero_point")) is not None and bool(zero.any()):
        raise FormatError("the scheme is symmetric, but there is a zero point", tensor="input_zero_point")
    return {
        name: tensors[_NAMES.get(name, name)].reshape(1).to(dtype)
        for name, (_, dtype) in spec.activation.tensors().items()
    }


def write_activations(spec: QuantSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`read_activations`."""
    return {_NAMES.get(name, name): own[name] for name in spec.activation.tensors()}
