"""ggml's quantizers, with an importance matrix and without one: the bits of llama.cpp's reference code on CPUs.

The plain types spread each block's range over the codes, and search scales where importance is known; the K types and
IQ4 always search (:mod:`lowbit.algorithms.ggml_searched`), as IQ1, IQ2 and IQ3 do (:mod:`lowbit.algorithms.lattices`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from lowbit.algorithms import kquants
from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.ggml_parts import SUPER, Parts, blocks_of, packed_codes, require_finite
from lowbit.algorithms.ggml_searched import nonlinear, search_ranges, search_scales, with_mins, without_mins
from lowbit.algorithms.lattices import make_lattice
from lowbit.algorithms.statistics import SQUARES, Statistics
from lowbit.algorithms.ternary import make_ternary
from lowbit.core import FloatCode, QuantSpec, QuantTensor
from lowbit.core.ggml import GGML_SPECS, ggml_type_of
from lowbit.core.tables import E2M1, SIGN
from lowbit.errors import PlanError

_CHUNK: Final = 1 << 19  # weights quantized at once: what a search keeps of them fits a processor's cache
_CHUNK_GPU: Final = 1 << 23


class GgmlBlocks(Algorithm):
    """What llama.cpp makes of a weight, for each type as its spec says.

    Calibrated, its importance matrix is ``statistics.importance()``. The search is that of ``ggml_quantize_chunk``.
    """

    name: ClassVar[str] = "ggml"
    needs = frozenset({SQUARES})

    def supports(self, spec: QuantSpec) -> bool:
        return ggml_type_of(spec) in MAKERS

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """See :meth:`Algorithm.quantize`.

        Raises:
            PlanError: no quantizer for the spec, or none without importance; rows that aren't whole blocks; values that
                the type can't hold.
        """
        return self._quantize(weight, spec, None)

    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        """See :meth:`Algorithm.calibrated`; without importance the same as :meth:`quantize`.

        Raises:
            PlanError: as :meth:`quantize`, or an importance of another length, with negative numbers, or not finite.
        """
        importance = statistics.importance()
        if importance is not None:
            importance = checked_importance(importance, weight)
        return self._quantize(weight, spec, importance)

    def _quantize(self, weight: Tensor, spec: QuantSpec, importance: Tensor | None) -> QuantTensor:
        name, maker = maker_for(spec, weight)
        if importance is None and maker.calibrated:
            raise PlanError(
                f"{name} can't be made of the weight alone: llama.cpp and lowbit want the importance of its inputs "
                "(an importance matrix); calibrate, or choose IQ2_S, IQ3_XXS, IQ3_S or a K type"
            )
        tensors = made_in_chunks(name, spec, weight, importance)
        return QuantTensor(spec, tensors, (weight.shape[0], weight.shape[1])).validate()


def rows_at_once(weight: Tensor) -> int:
    """How many rows of a weight are made at a time."""
    return max(1, (_CHUNK_GPU if weight.is_cuda else _CHUNK) // weight.shape[1])


def made_in_chunks(name: str, spec: QuantSpec, weight: Tensor, importance: Tensor | None) -> Parts:
    """The tensors of ``weight [out, in]``, a few rows at a time."""
    maker = MAKERS[name]
    made = [_made(name, maker, rows.float(), importance) for rows in weight.split(rows_at_once(weight))]
    layout = spec.tensors((weight.shape[0], weight.shape[1]))
    parts = {key: torch.cat([part[key] for part in made]).view(layout[key][0]) for key in made[0] if key != "table"}
    return parts | {key: made[0][key] for key in ("table",) if key in made[0]}


def checked_importance(importance: Tensor, weight: Tensor) -> Tensor:
    """``fp32 [in]`` beside the weight; all zeros, which say nothing, become ones.

    Raises:
        PlanError: another shape, negative numbers, or not finite.
    """
    numbers = importance.detach().to(weight.device, torch.float32)
    if tuple(numbers.shape) != (weight.shape[1],):
        raise PlanError(f"importance of shape {list(numbers.shape)} for a weight with {weight.shape[1]} columns")
    if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
        raise PlanError("importance is a mean of squares: finite, and not negative")
    return numbers if bool((numbers > 0).any()) else torch.ones_like(numbers)


class Maker(NamedTuple):
    """Weights per block, what makes the tensors of ``fp32 [rows, in]`` and ``fp32 [in]``, if it can't do without."""

    elements: int
    make: Callable[[str, Tensor, Tensor | None], Parts]
    calibrated: bool = False


def maker_for(spec: QuantSpec, weight: Tensor) -> tuple[str, Maker]:
    """The type of a spec and what makes it.

    Raises:
        PlanError: there is none, or the weight is empty or has rows that aren't whole blocks.
    """
    name = ggml_type_of(spec)
    maker = MAKERS.get(name or "")
    if name is None or maker is None:
        raise PlanError(f"ggml's quantizers make {', '.join(MAKERS)}; not '{spec}'")
    if 0 in weight.shape:
        raise PlanError(f"a weight of shape {list(weight.shape)} holds nothing to quantize")
    if weight.shape[1] % maker.elements:
        raise PlanError(f"{name} has blocks of {maker.elements} weights; a row of {weight.shape[1]} isn't a multiple")
    return name, maker


def _made(name: str, maker: Maker, rows: Tensor, importance: Tensor | None) -> Parts:
    if maker.elements > 1:
        require_finite(name, rows.abs().amax())
    parts = maker.make(name, rows, importance)
    for key, numbers in parts.items():
        if key != "codes" and numbers.is_floating_point():
            require_finite(name, numbers)
    return parts


