"""ggml's quantizers, for every type that needs no importance matrix: the bits of llama.cpp's reference code on CPUs.

The plain types spread each block's range over the codes; the K types and IQ4 search (:mod:`lowbit.algorithms.kquants`).
IQ1, IQ2 and IQ3 are not among them: llama.cpp itself wants statistics of the activations for most of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from lowbit.algorithms import kquants
from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.kquants import fp32
from lowbit.core import FloatCode, QuantSpec, QuantTensor, pack
from lowbit.core.ggml import GGML_SPECS, ggml_type_of
from lowbit.core.tables import E2M1, IQ4_NL, SIGN
from lowbit.errors import PlanError

_CHUNK: Final = 1 << 19  # weights quantized at once: what a search keeps of them fits a processor's cache
_SUPER: Final = 256

Parts = dict[str, Tensor]


class GgmlBlocks(Algorithm):
    """What llama.cpp makes of a weight without an importance matrix, for each type as its spec says."""

    name: ClassVar[str] = "ggml"

    def supports(self, spec: QuantSpec) -> bool:
        return ggml_type_of(spec) in MAKERS

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: no quantizer for the spec, rows that aren't whole blocks, or values that the type can't hold.
        """
        name = ggml_type_of(spec)
        maker = MAKERS.get(name or "")
        if name is None or maker is None:
            raise PlanError(f"ggml's quantizers make {', '.join(MAKERS)}; not '{spec}'")
        shape = (weight.shape[0], weight.shape[1])
        if 0 in shape:
            raise PlanError(f"a weight of shape {list(shape)} holds nothing to quantize")
        if shape[1] % maker.elements:
            raise PlanError(f"{name} has blocks of {maker.elements} weights; a row of {shape[1]} isn't a multiple")
        step = max(1, _CHUNK // shape[1])
        made = [_made(name, maker, rows.float()) for rows in weight.split(step)]
        layout = spec.tensors(shape)
        tensors = {
            key: torch.cat([part[key] for part in made]).view(layout[key][0]) for key in made[0] if key != "table"
        }
        tensors |= {key: made[0][key] for key in ("table",) if key in made[0]}
        return QuantTensor(spec, tensors, shape).validate()


class Maker(NamedTuple):
    """Weights per block, and what makes the tensors of ``fp32 [rows, in]``."""

    elements: int
    make: Callable[[str, Tensor], Parts]


def _made(name: str, maker: Maker, rows: Tensor) -> Parts:
    if maker.elements > 1:
        _require_finite(name, rows.abs().amax())
    parts = maker.make(name, rows)
    for key, numbers in parts.items():
        if key != "codes" and numbers.is_floating_point():
            _require_finite(name, numbers)
    return parts


def _require_finite(name: str, numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers.float()).all()):
        raise PlanError(f"the weight holds values that {name} can't: NaN, infinite, or too large for its scales")


def _blocks(rows: Tensor, size: int) -> Tensor:
    return rows.reshape(-1, size)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not a number that could be multiplied with."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, 0)


def _half_away(x: Tensor) -> Tensor:
    """Round to nearest, halves away from zero."""
    magnitude = x.abs()
    whole = magnitude.floor()
    return (whole + (2 * (magnitude - whole)).floor()) * x.sign()


def _codes(codes: Tensor, rows: int, bits: int) -> Tensor:
    flat = codes.to(torch.int8 if bits <= 7 else torch.int16).reshape(rows, -1)
    return pack(flat, bits)


