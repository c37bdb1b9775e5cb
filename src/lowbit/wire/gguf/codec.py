"""Blocks of GGUF's quantized types as `QuantTensor`, and back, to the byte.

A type is described by data: its fields, which of them hold codes and how, and how its scales are packed. The lattice
and ternary types are not taken apart at all (:class:`~lowbit.core.spec.BlockCode`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.core import (
    BlockCode,
    Code,
    FloatCode,
    IntCode,
    QuantSpec,
    QuantTensor,
    TableCode,
    pack,
    unpack,
)
from lowbit.core.blocks import block_scales
from lowbit.core.ggml import GGML_SPECS, ggml_type_of
from lowbit.core.spec import Activation
from lowbit.core.tables import E2M1, IQ4_NL, SIGN
from lowbit.errors import FormatError
from lowbit.wire.gguf import planes
from lowbit.wire.gguf.types import GgmlType

_CHUNK: Final = 1 << 21  # weights handled at once
_SIGN_BIT: Final = -(1 << 15)
SPECS: Final[Mapping[GgmlType, QuantSpec]] = {GgmlType[name]: spec for name, spec in GGML_SPECS.items()}
_TABLES: Final = {"e2m1": E2M1, "iq4_nl": IQ4_NL, "sign": SIGN}
_HALF: Final = torch.float16

Fields = dict[str, Tensor]


class Plane(NamedTuple):
    """Bits of the codes: field, how many per weight, and how many bytes belong together; see :mod:`planes`."""

    field: str
    bits: int
    width: int


class Layout(NamedTuple):
    """Where the numbers of a block are.

    Attributes:
        fields: name and bytes of each, in order. ``d`` is the scale (or super-scale), ``m`` the min, ``dmin`` the
            mins' super-scale.
        planes: the codes' bits, from the lowest.
        read_levels: of a two-level type, the first-level scales (and mins) from the fields.
        write_levels: its inverse.
    """

    fields: tuple[tuple[str, int], ...]
    planes: tuple[Plane, ...]
    read_levels: Callable[[Fields], tuple[Tensor, ...]] | None = None
    write_levels: Callable[..., Fields] | None = None


_D: Final = ("d", 2)
_M: Final = ("m", 2)
_DMIN: Final = ("dmin", 2)


def _levels_q2(fields: Fields) -> tuple[Tensor, ...]:
    return fields["scales"] & 15, fields["scales"] >> 4


def _store_q2(scales: Tensor, mins: Tensor) -> Fields:
    return {"scales": scales | mins << 4}


def _levels_q3(fields: Fields) -> tuple[Tensor, ...]:
    return (planes.read_scales_k3(fields["scales"]),)


def _store_q3(scales: Tensor) -> Fields:
    return {"scales": planes.write_scales_k3(scales)}


def _levels_q4(fields: Fields) -> tuple[Tensor, ...]:
    return planes.read_scales_k4(fields["scales"])


def _store_q4(scales: Tensor, mins: Tensor) -> Fields:
    return {"scales": planes.write_scales_k4(scales, mins)}


def _levels_q6(fields: Fields) -> tuple[Tensor, ...]:
    return (fields["scales"],)


def _store_q6(scales: Tensor) -> Fields:
    return {"scales": scales}


def _levels_xs(fields: Fields) -> tuple[Tensor, ...]:
    return (planes.read_scales_xs(fields["scales_h"], fields["scales_l"]),)


def _store_xs(scales: Tensor) -> Fields:
    high, low = planes.write_scales_xs(scales)
    return {"scales_h": high, "scales_l": low}


_NIBBLES_16: Final = Plane("qs", 4, 16)
_NIBBLES_32: Final = Plane("qs", 4, 32)
_PAIRS: Final = Plane("qs", 2, 32)
_BITS: Final = Plane("qh", 1, 1)

LAYOUTS: Final[Mapping[GgmlType, Layout]] = {
    GgmlType.Q1_0: Layout((_D, ("qs", 16)), (Plane("qs", 1, 1),)),
    GgmlType.Q4_0: Layout((_D, ("qs", 16)), (_NIBBLES_16,)),
    GgmlType.Q4_1: Layout((_D, _M, ("qs", 16)), (_NIBBLES_16,)),
    GgmlType.Q5_0: Layout((_D, ("qh", 4), ("qs", 16)), (_NIBBLES_16, _BITS)),
    GgmlType.Q5_1: Layout((_D, _M, ("qh", 4), ("qs", 16)), (_NIBBLES_16, _BITS)),
    GgmlType.Q8_0: Layout((_D, ("qs", 32)), (Plane("qs", 8, 1),)),
    GgmlType.Q2_K: Layout((("scales", 16), ("qs", 64), _D, _DMIN), (_PAIRS,), _levels_q2, _store_q2),
    GgmlType.Q3_K: Layout(
        (("hmask", 32), ("qs", 64), ("scales", 12), _D), (_PAIRS, Plane("hmask", 1, 32)), _levels_q3, _store_q3
    ),
    GgmlType.Q4_K: Layout((_D, _DMIN, ("scales", 12), ("qs", 128)), (_NIBBLES_32,), _levels_q4, _store_q4),
    GgmlType.Q5_K: Layout(
        (_D, _DMIN, ("scales", 12), ("qh", 32), ("qs", 128)),
        (_NIBBLES_32, Plane("qh", 1, 32)),
        _levels_q4,
        _store_q4,
    ),
    GgmlType.Q6_K: Layout(
        (("ql", 128), ("qh", 64), ("scales", 16), _D),
        (Plane("ql", 4, 64), Plane("qh", 2, 32)),
        _levels_q6,
        _store_q6,
    ),
    GgmlType.IQ4_NL: Layout((_D, ("qs", 16)), (_NIBBLES_16,)),
    GgmlType.IQ4_XS: Layout((_D, ("scales_h", 2), ("scales_l", 4), ("qs", 128)), (_NIBBLES_16,), _levels_xs, _store_xs),
    GgmlType.MXFP4: Layout((("d", 1), ("qs", 16)), (_NIBBLES_16,)),
    GgmlType.NVFP4: Layout((("d", 4), ("qs", 32)), (Plane("qs", 4, 8),)),
}


def spec_of(kind: GgmlType) -> QuantSpec:
    """What a tensor of this type means; its `dtype` is fp32, which is what ggml and gguf-py dequantize to.

    Raises:
        FormatError: a type of plain numbers that no weight has (integers, F64).
    """
    if kind not in SPECS:
        raise FormatError("no weight is stored as this type", found=kind.name, expected=[k.name for k in SPECS])
    return SPECS[kind]


def type_of(spec: QuantSpec) -> GgmlType:
    """The type whose tensors mean `spec`, whatever dtype the spec dequantizes to.

    Raises:
        FormatError: there is none.
    """
    name = ggml_type_of(spec)
    if name is not None:
        return GgmlType[name]
    raise FormatError("GGUF has no type for this spec", found=spec, expected=[kind.name for kind in SPECS])


def read_blocks(kind: GgmlType, raw: Tensor, shape: tuple[int, int]) -> QuantTensor:
    """A weight from a tensor's bytes; validated.

    Args:
        raw: ``uint8 [out, bytes per row]``, as :meth:`GgufFile.raw` gives it. Of block codes, and of plain numbers, the
            result is a view; else it is independent.
        shape: ``(out, in)``.

    Raises:
        FormatError: wrong or empty shape, or a scale that is infinite or no number.
    """
    spec = spec_of(kind)
    if 0 in shape:
        raise FormatError("a weight without elements", found=list(shape))
    expected = (shape[0], kind.row_bytes(shape[1]))
    if shape[1] % kind.block_elements or tuple(raw.shape) != expected or raw.dtype != torch.uint8:
        raise FormatError(
            f"not a {kind.name} weight", found=f"{raw.dtype} {list(raw.shape)}", expected=f"uint8 {list(expected)}"
        )
    if isinstance(spec.code, FloatCode):
        return QuantTensor(spec, {"codes": _numbers(raw, spec.code.dtype)}, shape).validate()
    if isinstance(spec.code, BlockCode):
        codes = raw.view(shape[0], -1, spec.code.nbytes)
        _require_finite(block_scales(spec.code.name, codes), kind)
        return QuantTensor(spec, {"codes": codes}, shape).validate()
    tensors = _empty(spec, shape, raw.device)
    step = max(1, _CHUNK // shape[1])
    for start in range(0, shape[0], step):
        _read_rows(kind, raw[start : start + step], tensors, start)
    for name in ("scales", "super_scales", "zeros", "super_zeros"):
        if name in tensors and tensors[name].is_floating_point():
            _require_finite(tensors[name], kind)
    return QuantTensor(spec, tensors, shape).validate()


def write_blocks(kind: GgmlType, tensor: QuantTensor) -> Tensor:
    """The inverse of :func:`read_blocks`: ``uint8 [out, bytes per row]``.

    Raises:
        FormatError: the weight has another spec than the type, a table of its own, or a row that isn't whole blocks.
    """
    spec = spec_of(kind)
    shape = tensor.shape
    if replace(tensor.spec, dtype=spec.dtype, activation=Activation()) != spec:
        raise FormatError(f"{kind.name} can't hold this weight", found=tensor.spec, expected=spec)
    if shape[1] % kind.block_elements:
        raise FormatError(
            f"a row is not a whole number of {kind.name} blocks", found=shape[1],
            expected=f"a multiple of {kind.block_elements}",
        )  # fmt: skip
    if isinstance(spec.code, (FloatCode, BlockCode)):
        return tensor.tensors["codes"].contiguous().view(torch.uint8).reshape(shape[0], kind.row_bytes(shape[1]))
    if isinstance(spec.code, TableCode):
        _require_table(kind, spec.code, tensor.tensors["table"])
    raw = torch.empty(shape[0], kind.row_bytes(shape[1]), dtype=torch.uint8, device=tensor.device)
    step = max(1, _CHUNK // max(shape[1], 1))
    for start in range(0, shape[0], step):
        stored = raw[start : start + step]
        _write_rows(kind, stored, tensor, start)
    return raw


def table_of(name: str) -> Tensor:
    """The values of ``e2m1``, ``iq4_nl`` or ``sign``, fp32."""
    return torch.tensor(_TABLES[name], dtype=torch.float32)


def _empty(spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    tensors = {
        name: torch.empty(sides, dtype=dtype, device=device) for name, (sides, dtype) in spec.tensors(shape).items()
    }
    if isinstance(spec.code, TableCode):
        tensors["table"] = table_of(spec.code.name).to(device)
    return tensors


def _read_rows(kind: GgmlType, raw: Tensor, tensors: dict[str, Tensor], start: int) -> None:
    """Fill rows of `tensors` from `start` on."""
    rows, spec, layout = raw.shape[0], SPECS[kind], LAYOUTS[kind]
    part = slice(start, start + rows)
    fields = _split(kind, raw)
    tensors["codes"][part] = (
        _read_codes(spec.code, layout.planes, fields).reshape(rows, -1).view(tensors["codes"].dtype)
    )
    if layout.read_levels is None:
        tensors["scales"][part] = _numbers(fields["d"], spec.scale.dtype).reshape(rows, -1)
        if spec.zero is not None:
            tensors["zeros"][part] = _numbers(fields["m"], spec.zero.dtype).reshape(rows, -1)
        return
    levels = layout.read_levels(fields)
    supers = (_numbers(fields["d"], _HALF), _negative(_numbers(fields["dmin"], _HALF)) if "dmin" in fields else None)
    for name, level, top in zip(("scales", "zeros"), levels, supers, strict=False):
        stored = level.reshape(rows, -1)
        bits = _level_bits(spec)
        tensors[name][part] = (pack(stored, bits) if bits < 8 else stored).view(tensors[name].dtype)
        if top is not None:
            blocks = top.numel() // rows
            tensors[f"super_{name}"][start * blocks : (start + rows) * blocks] = top.reshape(-1)


def _write_rows(kind: GgmlType, raw: Tensor, tensor: QuantTensor, start: int) -> None:
    """The inverse of :func:`_read_rows`."""
    rows, spec, layout, columns = raw.shape[0], SPECS[kind], LAYOUTS[kind], tensor.shape[1]
    part = slice(start, start + rows)
    blocks = columns // kind.block_elements
    fields = _split(kind, raw)
    _write_codes(spec.code, layout.planes, tensor.tensors["codes"][part].view(torch.uint8), fields, columns)
    if layout.write_levels is None:
        fields["d"].copy_(_bytes(tensor.tensors["scales"][part]).view(rows, blocks, -1))
        if spec.zero is not None:
            fields["m"].copy_(_bytes(tensor.tensors["zeros"][part]).view(rows, blocks, -1))
        return
    bits, groups = _level_bits(spec), columns // spec.grouping.cols
    levels = []
    for name, top in (("scales", "d"), ("zeros", "dmin")):
        if name not in tensor.tensors:
            continue
        stored = tensor.tensors[name][part]
        levels.append((unpack(stored, bits, groups) if bits < 8 else stored.view(torch.uint8)).view(rows, blocks, -1))
        supers = tensor.tensors[f"super_{name}"][start * blocks : (start + rows) * blocks]
        supers = _negative(supers) if name == "zeros" else supers
        fields[top].copy_(_bytes(supers).view(rows, blocks, 2))
    for name, value in layout.write_levels(*levels).items():
        fields[name].copy_(value)


def _split(kind: GgmlType, raw: Tensor) -> Fields:
    """Views of a block's fields, ``[rows, blocks, bytes]``."""
    names, sizes = zip(*LAYOUTS[kind].fields, strict=True)
    return dict(zip(names, raw.unflatten(1, (-1, kind.block_bytes)).split(sizes, 2), strict=True))