def _alone(make: Callable[[str, Tensor], Parts]) -> Callable[[str, Tensor, Tensor | None], Parts]:
    """Of a type that llama.cpp makes without regard to importance."""
    return lambda name, rows, importance: make(name, rows)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not a number that could be multiplied with."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, 0)


def _half_away(x: Tensor) -> Tensor:
    """Round to nearest, halves away from zero."""
    magnitude = x.abs()
    whole = magnitude.floor()
    return (whole + (2 * (magnitude - whole)).floor()) * x.sign()


def _signed(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """Q4_0, Q5_0: the value of the greatest magnitude becomes the lowest code, or a scale is searched."""
    bits = GGML_SPECS[name].bits
    if importance is not None:
        found = search_scales(rows, 32, bits, importance)
        return {"codes": packed_codes(found.codes.t(), len(rows), bits), "scales": found.scale.half()}
    half = 1 << bits - 1
    blocks = blocks_of(rows, 32)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -half
    codes = (blocks * _reciprocal(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1) - half
    return {"codes": packed_codes(codes, len(rows), bits), "scales": scale.half()}


def _ranged(name: str, rows: Tensor, importance: Tensor | None) -> Parts:
    """Q4_1, Q5_1: from the minimum to the maximum, or as searched."""
    bits = GGML_SPECS[name].bits
    if importance is not None:
        found = search_ranges(rows, 32, bits, importance)
        codes = packed_codes(found.codes.t(), len(rows), bits)
        return {"codes": codes, "scales": found.scale.half(), "zeros": (-found.minimum).half()}
    blocks = blocks_of(rows, 32)
    low = blocks.amin(1, keepdim=True)
    scale = (blocks.amax(1, keepdim=True) - low) / ((1 << bits) - 1)
    codes = ((blocks - low) * _reciprocal(scale) + 0.5).trunc().clamp(0, (1 << bits) - 1)
    return {"codes": packed_codes(codes, len(rows), bits), "scales": scale.half(), "zeros": low.half()}


def _bytes(name: str, rows: Tensor) -> Parts:
    """Q8_0."""
    del name
    blocks = blocks_of(rows, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = _half_away(blocks * _reciprocal(scale)).to(torch.int8)
    return {"codes": codes.reshape(rows.shape), "scales": scale.half()}


def _mxfp4(name: str, rows: Tensor) -> Parts:
    """The power of two that brings the largest value into 4 to 8, then the nearest number."""
    del name
    blocks = blocks_of(rows, 32)
    magnitude = blocks.abs().amax(1, keepdim=True)
    # The logarithm is rounded to fp32 before it is rounded down, as in C: just below a power of two that matters.
    exponent = magnitude.double().log2().float().floor() + 125
    exponent = torch.where(magnitude > 0, exponent, 0).clamp(0, 254).to(torch.uint8)
    return _nearest_e2m1(blocks, exponent.view(torch.float8_e8m0fnu), len(rows))


def _nvfp4(name: str, rows: Tensor) -> Parts:
    """The scale in E4M3 that brings the largest value to 6, then the nearest number."""
    del name
    blocks = blocks_of(rows, 16)
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
    return {"codes": packed_codes(errors.argmin(2), rows, 4), "scales": scale, "table": table}


def _sign(name: str, rows: Tensor) -> Parts:
    """Q1_0: the mean of the magnitudes, and a sign."""
    del name
    blocks = blocks_of(rows, 128)
    scale = kquants.total(blocks.abs().t().contiguous()) / 128
    table = torch.tensor(SIGN, device=rows.device)
    return {"codes": packed_codes(blocks >= 0, len(rows), 1), "scales": scale.half(), "table": table}


def _ternary(name: str, rows: Tensor) -> Parts:
    """TQ1_0, TQ2_0: the nearest of -1, 0, 1 times the absolute maximum; stored as 0, 1, 2."""
    blocks = blocks_of(rows, SUPER)
    scale = blocks.abs().amax(1, keepdim=True)
    require_finite(name, scale.half())
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
    "Q8_0": Maker(32, _alone(_bytes)),
    "Q2_K": Maker(SUPER, with_mins),
    "Q3_K": Maker(SUPER, without_mins),
    "Q4_K": Maker(SUPER, with_mins),
    "Q5_K": Maker(SUPER, with_mins),
    "Q6_K": Maker(SUPER, without_mins),
    "IQ4_NL": Maker(32, nonlinear),
    "IQ4_XS": Maker(SUPER, nonlinear),
    "IQ1_S": Maker(SUPER, make_ternary, calibrated=True),
    "IQ1_M": Maker(SUPER, make_ternary),
    "IQ2_XXS": Maker(SUPER, make_lattice, calibrated=True),
    "IQ2_XS": Maker(SUPER, make_lattice, calibrated=True),
    "IQ2_S": Maker(SUPER, make_lattice),
    "IQ3_XXS": Maker(SUPER, make_lattice),
    "IQ3_S": Maker(SUPER, make_lattice),
    "TQ1_0": Maker(SUPER, _alone(_ternary)),
    "TQ2_0": Maker(SUPER, _alone(_ternary)),
    "MXFP4": Maker(32, _alone(_mxfp4)),
    "NVFP4": Maker(64, _alone(_nvfp4)),
    "Q1_0": Maker(128, _alone(_sign)),
    "F32": Maker(1, _alone(_cast)),
    "F16": Maker(1, _alone(_cast)),
    "BF16": Maker(1, _alone(_cast)),
}
