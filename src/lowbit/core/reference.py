"""The arithmetic that defines what is right: a few lines of torch per part of a spec, on any device.

Every kernel and every wire is tested against these functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.core.activations import round_inputs, round_outputs
from lowbit.core.blocks import decode_blocks
from lowbit.core.packing import sign_extend, unpack
from lowbit.core.spec import BlockCode, FloatCode, IntCode, QuantSpec, SecondLevel, TableCode, VectorCode

# bitsandbytes multiplies with this decimal constant, not with the float nearest to 1 / 127**2.
_INT8_PRODUCT_SCALE = 6.200124e-05


def dequantize(
    spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """``W = (q - z) * s``, in the variant and with the roundings that the spec names.

    Args:
        spec: what the tensors mean.
        tensors: by the names of :meth:`QuantSpec.tensors`.
        shape: logical ``(out, in)``.
        dtype: of the result.

    Returns:
        ``[out, in]`` of `dtype`.
    """
    work = dtype if spec.rounding == "each" else torch.float32
    values = decode_codes(spec, tensors, shape, work).to(work)
    if not spec.scale.stored:
        return values.to(dtype)
    scales = _expand(decode_scales(spec, tensors, shape).to(work), spec, tensors, shape)
    zeros = decode_zeros(spec, tensors, shape)
    if zeros is None or spec.zero is None:
        values = values * scales
    elif spec.zero.kind == "additive":
        values = values * scales + _expand(zeros.to(work), spec, tensors, shape)
    else:
        values = (values - _expand(zeros.to(work), spec, tensors, shape)) * scales
    if spec.scale.multiplier != 1.0:
        values = values * spec.scale.multiplier
    return values.to(dtype)


def decode_codes(
    spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], work: torch.dtype = torch.float32
) -> Tensor:
    """Integers (uint8 or int8), table values (fp32), floats, sums of vectors (in the dtype `work`), blocks (fp32)."""
    codes = tensors["codes"]
    if isinstance(spec.code, FloatCode):
        return codes
    if isinstance(spec.code, VectorCode):
        return _sum_vectors(spec.code, codes, tensors["codebooks"].to(work), shape)
    if isinstance(spec.code, BlockCode):
        return decode_blocks(spec.code.name, codes)[:, : shape[1]]
    if spec.bits < 8:
        count = shape[0] * shape[1] if spec.grouping.flat else shape[1]
        codes = unpack(codes, spec.bits, count).reshape(shape)
        if isinstance(spec.code, IntCode) and spec.code.signed:
            codes = sign_extend(codes, spec.bits)
    if isinstance(spec.code, TableCode):
        return tensors["table"].index_select(0, codes.reshape(-1).to(torch.int32)).view(shape)
    return codes


def _sum_vectors(code: VectorCode, codes: Tensor, codebooks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Not by additions: this is the operator that AQLM uses, and how its sum is rounded depends on dtype and device.

    In bf16, for one, the CPU's rounds ties away from zero, as nothing else in torch does.
    """
    indices = codes.to(torch.int32) & ((1 << code.bits) - 1)
    offsets = torch.arange(code.codebooks, dtype=torch.int32, device=codes.device) << code.bits
    vectors = codebooks.reshape(code.codebooks << code.bits, code.out_group * code.in_group)
    sums = functional.embedding_bag((indices + offsets).flatten(0, 1), vectors, mode="sum")
    tiles = sums.view(*codes.shape[:2], code.out_group, code.in_group)
    return tiles.transpose(1, 2).reshape(-1, codes.shape[1] * code.in_group)[: shape[0], : shape[1]]