def _signed(name: str, rows: Tensor) -> Parts:
    """Q4_0, Q5_0: the value of the greatest magnitude becomes the lowest code."""
    bits = GGML_SPECS[name].bits
    half = 1 << bits - 1
    blocks = _blocks(rows, 32)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -half
    codes = (blocks * _reciprocal(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1) - half
    return {"codes": _codes(codes, len(rows), bits), "scales": scale.half()}


def _ranged(name: str, rows: Tensor) -> Parts:
    """Q4_1, Q5_1: from the minimum to the maximum."""
    bits = GGML_SPECS[name].bits
    blocks = _blocks(rows, 32)
    low = blocks.amin(1, keepdim=True)
    scale = (blocks.amax(1, keepdim=True) - low) / ((1 << bits) - 1)
    codes = ((blocks - low) * _reciprocal(scale) + 0.5).trunc().clamp(0, (1 << bits) - 1)
    return {"codes": _codes(codes, len(rows), bits), "scales": scale.half(), "zeros": low.half()}


def _bytes(name: str, rows: Tensor) -> Parts:
    """Q8_0."""
    del name
    blocks = _blocks(rows, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = _half_away(blocks * _reciprocal(scale)).to(torch.int8)
    return {"codes": codes.reshape(rows.shape), "scales": scale.half()}


def _mxfp4(name: str, rows: Tensor) -> Parts:
    """The power of two that brings the largest value into 4 to 8, then the nearest number."""
    del name
    blocks = _blocks(rows, 32)
    magnitude = blocks.abs().amax(1, keepdim=True)
    # The logarithm is rounded to fp32 before it is rounded down, as in C: just below a power of two that matters.
    exponent = magnitude.double().log2().float().floor() + 125
    exponent = torch.where(magnitude > 0, exponent, 0).clamp(0, 254).to(torch.uint8)
    return _nearest_e2m1(blocks, exponent.view(torch.float8_e8m0fnu), len(rows))


def _nvfp4(name: str, rows: Tensor) -> Parts:
    """The scale in E4M3 that brings the largest value to 6, then the nearest number."""
    del name
    blocks = _blocks(rows, 16)
    scale = _e4m3(blocks.abs().amax(1, keepdim=True) / 6)
    return _nearest_e2m1(blocks, scale, len(rows))


def _e4m3(x: Tensor) -> Tensor:
    """Positive numbers as ggml rounds them: halves up, and what is past the range to the greatest."""
    x = x.clamp(max=448)
    # Adding half a unit of the last place kept and cutting the rest off rounds halves up, into the exponent if need be.
    rounded = ((x.view(torch.int32) + (1 << 19)) >> 20 << 20).view(torch.float32)
    small = (x * 512 + 0.5).floor().clamp(max=7) / 512
    return torch.where(x < 2.0**-6, small, rounded).clamp(max=448).to(torch.float8_e4m3fn)


def _nearest_e2m1(blocks: Tensor, scale: Tensor, rows: int) -> Parts:
    """The first of the nearest numbers."""
    table = torch.tensor(E2M1, device=blocks.device)
    candidates = scale.float() * table
    errors = (candidates.unsqueeze(1) - blocks.unsqueeze(2)).abs_()
    return {"codes": _codes(errors.argmin(2), rows, 4), "scales": scale, "table": table}


def _sign(name: str, rows: Tensor) -> Parts:
    """Q1_0: the mean of the magnitudes, and a sign."""
    del name
    blocks = _blocks(rows, 128)
    scale = kquants.total(blocks.abs().t().contiguous()) / 128
    table = torch.tensor(SIGN, device=rows.device)
    return {"codes": _codes(blocks >= 0, len(rows), 1), "scales": scale.half(), "table": table}


def _ternary(name: str, rows: Tensor) -> Parts:
    """TQ1_0, TQ2_0: the nearest of -1, 0, 1 times the absolute maximum; stored as 0, 1, 2."""
    blocks = _blocks(rows, _SUPER)
    scale = blocks.abs().amax(1, keepdim=True)
    _require_finite(name, scale.half())
    digits = (_half_away(blocks * _reciprocal(scale)) + 1).to(torch.uint8)
    stored = _base_3(digits) if name == "TQ1_0" else _base_4(digits)
    codes = torch.cat([stored, scale.half().view(torch.uint8)], dim=1)
    return {"codes": codes.view(len(rows), -1, codes.shape[1])}


def _base_4(digits: Tensor) -> Tensor:
    quads = digits.view(-1, 2, 4, 32)
    return (quads[:, :, 0] | quads[:, :, 1] << 2 | quads[:, :, 2] << 4 | quads[:, :, 3] << 6).flatten(1)


def _base_3(digits: Tensor) -> Tensor:
    """Five digits a byte (the last four bytes four), the first the most significant, scaled up to fill the byte."""
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=digits.device)
    parts = (digits[:, :160].view(-1, 5, 32), digits[:, 160:240].view(-1, 5, 16), digits[:, 240:].view(-1, 4, 4))
    numbers = torch.cat([(part * powers[: part.shape[1], None]).sum(1) for part in parts], dim=1)
    return ((numbers * 256 + 242) // 243).to(torch.uint8)


class _Search(NamedTuple):
    """How a type with mins is searched: the first candidate and how many more, in tenths."""

    first: float
    steps: int


_SEARCHES: Final = {"Q2_K": _Search(-0.5, 15), "Q4_K": _Search(-1.0, 20), "Q5_K": _Search(-0.5, 15)}


def _with_mins(name: str, rows: Tensor) -> Parts:
    """Q2_K, Q4_K, Q5_K: scale and min per group, both rounded relative to their maxima; then the codes anew."""
    spec = GGML_SPECS[name]
    second, size, top = spec.scale.second, spec.grouping.cols, (1 << spec.bits) - 1
    limit = (1 << (second.bits if second else 0)) - 1
    x = _blocks(rows, size).t().contiguous()
    magnitude = x.abs()
    weights = magnitude if name == "Q2_K" else magnitude + (kquants.total(x * x) / size).sqrt()
    search = _SEARCHES[name]
    candidates = [fp32(search.first + fp32(fp32(0.1) * number)) for number in range(search.steps + 1)]
    found = kquants.search_affine(x, weights, top, candidates, absolute=name == "Q2_K")
    scales, supers = _rounded_levels(found.scale.view(-1, _SUPER // size), limit)
    mins, super_mins = _rounded_levels(found.minimum.view(-1, _SUPER // size), limit)
    step = (supers.float() * scales).reshape(-1)
    low = (super_mins.float() * mins).reshape(-1)
    codes = ((x + low) / step).round_().clamp_(0, top)
    codes = torch.where(step == 0, found.codes, codes)
    bits = second.bits if second else 0
    return {
        "codes": _codes(codes.t(), len(rows), spec.bits),
        "scales": _codes(scales, len(rows), bits),
        "super_scales": supers.view(-1),
        "zeros": _codes(mins, len(rows), bits),
        "super_zeros": -super_mins.view(-1),
    }


def _rounded_levels(levels: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """``[blocks, groups]`` as integers up to `limit`, and the fp16 super-scale ``[blocks, 1]``."""
    maximum = levels.amax(1, keepdim=True).clamp(min=0) + 0.0  # -0 becomes 0
    inverse = kquants.ratio(limit, maximum)
    return (inverse * levels).round().clamp(0, limit), (maximum / limit).half()


def _without_mins(name: str, rows: Tensor) -> Parts:
    """Q3_K, Q6_K: a signed scale per group, the one of the greatest magnitude becoming the lowest integer."""
    spec = GGML_SPECS[name]
    second, levels = spec.scale.second, 1 << spec.bits - 1
    bits = second.bits if second else 0
    lowest = -(1 << bits - 1)
    x = _blocks(rows, 16).t().contiguous()
    found = kquants.descend_linear(x, levels) if name == "Q3_K" else kquants.search_linear(x, levels)
    blocks = found.scale.view(-1, 16)
    extreme, magnitude = kquants.largest(blocks.t())
    # An empty block is all zero bytes, and in Q3_K's scales these stand for the lowest.
    empty = magnitude == 0 if name == "Q3_K" else magnitude < 1e-15
    inverse = kquants.ratio(lowest, extreme).masked_fill(empty, 0).unsqueeze(1)
    scales = (inverse * blocks).round().clamp(lowest, -lowest - 1)
    if name == "Q3_K":
        scales = torch.where(empty.unsqueeze(1), lowest, scales)
    supers = kquants.ratio(1, inverse).half()
    step = (supers.float() * scales).reshape(-1)
    codes = (x / step).round_().clamp_(-levels, levels - 1)
    codes = torch.where(step == 0, found.codes, codes)
    if name == "Q6_K":
        codes = torch.where(empty.repeat_interleave(16), -levels, codes)
    stored = _codes(scales, len(rows), bits)
    return {
        "codes": _codes(codes.t(), len(rows), spec.bits),
        "scales": stored.view(torch.int8) if bits == 8 else stored,
        "super_scales": supers.view(-1),
    }


def _nonlinear(name: str, rows: Tensor) -> Parts:
    """IQ4_NL, IQ4_XS: 16 uneven steps; IQ4_XS rounds the scales of eight groups to 6 bits."""
    table = torch.tensor(IQ4_NL, device=rows.device)
    x = _blocks(rows, 32).t().contiguous()
    scale = kquants.search_table(x, table, tries=7)
    _require_finite(name, scale)
    parts: Parts = {"table": table}
    if name == "IQ4_NL":
        parts["scales"] = scale.half()
        steps = scale
    else:
        blocks = scale.view(-1, 8)
        supers = -kquants.largest(blocks.t())[0].unsqueeze(1) / 32
        scales = (kquants.ratio(1, supers) * blocks).round().clamp(-32, 31)
        parts |= {"scales": _codes(scales, len(rows), 6), "super_scales": supers.half().view(-1)}
        steps = (supers * scales).reshape(-1)
    codes = kquants.nearest_entry(x * kquants.ratio(1, steps), table)
    return parts | {"codes": _codes(codes.t(), len(rows), 4)}


def _cast(name: str, rows: Tensor) -> Parts:
    """F32, F16, BF16: nearest, halves to even."""
    code = GGML_SPECS[name].code
    numbers = rows.to(code.dtype) if isinstance(code, FloatCode) else rows
    if bool((torch.isinf(numbers) & ~torch.isinf(rows)).any()):
        raise PlanError(f"the weight holds values that are too large for {name}")
    return {"codes": numbers}


MAKERS: Final = {
    "Q4_0": Maker(32, _signed),
    "Q5_0": Maker(32, _signed),
    "Q4_1": Maker(32, _ranged),
    "Q5_1": Maker(32, _ranged),
    "Q8_0": Maker(32, _bytes),
    "Q2_K": Maker(_SUPER, _with_mins),
    "Q3_K": Maker(_SUPER, _without_mins),
    "Q4_K": Maker(_SUPER, _with_mins),
    "Q5_K": Maker(_SUPER, _with_mins),
    "Q6_K": Maker(_SUPER, _without_mins),
    "IQ4_NL": Maker(32, _nonlinear),
    "IQ4_XS": Maker(_SUPER, _nonlinear),
    "TQ1_0": Maker(_SUPER, _ternary),
    "TQ2_0": Maker(_SUPER, _ternary),
    "MXFP4": Maker(32, _mxfp4),
    "NVFP4": Maker(64, _nvfp4),
    "Q1_0": Maker(128, _sign),
    "F32": Maker(1, _cast),
    "F16": Maker(1, _cast),
    "BF16": Maker(1, _cast),
}
