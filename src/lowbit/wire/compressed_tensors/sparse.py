"""Weights stored without their zeros, as older versions of compressed-tensors did.

``sparse-bitmask``
    ``X.compressed [n]`` the values in row-major order, ``X.bitmask uint8 [out, ceil(in / 8)]`` where they stand, the
    first column in the lowest bit, ``X.row_offsets int64 [out]`` where each row begins, ``X.shape int64 [2]``.
``sparse-24-bitmask``
    two values of every four: ``X.compressed [out, in / 2]``, ``X.bitmask`` as above, ``X.shape int64 [2, 1]``.

The values are the weight's own, or, where the weight is quantized besides, its codes: int8 or e4m3, whose scales are
stored as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from lowbit.core import pack, unpack
from lowbit.errors import FormatError
from lowbit.wire.base import require_tensor, require_tensors

SUFFIXES: Final = ("compressed", "bitmask", "row_offsets", "shape")
_VALUES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn)


def is_sparse(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the weight is stored without its zeros."""
    return "bitmask" in tensors


def read_sparse(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight ``[out, in]`` of the values' dtype.

    Raises:
        FormatError: a tensor is missing, or mask, values and shape disagree.
    """
    require_tensors(tensors, ("bitmask", "compressed", "shape"))
    bitmask, values = tensors["bitmask"], tensors["compressed"]
    shape = _shape(tensors["shape"], bitmask)
    require_tensor("compressed", values, dtypes=_VALUES)
    mask = unpack(bitmask.contiguous(), 1, shape[1]).bool()
    counts = mask.sum(dim=1)
    if int(counts.sum()) != values.numel():
        raise FormatError("the mask has not one bit per value", tensor="bitmask", found=int(counts.sum()),
                          expected=values.numel())  # fmt: skip
    if values.dim() == 2:
        _check_quarters(mask, values)
    elif "row_offsets" in tensors:
        offsets = tensors["row_offsets"]
        require_tensor("row_offsets", offsets, shape=(shape[0],), dtypes=(torch.int64,))
        if not torch.equal(offsets, counts.cumsum(0) - counts):
            raise FormatError("the rows don't begin where the mask says", tensor="row_offsets")
    dense = torch.zeros(shape, dtype=_plain(values).dtype, device=values.device)
    dense[mask] = _plain(values).reshape(-1)
    return dense.view(values.dtype)


def write_sparse(weight: Tensor, quarters: bool) -> dict[str, Tensor]:
    """The inverse; under `quarters` (2:4) every four columns have at most two values that are not 0.

    Raises:
        FormatError: they have more.
    """
    mask = _plain(weight) != 0 if weight.dtype != torch.float8_e4m3fn else weight.float() != 0
    shape = torch.tensor(weight.shape)
    if quarters:
        mask = _two_of_four(mask)
    tensors = {
        "shape": shape.view(-1, 1) if quarters else shape,
        "compressed": _plain(weight)[mask].view(weight.dtype),
        "bitmask": pack(mask, 1),
    }
    if quarters:
        tensors["compressed"] = tensors["compressed"].view(weight.shape[0], -1)
        return tensors
    counts = mask.sum(dim=1)
    return {**tensors, "row_offsets": counts.cumsum(0) - counts}


def _two_of_four(mask: Tensor) -> Tensor:
    """The mask with exactly two bits of every four set: those that were, and of the others the first."""
    if mask.shape[1] % 4:
        raise FormatError("2:4 sparsity wants a multiple of 4 input features", found=list(mask.shape))
    fours = mask.unflatten(1, (-1, 4))
    if bool((fours.sum(-1) > 2).any()):
        raise FormatError("more than two of four weights are not 0, so they are not 2:4 sparse")
    order = torch.sort(fours.to(torch.int8), dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(fours).scatter_(-1, order, True).flatten(1)


def _shape(stored: Tensor, bitmask: Tensor) -> tuple[int, int]:
    require_tensor("bitmask", bitmask, dtypes=(torch.uint8,), dims=2)
    require_tensor("shape", stored, dtypes=(torch.int64, torch.int32))
    if stored.numel() != 2:
        raise FormatError("a weight has two sides", tensor="shape", found=list(stored.shape), expected=[2])
    rows, cols = stored.flatten().tolist()
    if rows != bitmask.shape[0] or -(-cols // 8) != bitmask.shape[1] or rows < 1 or cols < 1:
        raise FormatError("the mask is not of this shape", tensor="shape", found=[rows, cols],
                          expected=f"the shape of a mask of {list(bitmask.shape)} bytes")  # fmt: skip
    return rows, cols


def _check_quarters(mask: Tensor, values: Tensor) -> None:
    require_tensor("compressed", values, shape=(mask.shape[0], mask.shape[1] // 2))
    if mask.shape[1] % 4 or not bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()):
        raise FormatError("the mask has not two bits in every four", tensor="bitmask")


def _plain(values: Tensor) -> Tensor:
    """Indexing by masks knows no 8-bit floats."""
    return values.view(torch.int8) if values.dtype == torch.float8_e4m3fn else values
