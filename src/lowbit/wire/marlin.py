"""The layout of the Marlin kernel, in which AutoGPTQ 0.7 and early GPTQModel could save GPTQ checkpoints.

=====  =========================== ===========================================================================
``B``  int32 [in/16, out*2]        codes in tiles of 16 x 16, their order within four tiles that of a GPU's lanes
``s``  fp16 [groups, out]          scales, in the order in which the lanes want them
=====  =========================== ===========================================================================

Always 4 bits, symmetric, groups of 128 or one per row: ``W = (q - 8) * s``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.core import QuantTensor, integer_spec, pack, unpack
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import as_bytes, as_words, require_tensor, require_tensors

BITS = 4
GROUP_SIZES = (-1, 128)
SUFFIXES = ("B", "s")
_TILE = 16
_RUN = 1024  # codes that are permuted together: four tiles
_MIDDLE = 8


def layout(shape: tuple[int, int], groups: int) -> TensorLayout:
    """The tensors of a weight ``[out, in]``."""
    out_features, in_features = shape
    return {
        "B": ((in_features // _TILE, out_features * _TILE // 8), torch.int32),
        "s": ((groups, out_features), torch.float16),
    }


def refusal(group_size: int, shape: tuple[int, int]) -> str | None:
    """Why a weight can't be in this layout, or None where it can."""
    out_features, in_features = shape
    if group_size not in (*GROUP_SIZES, in_features):
        return f"the Marlin layout has groups of 128 or whole rows, not {group_size}"
    if in_features % 128 or out_features % 256:
        return f"{out_features} x {in_features} is not a multiple of 256 x 128, which the Marlin layout needs"
    return None


def read(group_size: int, tensors: Mapping[str, Tensor]) -> QuantTensor:
    """One weight.

    Raises:
        FormatError: tensors are missing, or disagree.
    """
    require_tensors(tensors, SUFFIXES)
    packed, scales = tensors["B"], tensors["s"]
    require_tensor("B", packed, dtypes=(torch.int32,), dims=2)
    shape = packed.shape[1] * 8 // _TILE, packed.shape[0] * _TILE
    if reason := refusal(group_size, shape):
        raise FormatError(reason, tensor="B", found=list(packed.shape))
    spec = integer_spec(BITS, group_size)
    groups = spec.grouping.counts(shape)[1]
    require_tensor("s", scales, shape=(groups, shape[0]), dtypes=(torch.float16,))
    codes = _permute(unpack(as_bytes(packed), BITS, shape[0] * _TILE), _lanes().argsort())
    tiles = codes.view(shape[1] // _TILE, shape[0] // _TILE, _TILE, _TILE).transpose(1, 2)
    own = {
        "codes": pack(tiles.reshape(shape[1], shape[0]).t(), BITS),
        "scales": _permute(scales, _scale_order(groups).argsort()).t().contiguous(),
        "zeros": pack(torch.full((shape[0], groups), _MIDDLE, dtype=torch.uint8, device=packed.device), BITS),
    }
    return QuantTensor(spec, own, shape).validate()


def write(tensor: QuantTensor) -> dict[str, Tensor]:
    """The inverse of :func:`read`.

    Raises:
        FormatError: a zero point is not in the middle.
    """
    (out_features, in_features), own = tensor.shape, tensor.tensors
    groups = tensor.spec.grouping.counts(tensor.shape)[1]
    if bool((unpack(own["zeros"], BITS, groups) != _MIDDLE).any()):
        raise FormatError("the Marlin layout has no zero points, and this weight is not symmetric", found=tensor.spec)
    codes = unpack(own["codes"], BITS, in_features).t()
    tiles = codes.reshape(in_features // _TILE, _TILE, out_features // _TILE, _TILE).transpose(1, 2)
    in_lanes = _permute(tiles.reshape(in_features // _TILE, out_features * _TILE), _lanes())
    return {"B": as_words(pack(in_lanes, BITS)), "s": _permute(own["scales"].t(), _scale_order(groups)).contiguous()}


def _permute(values: Tensor, order: Tensor) -> Tensor:
    """Reorder each run of ``len(order)`` values of the last axis."""
    return values.unflatten(-1, (-1, len(order))).index_select(-1, order.to(values.device)).flatten(-2)


@functools.cache
def _lanes() -> Tensor:
    """Which of 1024 codes (four tiles, row by row) comes where.

    A lane of a tensor core's warp holds rows 2r, 2r+1, 2r+8, 2r+9 of column c and of column c+8, where c is its number
    divided by four and r the rest; four tiles follow one another; and in each word the even places come first.
    """
    lane, tile, half, row = torch.meshgrid(*map(torch.arange, (32, 4, 2, 4)), indexing="ij")
    rows = 2 * (lane % 4) + row % 2 + 8 * (row // 2)
    places = 256 * tile + _TILE * rows + lane // 4 + 8 * half
    evens_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return places.reshape(-1, 8)[:, evens_first].flatten()


@functools.cache
def _scale_order(groups: int) -> Tensor:
    if groups > 1:
        return torch.arange(64).view(8, 8).t().flatten()
    pairs = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    return (2 * torch.arange(4)[:, None] + pairs).flatten()
