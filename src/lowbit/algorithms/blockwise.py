"""NF4 and FP4: a 16-entry table with one absolute maximum per block, plain or nested (QLoRA, arXiv:2305.14314).

The order of operations is bitsandbytes', so that codes and statistics come out the same to the bit.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.algorithms.base import Algorithm
from lowbit.core import QuantSpec, QuantTensor, TableCode, pack
from lowbit.errors import PlanError

_TINY = 1e-38

# Quantiles of the normal distribution, asymmetric so that 0 is exact (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, 2 bits of exponent, 1 of mantissa, in the order of the bit patterns; divided by the largest, 12.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@functools.cache
def table(name: str) -> Tensor:
    """The 16 values of ``nf4`` or ``fp4``, fp32, by code."""
    if name == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if name == "fp4":
        # 0 - v, not -v: bitsandbytes' table has no negative zero, and files are compared by their bytes.
        values = torch.tensor(_FP4_TWELFTHS + tuple(0.0 - v for v in _FP4_TWELFTHS), dtype=torch.float32)
        return values / values.abs().max()
    raise PlanError(f"unknown table '{name}'; there are nf4 and fp4")


@functools.cache
def nested_map() -> Tensor:
    """The 256 values that nested statistics are coded with, fp32, ascending.

    Per decade from 1e-6 to 1, the midpoints of ``2**i`` equal steps from 0.1 to 1, both signs, then 0 and 1
    (dynamic tree quantization, arXiv:1511.04561).
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        decade = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


class BlockwiseTable(Algorithm):
    """The nearest entry of ``W / absmax``, by the midpoints between entries; ties go to the lower entry."""

    name: ClassVar[str] = "table"

    def supports(self, spec: QuantSpec) -> bool:
        names = isinstance(spec.code, TableCode) and spec.code.name in ("nf4", "fp4")
        second = spec.scale.second
        return names and spec.grouping.flat and (second is None or (second.kind == "table" and second.offset))

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: the weight has NaN or infinite values.
        """
        values = table(spec.code.name if isinstance(spec.code, TableCode) else "").to(weight.device, copy=True)
        flat = weight.reshape(-1).float()
        absmax = _block_absmax(flat, spec.grouping.cols)
        if not bool(torch.isfinite(absmax).all()):
            raise PlanError("the weight holds NaN or infinite values; nothing can be quantized from it")
        order = torch.argsort(values, stable=True)
        nearest = torch.bucketize(
            _normalize(flat, absmax, spec.grouping.cols), _midpoints(values[order]), out_int32=True
        )
        tensors = {"codes": pack(order[nearest], spec.bits), "table": values, **_store_absmax(absmax, spec)}
        return QuantTensor(spec, tensors, (weight.shape[0], weight.shape[1])).validate()


def _block_absmax(flat: Tensor, block: int) -> Tensor:
    return functional.pad(flat.abs(), (0, -flat.numel() % block)).view(-1, block).amax(-1)


def _normalize(flat: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Multiply by the reciprocal, but divide in a last, shorter block: both as the original does."""
    safe = absmax.clamp(min=_TINY)
    full = flat.numel() // block * block
    scaled = flat[:full].view(-1, block) * (1.0 / safe[: full // block]).unsqueeze(1)
    return torch.cat([scaled.reshape(-1), flat[full:] / safe[-1]]).clamp(-1, 1)


def _midpoints(ascending: Tensor) -> Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


def _store_absmax(absmax: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    second = spec.scale.second
    if second is None:
        return {"scales": absmax}
    offset = absmax.mean()
    centred = absmax - offset
    supers = _block_absmax(centred, second.size)
    values = nested_map().to(absmax.device, copy=True)
    codes = _nested_codes(centred, supers.repeat_interleave(second.size)[: centred.numel()], values)
    return {
        "scales": codes.to(torch.uint8),
        "super_scales": supers,
        "super_scales_table": values,
        "super_scales_offset": offset.reshape(1),
    }


def _nested_codes(values: Tensor, absmax: Tensor, table_256: Tensor) -> Tensor:
    """The entry nearest to ``values / absmax`` after rounding that to one of 65536 steps from -1 to 1.

    bitsandbytes' CPU quantizer looks codes up by those steps, which moves a few codes in ten thousand by one (observed
    on 0.50.2 over three million values); a block whose values are all 0 gets code 0.
    """
    steps = torch.arange(65536, dtype=torch.float64, device=values.device) * 2 / 65535 - 1
    lookup = torch.bucketize(steps.float(), _midpoints(table_256))
    normalized = values * (1.0 / absmax.clamp(min=_TINY))
    step = ((normalized + 1) * 32767.5 + 0.5).floor().long().clamp(0, 65535)
    return torch.where(absmax > 0, lookup[step], 0)
