"""What a calibrated algorithm says of its own work on one weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.algorithms.statistics import Statistics
from lowbit.core import QuantTensor


@dataclass(frozen=True)
class LayerReport:
    """How well one weight was quantized, and what had to be done for it.

    Attributes:
        damp: what was added to the Hessian's diagonal, as a fraction of its mean; 0 where no Hessian was used.
        attempts: how many times the Hessian was factorized, each time with more damping.
        fallback: whether the weight was rounded to nearest instead, because there was no usable Hessian.
        weight_error: ``|W - Q|² / |W|²``.
        output_error: ``tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ)``: the squared error of the outputs on the calibration
            tokens over their square. With GPTAQ's correction W is the corrected target in the numerator: what remains
            is what other codes could still lower. Without a Hessian, the weight error.
        notes: what somebody should read, in sentences without a full stop.
    """

    damp: float
    attempts: int
    fallback: bool
    weight_error: float
    output_error: float
    notes: tuple[str, ...] = ()


def measured(weight: Tensor, tensor: QuantTensor, statistics: Statistics) -> LayerReport:
    """The errors of a weight ``fp32 [out, in]`` that an algorithm made which doesn't report any."""
    difference = weight - tensor.to(str(weight.device)).dequantize()
    relative = float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    output = relative
    if statistics.hessian is not None:
        whole = float(quadratic(weight, statistics.hessian))
        output = float(quadratic(difference, statistics.hessian)) / max(1e-30, whole)
    elif (importance := statistics.importance()) is not None:
        output = float((difference.square() @ importance).sum() / (weight.square() @ importance).sum().clamp(min=1e-30))
    return LayerReport(0.0, 0, False, relative, output)


def quadratic(weight: Tensor, hessian: Tensor) -> Tensor:
    """``tr(W H Wᵀ)`` of ``weight [out, in]`` and ``hessian [in, in]``."""
    return ((weight @ hessian) * weight).sum()