def _read_codes(code: Code, parts: tuple[Plane, ...], fields: Fields) -> Tensor:
    """Codes packed as lowbit does, per block."""
    bits, offset = code.bits, _offset(code)
    if bits == 8:
        return fields[parts[0].field]
    if bits == 4:
        packed = planes.nibbles_to_stream(fields[parts[0].field], parts[0].width)
        return packed ^ (offset | offset << 4)
    values, shift = torch.zeros((), dtype=torch.uint8, device=fields[parts[0].field].device), 0
    for plane in parts:
        values = values | planes.take_apart(fields[plane.field], plane.bits, plane.width) << shift
        shift += plane.bits
    return pack(values ^ offset, bits)


def _write_codes(code: Code, parts: tuple[Plane, ...], packed: Tensor, fields: Fields, columns: int) -> None:
    """The inverse of :func:`_read_codes`, into the fields."""
    bits, offset, first = code.bits, _offset(code), fields[parts[0].field]
    rows, blocks = first.shape[:2]
    if bits == 8:
        first.copy_(packed.view(rows, blocks, -1))
        return
    if bits == 4:
        stored = packed.view(rows, blocks, -1) ^ (offset | offset << 4)
        first.copy_(planes.stream_to_nibbles(stored, parts[0].width))
        return
    values = unpack(packed, bits, columns).view(rows, blocks, -1) ^ offset
    for plane in parts:
        part = values & (1 << plane.bits) - 1
        fields[plane.field].copy_(planes.put_together(part, plane.bits, plane.width))
        values = values >> plane.bits


