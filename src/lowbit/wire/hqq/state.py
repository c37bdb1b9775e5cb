"""The tensors of one HQQ weight: packed words, and metadata as small tensors; see :mod:`lowbit.wire.hqq.wire`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lowbit.core import dtypes
from lowbit.errors import FormatError
from lowbit.wire.base import require_tensor, require_tensors

TERNARY: Final = 1.58
PACKINGS: Final = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    TERNARY: "2bit_u8",
    1: "1bit_u8",
}
# How many values a word of each packing holds, how many bits each takes, and the word's dtype.
WORDS: Final = {
    "8bit_u8": (1, 8, torch.uint8),
    "4bit_u8": (2, 4, torch.uint8),
    "3bit_32": (10, 3, torch.int32),
    "2bit_u8": (4, 2, torch.uint8),
    "1bit_u8": (8, 1, torch.uint8),
}
FLOATS: Final = {name: dtypes.FLOATS[name] for name in ("float16", "bfloat16", "float32")}
_TEXT_LIMIT: Final = 64  # bytes; the longest real one has 14


@dataclass(frozen=True)
class StoredMeta:
    """What the small tensors beside packed words say of them.

    Attributes:
        size: of a group; None for whole rows (axis 1) or columns (axis 0).
        dtype: in which hqq computes, and to which it dequantizes.
    """

    nbits: float
    size: int | None
    axis: int
    shape: tuple[int, int]
    packing: str
    view_as_float: bool
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        return 2 if self.nbits == TERNARY else int(self.nbits)

    @property
    def grouped(self) -> tuple[int, int]:
        """The shape of the values before they are packed."""
        return self.shape if self.size is None else grouped_shape(self.size, self.axis, self.shape)


def read_meta(tensors: Mapping[str, Tensor], prefix: str = "") -> StoredMeta:
    """The metadata of a weight or, under a `prefix`, of its quantized scales or zero points."""
    require_tensors(tensors, [f"{prefix}{name}" for name in ("shape", "packing", "nbits", "axis")])
    shape = _read_shape(f"{prefix}shape", tensors[f"{prefix}shape"])
    nbits = _read_bits(f"{prefix}nbits", tensors[f"{prefix}nbits"])
    packing = _read_packing(nbits, tensors, prefix)
    axis = _read_number(f"{prefix}axis", tensors)
    if axis not in (0, 1):
        raise FormatError("there is no such axis", tensor=f"{prefix}axis", found=axis, expected="0 or 1")
    if not _read_number(f"{prefix}channel_wise", tensors, 1):
        raise FormatError("one scale per weight is not supported", tensor=f"{prefix}channel_wise", found=0, expected=1)
    named = f"{prefix}compute_dtype" in tensors
    return StoredMeta(
        nbits=nbits,
        size=_read_size(f"{prefix}group_size", tensors, shape) if f"{prefix}group_size" in tensors else None,
        axis=axis,
        shape=shape,
        packing=packing,
        view_as_float=bool(_read_number(f"{prefix}view_as_float", tensors, 0)),
        dtype=_read_dtype(f"{prefix}compute_dtype", tensors, FLOATS) if named else torch.float16,
    )


def _read_packing(nbits: float, tensors: Mapping[str, Tensor], prefix: str) -> str:
    packing, wanted = _read_text(f"{prefix}packing", tensors), PACKINGS[nbits]
    if packing != wanted:
        raise FormatError(
            f"{nbits} bits are packed in another way", tensor=f"{prefix}packing", found=repr(packing), expected=wanted
        )
    name = f"{prefix}unpack_view_dtype"
    if name in tensors and (word := _read_dtype(name, tensors, dtypes.INTEGERS)) != WORDS[packing][2]:
        raise FormatError("words are of another dtype", tensor=name, found=word, expected=WORDS[packing][2])
    return packing


def _read_size(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
    size = _read_number(name, tensors)
    if size <= 0 or shape[0] * shape[1] % size:
        raise FormatError("the group size doesn't divide the weight", tensor=name, found=size, expected=list(shape))
    return size


def _read_bits(name: str, tensor: Tensor) -> float:
    require_tensor(name, tensor, shape=(), dtypes=(torch.int32, torch.int64, torch.float32))
    value = tensor.item()
    bits = TERNARY if tensor.dtype == torch.float32 and abs(value - TERNARY) < 1e-6 else value
    if bits not in PACKINGS or (tensor.dtype == torch.float32 and bits != TERNARY):
        raise FormatError("HQQ has no such width", tensor=name, found=value, expected=list(PACKINGS))
    return bits


def _read_number(name: str, tensors: Mapping[str, Tensor], default: int | None = None) -> int:
    if name not in tensors and default is not None:
        return default
    require_tensor(name, tensors[name], shape=(), dtypes=(torch.uint8, torch.int32, torch.int64, torch.bool))
    return int(tensors[name])


def _read_shape(name: str, tensor: Tensor) -> tuple[int, int]:
    require_tensor(name, tensor, dtypes=(torch.int64, torch.int32), dims=1)
    if tensor.numel() != 2:
        raise FormatError("a weight has two sides", tensor=name, found=tensor.numel(), expected=2)
    rows, cols = (int(side) for side in tensor.tolist())
    if min(rows, cols) <= 0 or rows * cols >= 1 << 62:
        raise FormatError("the weight's sides are out of range", tensor=name, found=[rows, cols], expected="positive")
    return rows, cols


def _read_text(name: str, tensors: Mapping[str, Tensor]) -> str:
    tensor = tensors[name]
    require_tensor(name, tensor, dtypes=(torch.uint8,), dims=1)
    if tensor.numel() > _TEXT_LIMIT:
        raise FormatError("the text is too long", tensor=name, found=tensor.numel(), expected=f"{_TEXT_LIMIT} bytes")
    return bytes(tensor.tolist()).decode("latin-1")


def _read_dtype(name: str, tensors: Mapping[str, Tensor], allowed: dict[str, torch.dtype]) -> torch.dtype:
    try:
        return dtypes.parse(_read_text(name, tensors), allowed)
    except FormatError as error:
        raise error.located(tensor=name) from error


def as_text(value: str) -> Tensor:
    """A text as ASCII, ``uint8 [length]``."""
    return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)


def grouped_shape(size: int, axis: int, shape: tuple[int, int]) -> tuple[int, int]:
    """The sides of a weight of `shape` in groups of `size` along `axis`."""
    groups = shape[0] * shape[1] // size
    return (groups, size) if axis == 1 else (size, groups)


def read_values(meta: StoredMeta, words: Tensor, name: str = "W_q") -> Tensor:
    """The unpacked values, uint8, in the shape in which they were grouped."""
    per_word, width, dtype = WORDS[meta.packing]
    rows, cols = meta.grouped
    require_tensor(name, words, dims=2)
    if meta.view_as_float:
        require_tensor(name, words, dtypes=tuple(FLOATS.values()))
        words = words.contiguous().view(dtype) if words.shape[1] * words.element_size() % dtype.itemsize == 0 else words
    require_tensor(name, words, shape=(-(-rows // per_word), cols), dtypes=(dtype,))
    if per_word != 10 and rows % per_word:
        raise FormatError("rows don't fill words", tensor=name, found=rows, expected=f"a multiple of {per_word}")
    if per_word == 1:
        limit = int(words.max()) if words.numel() and not words.is_meta else 0
        if limit >= 1 << meta.bits:
            raise FormatError(
                "a value is out of range", tensor=name, found=limit, expected=f"0..{(1 << meta.bits) - 1}"
            )
        return words
    values = words.new_empty((words.shape[0] * per_word, cols), dtype=torch.uint8)
    for part, rows_of_part in enumerate(values.split(words.shape[0])):
        rows_of_part.copy_((words >> (per_word - 1 - part) * width) & ((1 << width) - 1))
    return values[:rows]


def pack_words(values: Tensor, packing: str) -> Tensor:
    """The inverse of :func:`read_values`."""
    per_word, width, dtype = WORDS[packing]
    if per_word == 1:
        return values.contiguous()
    rows = -(-len(values) // per_word)
    words = values.new_zeros((rows, values.shape[1]), dtype=dtype)
    for part, rows_of_part in enumerate(values.split(rows)):
        words[: len(rows_of_part)] |= rows_of_part.to(dtype) << (per_word - 1 - part) * width
    return words


def read_scales(meta: StoredMeta, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and zero points, plain; what older files quantized or stacked is undone as hqq does it."""
    tensors = dict(tensors)
    if "zero_scale" in tensors:
        stacked = tensors["zero_scale"]
        if stacked.dim() == 0 or stacked.shape[0] != 2:
            raise FormatError("two tensors are stacked here", tensor="zero_scale", found=list(stacked.shape))
        quantized = "_q" if stacked.dtype == torch.uint8 else ""
        tensors |= {f"zero{quantized}": stacked[0], f"scale{quantized}": stacked[1]}
    rows, cols = meta.grouped
    wanted = (rows, 1) if meta.axis == 1 else (1, cols)
    found = []
    for name in ("scale", "zero"):
        if name not in tensors and f"{name}_q" in tensors:
            tensors[name] = _dequantize_nested(name, tensors)
        require_tensors(tensors, (name,))
        require_tensor(name, tensors[name], shape=wanted, dtypes=tuple(FLOATS.values()))
        found.append(tensors[name])
    return found[0], found[1]


def _dequantize_nested(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    prefix = f"meta_{name}."
    meta = read_meta(tensors, prefix)
    values = read_values(meta, tensors[f"{name}_q"], f"{name}_q").to(meta.dtype)
    parameters = []
    for part in ("zero", "scale"):
        require_tensors(tensors, (prefix + part,))
        parameter = tensors[prefix + part]
        rows, cols = meta.grouped
        # Without groups there is one number for all.
        wanted = () if meta.size is None else (rows, 1) if meta.axis == 1 else (1, cols)
        require_tensor(prefix + part, parameter, shape=wanted, dtypes=tuple(FLOATS.values()))
        parameters.append(parameter.to(meta.dtype))
    return ((values - parameters[0]) * parameters[1]).reshape(meta.shape)
