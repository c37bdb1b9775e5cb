"""Where the learning of roundings starts (SignRound, arXiv:2309.05516)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from torch import Tensor

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.report import LayerReport, measured
from lowbit.algorithms.statistics import Statistics
from lowbit.core import QuantSpec, QuantTensor

_FINE: Final = 4  # bits


class SignRoundStart(Algorithm):
    """GPTQ's codes with GPTAQ's correction from 4 bits on, the nearest codes below.

    On coarse grids GPTQ moves weights by much of a step, and learning that starts there ends in worse places than from
    the weights themselves; on fine ones it starts nearer to the goal (docs/quality.md has figures). Scales are searched
    in both cases.

    Args:
        damp_percent: see :class:`Gptq`.
        symmetric: see :class:`Gptq`.
    """

    name: ClassVar[str] = "signround-start"

    def __init__(self, damp_percent: float = 0.01, symmetric: bool = False) -> None:
        self._gptq = Gptq(damp_percent=damp_percent, symmetric=symmetric, correction=True)
        self.needs = self._gptq.needs

    def supports(self, spec: QuantSpec) -> bool:
        return self._gptq.supports(spec)

    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        return self._gptq.quantize(weight, spec)

    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        return self.calibrated_many([weight], [spec], statistics)[0][0]

    def calibrated_many(
        self, weights: Sequence[Tensor], specs: Sequence[QuantSpec], statistics: Statistics
    ) -> list[tuple[QuantTensor, LayerReport]]:
        """Several weights with the same inputs; see :meth:`Gptq.calibrated_many`."""
        if all(spec.bits >= _FINE for spec in specs):
            return self._gptq.calibrated_many(weights, specs, statistics)
        return [self._alone(weight, spec, statistics) for weight, spec in zip(weights, specs, strict=True)]

    def _alone(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> tuple[QuantTensor, LayerReport]:
        if spec.bits >= _FINE:
            return self._gptq.calibrated_with_report(weight, spec, statistics)
        nearest = self._gptq.quantize(weight, spec)
        return nearest, measured(weight, nearest, statistics)