def _level_bits(spec: QuantSpec) -> int:
    return spec.scale.second.bits if spec.scale.second else 0


def _offset(code: Code) -> int:
    """What turns a stored code into two's complement: signed codes are stored with half the range added."""
    return 1 << code.bits - 1 if isinstance(code, IntCode) and code.signed and code.bits < 8 else 0


def _numbers(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The last axis' bytes as numbers; a view where the memory allows it."""
    size = dtype.itemsize
    aligned = stored.is_contiguous() and stored.storage_offset() % size == 0
    return (stored if aligned else stored.clone(memory_format=torch.contiguous_format)).view(dtype)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _negative(numbers: Tensor) -> Tensor:
    """With the sign bit turned over, zeros and all: mins are subtracted, zeros added, and the bytes have to return."""
    return (numbers.contiguous().view(torch.int16) ^ _SIGN_BIT).view(_HALF)


def _require_finite(scales: Tensor, kind: GgmlType) -> None:
    if not scales.is_meta and not bool(torch.isfinite(scales.float()).all()):
        raise FormatError(f"a block's scale is not finite ({kind.name})", found="inf or NaN", expected="finite numbers")


def _require_table(kind: GgmlType, code: TableCode, table: Tensor) -> None:
    if not torch.equal(table.cpu(), table_of(code.name)):
        raise FormatError(
            f"{kind.name} has one table", tensor="table", found=table.tolist(), expected=_TABLES[code.name]
        )
