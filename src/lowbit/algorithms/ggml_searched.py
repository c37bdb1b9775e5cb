"""ggml's quantizers that search scales: the K types and IQ4, with an importance matrix and without one.

With importance, groups are fitted by ``importance * sqrt(mean(x²) + x²)``, and the integers that stand for their scales
by the sums of these weights; without, as llama.cpp's reference code does it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.algorithms import kquants
from lowbit.algorithms.ggml_parts import (
    SUPER,
    Parts,
    columns_of,
    importance_weights,
    packed_codes,
    require_finite,
    square_root,
)
from lowbit.algorithms.kquants import fp32
from lowbit.core.ggml import GGML_SPECS
from lowbit.core.tables import IQ4_NL


class _Search(NamedTuple):
    """How a type with mins is searched: the first candidate, the step, and how many more there are."""

    first: float
    step: float
    steps: int

    def candidates(self) -> list[float]:
        return [fp32(self.first + fp32(fp32(self.step) * number)) for number in range(self.steps + 1)]


_PLAIN: Final = {"Q2_K": _Search(-0.5, 0.1, 15), "Q4_K": _Search(-1.0, 0.1, 20), "Q5_K": _Search(-0.5, 0.1, 15)}
_WEIGHTED: Final = _Search(-0.9, 0.05, 36)


class _Levels(NamedTuple):
    """Integers that stand for scales or mins, ``fp32 [blocks, groups]``, and super-scales, ``fp16 [blocks, 1]``."""

    integers: Tensor
    supers: Tensor

    def steps(self) -> Tensor:
        """What they stand for, one number per group."""
        return (self.supers.float() * self.integers).reshape(-1)


def search_ranges(rows: Tensor, size: int, bits: int, importance: Tensor) -> kquants.Affine:
    """Q4_1 and Q5_1 with importance: scale and min of every `size` weights, the mean of x² over whole rows."""
    weights = columns_of(importance_weights(rows, importance, rows.shape[1], 1), size)
    top = (1 << bits) - 1
    return kquants.search_affine(columns_of(rows, size), weights, top, _WEIGHTED.candidates(), absolute=False)


def search_scales(rows: Tensor, size: int, bits: int, importance: Tensor) -> kquants.Linear:
    """Q4_0 and Q5_0 with importance, likewise."""
    weights = columns_of(importance_weights(rows, importance, rows.shape[1], 1), size)
    return kquants.search_linear(columns_of(rows, size), 1 << bits - 1, weights)


def with_mins(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """Q2_K, Q4_K, Q5_K: scale and min per group, both rounded relative to a super-scale; then the codes anew."""
    spec = GGML_SPECS[name]
    second, size, top = spec.scale.second, spec.grouping.cols, (1 << spec.bits) - 1
    bits = second.bits if second else 0
    x = columns_of(rows, size)
    if importance is None:
        magnitude = x.abs()
        weights = magnitude if name == "Q2_K" else magnitude + square_root(kquants.total(x * x) / size)
        found = kquants.search_affine(x, weights, top, _PLAIN[name].candidates(), absolute=name == "Q2_K")
        scales, mins = (_rounded_levels(part.view(-1, SUPER // size), bits) for part in found[:2])
    else:
        weights = columns_of(importance_weights(rows, importance, SUPER, 1 if name == "Q2_K" else 2), size)
        found = kquants.search_affine(x, weights, top, _WEIGHTED.candidates(), absolute=False)
        sums = kquants.total(weights).view(-1, SUPER // size)
        scales, mins = (_searched_levels(part.view(-1, SUPER // size), sums, bits) for part in found[:2])
    step = scales.steps()
    codes = ((x + mins.steps()) / step).round_().clamp_(0, top)
    codes = torch.where(step == 0, found.codes, codes)
    return {
        "codes": packed_codes(codes.t(), len(rows), spec.bits),
        "scales": packed_codes(scales.integers, len(rows), bits),
        "super_scales": scales.supers.view(-1),
        "zeros": packed_codes(mins.integers, len(rows), bits),
        "super_zeros": -mins.supers.view(-1),
    }


def _rounded_levels(levels: Tensor, bits: int) -> _Levels:
    """Relative to the greatest."""
    limit = (1 << bits) - 1
    maximum = levels.amax(1, keepdim=True).clamp(min=0) + 0.0  # -0 becomes 0
    inverse = kquants.ratio(limit, maximum)
    return _Levels((inverse * levels).round().clamp(0, limit), (maximum / limit).half())


def _searched_levels(levels: Tensor, weights: Tensor, bits: int) -> _Levels:
    found = kquants.search_positive(levels.t().contiguous(), weights.t().contiguous(), (1 << bits) - 1)
    return _Levels(found.codes.t(), found.scale.half().unsqueeze(1))


def without_mins(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """Q3_K, Q6_K: a signed scale per group."""
    spec = GGML_SPECS[name]
    second, levels = spec.scale.second, 1 << spec.bits - 1
    bits = second.bits if second else 0
    x = columns_of(rows, 16)
    found, scales, empty = _fitted(name, x, rows, importance, bits)
    step = scales.steps()
    codes = (x / step).round_().clamp_(-levels, levels - 1)
    codes = torch.where(step == 0, found.codes, codes)
    if name == "Q6_K":
        codes = torch.where(empty.repeat_interleave(16), -levels, codes)
    stored = packed_codes(scales.integers, len(rows), bits)
    return {
        "codes": packed_codes(codes.t(), len(rows), spec.bits),
        "scales": stored.view(torch.int8) if bits == 8 else stored,
        "super_scales": scales.supers.view(-1),
    }


def _fitted(
    name: str, x: Tensor, rows: Tensor, importance: Tensor | None, bits: int
) -> tuple[kquants.Linear, _Levels, Tensor]:
    """Scales and codes of groups, integers for the scales, and which blocks are empty."""
    lowest = -(1 << bits - 1)
    if name == "Q3_K" and importance is not None:
        weights = columns_of(importance_weights(rows, importance, SUPER, 2), 16)
        found = kquants.search_linear(x, 4, weights)
        sums = kquants.total(weights).view(-1, 16).t().contiguous()
        outer = kquants.search_linear(found.scale.view(-1, 16).t().contiguous(), -lowest, sums)
        return found, _Levels(outer.codes.t(), outer.scale.half().unsqueeze(1)), outer.scale == 0
    if name == "Q3_K":
        found = kquants.descend_linear(x, 4)
    else:
        found = kquants.search_linear(x, 32, None if importance is None else _repeated(importance, rows, 16))
    blocks = found.scale.view(-1, 16)
    extreme, magnitude = kquants.largest(blocks.t())
    # An empty block is all zero bytes, and in Q3_K's scales these stand for the lowest.
    empty = magnitude == 0 if name == "Q3_K" else magnitude < 1e-15
    # The scale of the greatest magnitude becomes the lowest integer.
    inverse = kquants.ratio(lowest, extreme).masked_fill(empty, 0).unsqueeze(1)
    scales = (inverse * blocks).round().clamp(lowest, -lowest - 1)
    if name == "Q3_K":
        scales = torch.where(empty.unsqueeze(1), lowest, scales)
    return found, _Levels(scales, kquants.ratio(1, inverse).half()), empty


def _repeated(importance: Tensor, rows: Tensor, size: int) -> Tensor:
    return columns_of(importance.expand(rows.shape), size)


def nonlinear(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """IQ4_NL, IQ4_XS: 16 uneven steps; IQ4_XS rounds the scales of eight groups to 6 bits."""
    table = torch.tensor(IQ4_NL, device=rows.device)
    x = columns_of(rows, 32)
    span = 32 if name == "IQ4_NL" else SUPER
    weights = None if importance is None else columns_of(importance_weights(rows, importance, span, 2), 32)
    scale = kquants.search_table(x, table, tries=7, weights=weights)
    require_finite(name, scale)
    parts: Parts = {"table": table}
    if name == "IQ4_NL":
        parts["scales"] = scale.half()
        steps = scale
    else:
        blocks = scale.view(-1, 8)
        supers = -kquants.largest(blocks.t())[0].unsqueeze(1) / 32
        scales = (kquants.ratio(1, supers) * blocks).round().clamp(-32, 31)
        parts |= {"scales": packed_codes(scales, len(rows), 6), "super_scales": supers.half().view(-1)}
        steps = (supers * scales).reshape(-1)
    codes = kquants.nearest_entry(x * kquants.ratio(1, steps), table)
    return parts | {"codes": packed_codes(codes.t(), len(rows), 4)}