def decode_zeros(spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
    """Zero points, one per group, in the shape of the scales; integers are uint8."""
    if spec.zero is None:
        return None
    if spec.zero.kind == "integer":
        return unpack(tensors["zeros"], spec.zero.bits, spec.grouping.counts(shape)[-1])
    return _decode_scales("zeros", spec.zero.second, tensors, spec.grouping.counts(shape))


def decode_scales(spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """One scale per group, second level undone; fp32 where there was one, else as stored."""
    return _decode_scales("scales", spec.scale.second, tensors, spec.grouping.counts(shape))


def linear(
    inputs: Tensor, spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    """``inputs @ W.T + bias`` under the spec's activation policy.

    Args:
        inputs: ``[..., in]``, floating point.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` of the inputs' dtype.
    """
    if spec.activation.kind == "int8":
        return _int8_linear(inputs, spec, tensors, shape, bias)
    return multiply(inputs, dequantize(spec, tensors, shape, inputs.dtype), spec, tensors, bias)


def multiply(
    inputs: Tensor, weight: Tensor, spec: QuantSpec, tensors: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    """:func:`linear` with the dequantized weight, for every policy but LLM.int8()'s, which needs the codes."""
    if spec.activation.kind == "none":
        return functional.linear(inputs, weight, bias)
    outputs = functional.linear(round_inputs(inputs, spec.activation, tensors), weight, bias)
    return round_outputs(outputs, spec.activation, tensors)


def quantize_rows(inputs: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row to int8 by its absolute maximum, setting outlier columns aside (LLM.int8(), arXiv:2208.07339).

    Args:
        inputs: ``fp16 [rows, in]``.
        threshold: a column with any absolute value from here on is an outlier; 0 for none.

    Returns:
        ``int8 [rows, in]`` with zeros in the outlier columns, ``fp32 [rows]`` absolute maxima of what is not an outlier
        value, and the outlier columns as ``bool [in]``.
    """
    outliers = inputs.abs() >= threshold if threshold > 0 else torch.zeros_like(inputs, dtype=torch.bool)
    columns = outliers.any(dim=0)
    regular = inputs.masked_fill(outliers, 0)
    absmax = regular.abs().amax(dim=1).float()
    # A row of zeros would give 0 * inf; bitsandbytes casts that NaN to int8, which is 0 on every device tested.
    reciprocal = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    rounded = torch.round(regular * reciprocal.unsqueeze(-1)).to(torch.int8)
    return rounded.masked_fill(columns, 0), absmax, columns


def _int8_linear(
    inputs: Tensor, spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    rows = inputs.reshape(-1, shape[1])
    codes, absmax, columns = quantize_rows(rows.to(torch.float16), spec.activation.threshold)
    products = int8_matmul(codes, tensors["codes"])
    scales = tensors["scales"].reshape(1, -1).float()
    outputs = products * (absmax.unsqueeze(-1) * scales) * _INT8_PRODUCT_SCALE
    outputs = (outputs if bias is None else outputs + bias).to(inputs.dtype)
    if spec.activation.threshold > 0:
        outputs = _add_outliers(outputs, rows, columns, spec, tensors, shape)
    return outputs.reshape(*inputs.shape[:-1], shape[0])


def _add_outliers(
    outputs: Tensor,
    rows: Tensor,
    columns: Tensor,
    spec: QuantSpec,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
) -> Tensor:
    """Add the products of the outlier columns, in the inputs' dtype."""
    if columns.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph can't ask which columns there will be: all take part, those that are none with zeros.
        weight = dequantize(spec, tensors, shape, rows.dtype)
        return torch.addmm(outputs, rows.masked_fill(~columns, 0), weight.t())
    outliers = columns.nonzero().squeeze(1)
    if not outliers.numel():
        return outputs
    narrow = {"codes": tensors["codes"][:, outliers], "scales": tensors["scales"]}
    weight = dequantize(spec, narrow, (shape[0], outliers.numel()), rows.dtype)
    return torch.addmm(outputs, rows[:, outliers], weight.t())


def int8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of int8 matrices, accumulated exactly in int32."""
    if left.device.type == "cpu":
        # torch's own product is a plain loop on many CPUs. Of 1024 products of int8, fp32 holds the sum exactly.
        total = left.new_zeros(left.shape[0], right.shape[0], dtype=torch.int32)
        for x, y in zip(left.split(1024, dim=1), right.split(1024, dim=1), strict=True):
            total += (x.float() @ y.float().t()).to(torch.int32)
        return total
    # The GPU's int8 matmul wants more than 16 rows and multiples of 8 in the other two sides.
    rows = left.shape[0]
    padded = functional.pad(left, (0, -left.shape[1] % 8, 0, max(17 - rows, 0)))
    weights = functional.pad(right, (0, -right.shape[1] % 8, 0, -right.shape[0] % 8))
    return torch._int_mm(padded, weights.t())[:rows, : right.shape[0]]


def _decode_scales(
    name: str, second: SecondLevel | None, tensors: Mapping[str, Tensor], counts: tuple[int, ...]
) -> Tensor:
    stored = tensors[name]
    if second is None:
        return stored
    if second.kind == "integer" and second.bits < 8:
        stored = unpack(stored, second.bits, counts[-1])
        stored = sign_extend(stored, second.bits) if second.signed else stored
    if second.kind == "table":
        first = functional.embedding(stored.to(torch.int32), tensors[f"super_{name}_table"].unsqueeze(-1)).squeeze(-1)
    else:
        first = stored.float()
    supers = tensors[f"super_{name}"].float().repeat_interleave(second.size or stored.numel())[: stored.numel()]
    supers = supers.view_as(first)
    decoded = first / supers if second.divides else first * supers
    return decoded + tensors[f"super_{name}_offset"] if second.offset else decoded


def _expand(per_group: Tensor, spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """One number per group, made broadcastable to ``[out, in]``."""
    out_features, in_features = shape
    grouping = spec.grouping
    if grouping.strided:
        return per_group.repeat(grouping.cols)[: out_features * in_features].view(shape)
    if grouping.flat:
        return per_group.repeat_interleave(grouping.cols)[: out_features * in_features].view(shape)
    if grouping.rows > 1:
        per_group = per_group.repeat_interleave(grouping.rows, dim=0)[:out_features]
    if grouping.permuted:
        return per_group.index_select(1, tensors["group_index"])
    if per_group.shape[1] > 1:
        return per_group.repeat_interleave(grouping.cols, dim=1)[:, :in_features]
    return per_group
