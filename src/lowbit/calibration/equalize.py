"""Scaling the channels of a block before its weights are rounded, so that rounding costs its outputs least (AWQ)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.algorithms.awq import ActivationAware, ScaleSearch, search_scales
from lowbit.algorithms.statistics import Statistics
from lowbit.calibration.matrices import Matrix, matrices
from lowbit.calibration.pairs import Pair, apply_scales
from lowbit.core import QuantSpec


@dataclass(frozen=True)
class Equalized:
    """What was done with one pair.

    Attributes:
        pair: which.
        before: the mean squared output error of its targets, rounded as they were.
        after: of them scaled.
        ratio: the exponent that was chosen; 0 where nothing was scaled.
        note: why nothing was tried, or None.
    """

    pair: Pair
    before: float = 0.0
    after: float = 0.0
    ratio: float = 0.0
    note: str | None = None


@torch.no_grad()
def equalize_block(
    block: nn.Module,
    pairs: Sequence[Pair],
    statistics: MutableMapping[str, Statistics],
    specs: Mapping[str, QuantSpec],
    *,
    grid: int = 20,
    symmetric: bool = False,
) -> list[Equalized]:
    """Search scales for every pair of a block and apply them in place.

    What the block computes stays the same but for the rounding of scaled weights to their own dtype.

    Args:
        block: with its dense weights.
        pairs: from :func:`lowbit.calibration.pairs.find_pairs`.
        statistics: of the inputs of matrices, by the names of :func:`lowbit.calibration.matrices.matrices`, with
            Hessians and magnitudes; those of all targets are replaced by what they are behind the scaled channels.
        specs: what the matrices will be quantized to; a target without one stays dense and has no error.
        grid: see :func:`lowbit.algorithms.awq.search_scales`.
        symmetric: whether rounding keeps zero points in the middle of the range.

    Returns:
        One entry per pair, in their order.
    """
    report = []
    for pair in pairs:
        known = matrices(block)
        searched = _search(pair, known, statistics, specs, grid, symmetric)
        if isinstance(searched, str):
            report.append(Equalized(pair, note=searched))
            continue
        if searched.ratio or searched.duo:
            apply_scales(block, pair, searched.scales)
            for target in pair.targets:
                if target in statistics:
                    statistics[target] = scaled_statistics(statistics[target], searched.scales)
        report.append(Equalized(pair, searched.before, searched.after, searched.ratio))
    return report


def scaled_statistics(statistics: Statistics, scales: Tensor) -> Statistics:
    """What the statistics of inputs x become where they are ``x / s``, with ``s [in]`` positive."""

    def divided(value: Tensor | None, by: Tensor) -> Tensor | None:
        return None if value is None else value / by.to(value.device)

    outer = scales[:, None] * scales
    return replace(
        statistics,
        hessian=divided(statistics.hessian, outer),
        deviation=divided(statistics.deviation, outer),
        squares=divided(statistics.squares, scales.square()),
        magnitudes=divided(statistics.magnitudes, scales),
    )


def _search(
    pair: Pair,
    known: Mapping[str, Matrix],
    statistics: Mapping[str, Statistics],
    specs: Mapping[str, QuantSpec],
    grid: int,
    symmetric: bool,
) -> ScaleSearch | str:
    rounding = ActivationAware(symmetric)
    wanted = [name for name in pair.targets if name in specs and rounding.supports(specs[name])]
    if not wanted:
        return "no target is quantized to integers in groups along its inputs"
    seen = {name: statistics[name] for name in wanted if name in statistics and statistics[name].tokens}
    usable = {name: found for name, found in seen.items() if found.hessian is not None}
    # Experts see different tokens: what most tokens meet counts most.
    tokens = sum(found.tokens for found in usable.values())
    magnitudes = [
        found.magnitudes * (found.tokens / tokens) for found in usable.values() if found.magnitudes is not None
    ]
    if not usable or len(magnitudes) != len(usable):
        return "its targets saw no tokens"
    return search_scales(
        [known[name].weight for name in usable],
        [specs[name] for name in usable],
        [found.hessian for found in usable.values() if found.hessian is not None],
        torch.stack(magnitudes).sum(0),
        grid=grid,
        symmetric=symmetric,
        tie=pair.tie,
        parts=[found.tokens / tokens for found in usable.values()],
    )
