"""What an algorithm is, and the ordered list of those that need no calibration."""

from __future__ import annotations

import abc
import functools
from typing import ClassVar

from torch import Tensor

from lowbit.algorithms.statistics import Statistics
from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import PlanError


class Algorithm(abc.ABC):
    """Maps a dense weight to a quantized one.

    Attributes:
        name: how plans and commands call it.
        needs: what it wants to know of the layer's inputs, by the names of the attributes of
            :class:`~lowbit.algorithms.statistics.Statistics`; empty where the weight is enough.
    """

    name: ClassVar[str]
    needs: frozenset[str] = frozenset()

    @abc.abstractmethod
    def supports(self, spec: QuantSpec) -> bool:
        """Whether this algorithm can produce `spec`."""

    @abc.abstractmethod
    def quantize(self, weight: Tensor, spec: QuantSpec) -> QuantTensor:
        """Quantize ``weight [out, in]`` (floating point, any device) to `spec`, knowing nothing of its inputs."""

    def calibrated(self, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantTensor:
        """The same, knowing the statistics of its inputs that it :attr:`needs`."""
        del statistics
        return self.quantize(weight, spec)


@functools.cache
def _registered() -> list[Algorithm]:
    from lowbit.algorithms.blockwise import BlockwiseTable
    from lowbit.algorithms.ggml import GgmlBlocks
    from lowbit.algorithms.hqq import HalfQuadratic
    from lowbit.algorithms.minmax import MinMax
    from lowbit.algorithms.rows import Int8Rows
    from lowbit.algorithms.rtn import RoundToNearest

    return [BlockwiseTable(), Int8Rows(), HalfQuadratic(), RoundToNearest(), MinMax(), GgmlBlocks()]


def register_algorithm(algorithm: Algorithm) -> None:
    """Put an algorithm before all others; the first that supports a spec is used."""
    _registered().insert(0, algorithm)


def find_algorithm(spec: QuantSpec) -> Algorithm:
    """The first registered algorithm that supports `spec`.

    Raises:
        PlanError: none does.
    """
    for algorithm in _registered():
        if algorithm.supports(spec):
            return algorithm
    tried = ", ".join(algorithm.name for algorithm in _registered())
    raise PlanError(f"no algorithm without calibration produces '{spec}' (tried {tried})")


def quantize(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """Quantize ``weight [out, in]`` with the algorithm that `spec` calls for."""
    return find_algorithm(spec).quantize(weight, spec)
