"""Changes of spelling: the same numbers under another spec, to the bit, or the reason why there is none.

A symmetric 4-bit weight can be unsigned integers with stored zero points of 8 (GPTQ), the same with zero points in fp16
(HQQ), signed integers without any (compressed-tensors, GGUF Q4_0), or integers of 8 bits. :func:`respell` goes from one
to another and back; what it returns dequantizes to the same bits, in fp32 and in the weight's own dtype.
:func:`why_not` and :func:`conditions` say without any weight what can be expected.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.core import dtypes
from lowbit.core.packing import pack, sign_extend, unpack
from lowbit.core.qtensor import QuantTensor
from lowbit.core.reference import decode_scales, decode_zeros
from lowbit.core.regroup import coarser, regroup, spread
from lowbit.core.rows import can_select_rows, dequantize_rows
from lowbit.core.spec import IntCode, QuantSpec, TableCode, VectorCode, Zero
from lowbit.errors import SpecError

_STRIP = 1 << 20  # weights that are compared at a time


def respell(tensor: QuantTensor, target: QuantSpec) -> QuantTensor:
    """The weight under the spec `target`.

    Raises:
        SpecError: no tensors under `target` mean the same to the bit; says why.
    """
    source = tensor.spec
    if source == target:
        return tensor
    if reason := _never(source, target):
        raise SpecError(reason)
    own = _one_level(tensor, target) if _has_one_level(target) else dict(tensor.tensors)
    result = QuantTensor(target, own, tensor.shape).validate()
    if not _exact_by_construction(source, target):
        _verify(tensor, result)
    return result


def without_zeros(spec: QuantSpec) -> QuantSpec:
    """What unsigned integers with the middle of their range for every zero point mean, without zero points.

    The same spec where its codes are no such integers, or are rounded otherwise.
    """
    if spec.zero is None or spec.zero.kind == "additive" or not isinstance(spec.code, IntCode) or spec.code.signed:
        return spec
    if spec.rounding == "each" and spec.scale.dtype != spec.dtype:
        return spec  # The scales are rounded before anything else.
    return replace(spec, code=IntCode(spec.bits, signed=True), zero=None, rounding="once")


def whole_zeros(spec: QuantSpec) -> QuantSpec:
    """What unsigned integers with zero points in the codes' unit mean, where those are whole numbers of their range.

    The same spec where its codes are no such integers, or are rounded otherwise.
    """
    if spec.zero is None or spec.zero.kind == "integer" or not isinstance(spec.code, IntCode) or spec.code.signed:
        return spec
    if spec.rounding == "each" and (spec.zero.kind == "additive" or spec.scale.dtype != spec.dtype):
        return spec
    return replace(spec, zero=Zero("integer", spec.bits), rounding="once")


def simplest(tensor: QuantTensor) -> QuantSpec:
    """The spec with as little said of zero points as their values need.

    None, where all are the middle of the range; integers, where all are whole; else the tensor's own.
    """
    spec = tensor.spec
    zeros = decode_zeros(spec, tensor.tensors, tensor.shape)
    if zeros is None or spec.zero is None or spec.zero.kind == "additive":
        return spec
    if bool((zeros == 1 << spec.bits - 1).all()):
        return without_zeros(spec)
    if spec.zero.kind == "float" and bool((zeros == zeros.round()).all()) and _fits(zeros, 0, (1 << spec.bits) - 1):
        return whole_zeros(spec)
    return spec


def why_not(source: QuantSpec, target: QuantSpec) -> str | None:
    """Why a weight of the spec `source` can't be spelled under `target`, but for chance; None where it can.

    Where it depends on the weight in a way that occurs, :func:`conditions` says on what.
    """
    reason = _never(source, target)
    if reason is None and coarser(target.grouping, source.grouping):
        reason = f"'{target.grouping}' are coarser than '{source.grouping}'"
    return reason


def conditions(source: QuantSpec, target: QuantSpec) -> tuple[str, ...]:
    """What has to hold of a weight's numbers where :func:`why_not` says None; empty where nothing has to."""
    if source == target:
        return ()
    found = []
    if source.grouping.flat != target.grouping.flat:
        size = source.grouping.cols if source.grouping.flat else target.grouping.cols
        found.append(f"rows are a multiple of {size} weights")
    decoded = torch.float32 if source.scale.second and not target.scale.second else source.scale.dtype
    if not _holds(target.scale.dtype, decoded):
        found.append(f"{dtypes.name_of(target.scale.dtype)} holds the scales")
    if source.rounding != target.rounding and not _holds(source.dtype, decoded):
        found.append(f"{dtypes.name_of(source.dtype)} holds the scales")
    if isinstance(source.code, IntCode) and isinstance(target.code, IntCode):
        found += _zero_conditions(source, target)
        inside = source.code.low >= target.code.low and source.code.high <= target.code.high
        if target.bits < source.bits or (source.zero is None and target.zero is None and not inside):
            found.append(f"the codes fit {target.code}")
    return tuple(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------- from specs alone


def _never(source: QuantSpec, target: QuantSpec) -> str | None:
    """Why no weight at all can be spelled so."""
    same_codes = source.code == target.code or (isinstance(source.code, IntCode) and isinstance(target.code, IntCode))
    if not same_codes:
        return f"the codes are {source.code}, not {target.code}"
    if source.scale.stored != target.scale.stored:
        return "one has scales and the other has none"
    if source.scale.multiplier != target.scale.multiplier:
        return (
            f"a constant is multiplied with after the scale: {source.scale.multiplier:g}, not "
            f"{target.scale.multiplier:g}; in one number they would round differently"
        )
    if target.scale.second not in (None, source.scale.second):
        return "its scales are not in two levels as they have to be"
    if target.zero is not None and target.zero.second not in (None, source.zero and source.zero.second):
        return "its zero points are not in two levels as they have to be"
    if not _has_one_level(target) and replace(source, dtype=target.dtype) != target:
        return f"two-level scales are kept only as they are, in '{source}'"
    if source.grouping.permuted and target.grouping != source.grouping:
        return "its groups are not of neighbouring columns"
    if source.activation != target.activation:
        own, other = (_said_of_activations(spec) for spec in (source, target))
        return f"{own}, and there {'in another way' if own == other else other}"
    return _never_rounds_alike(source, target)


def _said_of_activations(spec: QuantSpec) -> str:
    return "activations stay as they are" if spec.activation.kind == "none" else f"it has {spec.activation}"


def _never_rounds_alike(source: QuantSpec, target: QuantSpec) -> str | None:
    additive = [spec.zero is not None and spec.zero.kind == "additive" for spec in (source, target)]
    if source.rounding != target.rounding and any(additive) and source.dtype != torch.float32:
        return "every operation is rounded in one, only the result in the other"
    return None


def _zero_conditions(source: QuantSpec, target: QuantSpec) -> list[str]:
    before, after = source.zero, target.zero
    found = []
    kinds = before.kind if before else None, after.kind if after else None
    if kinds[0] == "float" and (kinds[1] != "float" or source.rounding != target.rounding):
        found.append("the zero points are whole numbers")
    if kinds[0] == "additive" and kinds[1] != "additive":
        found.append("the zero points are whole multiples of the scales")
    if before is not None and after is None and not _differences_fit(source, target):
        found.append("the zero points are the middle of the range")
    if after is not None and kinds[1] == "additive" and kinds[0] in ("integer", "float"):
        found.append(f"{dtypes.name_of(after.dtype)} holds scale times zero point")
    moved = source.code != target.code and kinds == ("additive", "additive")
    if before and after and kinds[0] == kinds[1] != "integer" and (moved or not _holds(after.dtype, before.dtype)):
        found.append(f"{dtypes.name_of(after.dtype)} holds the zero points")
    return found


def _differences_fit(source: QuantSpec, target: QuantSpec) -> bool:
    """Whether ``q - z`` always fits the target's codes."""
    if not (isinstance(source.code, IntCode) and isinstance(target.code, IntCode)) or source.zero is None:
        return False
    high_zero = (1 << source.zero.bits) - 1
    return source.code.low - high_zero >= target.code.low and source.code.high <= target.code.high


def _has_one_level(spec: QuantSpec) -> bool:
    """Whether scales and zeros are stored as they are."""
    return spec.scale.second is None and (spec.zero is None or spec.zero.second is None)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the dtype `narrow` is one of `wide`."""
    outer, inner = torch.finfo(wide), torch.finfo(narrow)
    least = outer.tiny * outer.eps, inner.tiny * inner.eps
    return outer.eps <= inner.eps and outer.max >= inner.max and least[0] <= least[1]


def _exact_by_construction(source: QuantSpec, target: QuantSpec) -> bool:
    """Whether equal numbers already make equal results: one product in fp32, one rounding.

    So it is where zero points are whole, since the difference to a code then is exact in every dtype, and where scales
    have 16 bits, since no product then is rounded before the last step.
    """
    kinds = {spec.zero.kind if spec.zero else "none" for spec in (source, target)}
    if isinstance(source.code, VectorCode) or not kinds & {"none", "integer"} or "additive" in kinds:
        return False
    if source.rounding == target.rounding == "once" or source.dtype == torch.float32:
        return True
    return source.scale.dtype.itemsize <= 2 and _holds(source.dtype, source.scale.dtype)


# --------------------------------------------------------------------------------------------------- from the numbers


def exact(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The same numbers in another dtype.

    Raises:
        SpecError: names the first one that `dtype` doesn't hold.
    """
    if values.dtype == dtype:
        return values
    cast = values.to(dtype)
    wrong = ~_same(cast.to(torch.float64), values.to(torch.float64))
    if bool(wrong.any()):
        first = float(values[wrong].reshape(-1)[0])
        raise SpecError(f"the {what} {first:.9g} is no {dtypes.name_of(dtype)} ({int(wrong.sum())} such)")
    return cast


def _same(left: Tensor, right: Tensor) -> Tensor:
    return (left == right) | (left.isnan() & right.isnan())


def _verify(before: QuantTensor, after: QuantTensor) -> None:
    in_strips = all(can_select_rows(tensor.spec, tensor.shape) for tensor in (before, after))
    strip = max(1, _STRIP // before.shape[1]) if in_strips else before.shape[0]
    for rows in torch.arange(before.shape[0], device=before.device).split(strip):
        for dtype in dict.fromkeys((torch.float32, before.spec.dtype)):
            dense = [dequantize_rows(t.spec, t.tensors, t.shape, rows, dtype) for t in (before, after)]
            if not bool(_same(*dense).all()):
                raise SpecError(f"'{after.spec}' rounds differently in {dtypes.name_of(dtype)}")


def _kept(tensor: QuantTensor, target: QuantSpec) -> dict[str, Tensor]:
    """What a change of spelling leaves alone: tables, codebooks, and what belongs to activations."""
    names = {"table", *target.activation.tensors()}
    own = {name: value for name, value in tensor.tensors.items() if name in names}
    if "codebooks" in tensor.tensors:
        own["codebooks"] = exact(tensor.tensors["codebooks"], target.scale.dtype, "codebook's entry")
    if target.grouping.permuted:
        plain = torch.arange(tensor.shape[1], dtype=torch.int32, device=tensor.device) // (target.grouping.cols or 1)
        own["group_index"] = tensor.tensors.get("group_index", plain)
    return own


def _one_level(tensor: QuantTensor, target: QuantSpec) -> dict[str, Tensor]:
    own, source = _kept(tensor, target), tensor.spec
    if not source.scale.stored:
        return own | {"codes": _store(_codes(tensor), target)}
    scales = regroup(decode_scales(source, tensor.tensors, tensor.shape), tensor, target.grouping, "scales")
    own["scales"] = exact(scales, target.scale.dtype, "scale")
    if isinstance(source.code, IntCode) and isinstance(target.code, IntCode):
        return own | _integers(tensor, target, source.code, target.code, scales)
    return own | {"codes": _store(_codes(tensor), target)}


def _codes(tensor: QuantTensor) -> Tensor:
    """The codes as they are or, where they are packed, one per byte; ``[out, in]``, unsigned where packed."""
    spec, codes = tensor.spec, tensor.tensors["codes"]
    if not isinstance(spec.code, IntCode | TableCode) or spec.bits == 8:
        return codes
    count = tensor.shape[0] * tensor.shape[1] if spec.grouping.flat else tensor.shape[1]
    values = unpack(codes, spec.bits, count).reshape(tensor.shape)
    return sign_extend(values, spec.bits) if isinstance(spec.code, IntCode) and spec.code.signed else values


def _store(codes: Tensor, target: QuantSpec) -> Tensor:
    if isinstance(target.code, IntCode | TableCode) and target.bits < 8:
        return pack(codes.reshape(-1) if target.grouping.flat else codes, target.bits)
    if isinstance(target.code, IntCode):
        return codes.to(torch.int8 if target.code.signed else torch.uint8)
    return codes


def _integers(
    tensor: QuantTensor, target: QuantSpec, before: IntCode, after: IntCode, scales: Tensor
) -> dict[str, Tensor]:
    """Codes and zero points, both moved by the same number where the ranges ask for it."""
    codes = _codes(tensor).to(torch.int16)
    zeros = _zero_points(tensor, target, scales)
    if target.zero is None:
        moved = codes if zeros is None else codes - _per_weight(_whole(zeros), tensor, target).to(torch.int16)
        if not _fits(moved, after.low, after.high):
            raise SpecError(
                f"without zero points its codes run from {int(moved.min())} to {int(moved.max())}, which are no {after}"
            )
        return {"codes": _store(moved, target)}
    shift = _shift(codes, zeros, before, after, target)
    if zeros is None:
        zeros = torch.zeros_like(scales, dtype=torch.float64)
    return {"codes": _store(codes + shift, target), "zeros": _store_zeros(zeros + shift, scales, tensor, target, shift)}


def _zero_points(tensor: QuantTensor, target: QuantSpec, scales: Tensor) -> Tensor | None:
    """Numbers in the codes' unit, fp64, one per group of the target; None where there are none."""
    zeros = decode_zeros(tensor.spec, tensor.tensors, tensor.shape)
    if zeros is None or tensor.spec.zero is None:
        return None
    zeros = regroup(zeros, tensor, target.grouping, "zero points").to(torch.float64)
    if tensor.spec.zero.kind != "additive":
        return zeros
    return torch.where(zeros == 0, 0.0, -zeros / scales.to(torch.float64))


def _whole(zeros: Tensor) -> Tensor:
    wrong = zeros != zeros.round()
    if bool(wrong.any()):
        raise SpecError(
            f"the zero point {float(zeros[wrong].reshape(-1)[0]):.9g} is no whole number ({int(wrong.sum())} such)"
        )
    if not _fits(zeros, -(1 << 14), 1 << 14):
        raise SpecError("a zero point is far outside of the codes")
    return zeros


def _per_weight(per_group: Tensor, tensor: QuantTensor, target: QuantSpec) -> Tensor:
    return spread(per_group, target.grouping, tensor.shape, tensor.tensors.get("group_index"))


def _shift(codes: Tensor, zeros: Tensor | None, before: IntCode, after: IntCode, target: QuantSpec) -> int:
    """What is added to codes and zero points so that both fit: nothing, or middle to middle."""
    to_middle = _middle(after) - _middle(before)
    candidates = (0, to_middle) if before.signed == after.signed else (to_middle, 0)
    for shift in candidates:
        if _fits(codes + shift, after.low, after.high) and _zeros_fit(zeros, shift, target):
            return shift
    if not any(_fits(codes + shift, after.low, after.high) for shift in candidates):
        raise SpecError(f"its codes run from {int(codes.min())} to {int(codes.max())}, which don't fit {after}")
    raise SpecError(f"its zero points don't fit {target.zero.bits if target.zero else 0} bits")


def _middle(code: IntCode) -> int:
    return 0 if code.signed else 1 << code.bits - 1


def _fits(values: Tensor, low: int, high: int) -> bool:
    return not values.numel() or (bool(values.min() >= low) and bool(values.max() <= high))


def _zeros_fit(zeros: Tensor | None, shift: int, target: QuantSpec) -> bool:
    if target.zero is None or target.zero.kind != "integer":
        return True
    return (
        0 <= shift < 1 << target.zero.bits
        if zeros is None
        else _fits(_whole(zeros) + shift, 0, (1 << target.zero.bits) - 1)
    )


def _store_zeros(zeros: Tensor, scales: Tensor, tensor: QuantTensor, target: QuantSpec, shift: int) -> Tensor:
    if target.zero is None:
        raise SpecError("there are no zero points to store")
    if target.zero.kind == "integer":
        return pack(_whole(zeros).to(torch.int16), target.zero.bits)
    if target.zero.kind == "float":
        return exact(zeros, target.zero.dtype, "zero point")
    if shift == 0 and tensor.spec.zero is not None and tensor.spec.zero.kind == "additive":
        # Not through the quotient with the scale, which may be rounded.
        stored = decode_zeros(tensor.spec, tensor.tensors, tensor.shape)
        if stored is not None:
            return exact(regroup(stored, tensor, target.grouping, "zero points"), target.zero.dtype, "zero point")
    products = torch.where(zeros == 0, 0.0, -zeros * scales.to(torch.float64))
    return exact(products, target.zero.dtype, "product of scale and zero point")
