"""Statistics of the inputs of a block's units, over all batches and processes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.algorithms.statistics import Collector, Statistics
from lowbit.calibration.distributed import LEAVES, TreeSum, owner_of, share, share_tensor
from lowbit.calibration.units import Unit

Key = Hashable


def input_groups(stages: Sequence[Sequence[Unit]]) -> dict[Key, list[Unit]]:
    """The units with the same inputs: all linear layers of a stage, and of experts the parts of each.

    Linear layers that nothing is known of may differ in their numbers of inputs, and then are apart.
    """
    groups: dict[Key, list[Unit]] = {}
    for number, stage in enumerate(stages):
        for unit in stage:
            linear = f"linear {number} of {unit.shape[1]}"
            key: Key = linear if unit.expert is None else (unit.module, unit.parameter, unit.expert)
            groups.setdefault(key, []).append(unit)
    return groups


@dataclass
class Leaf:
    """The sums of one run of batches, by group of units."""

    needs: frozenset[str]
    collectors: dict[Key, Collector] = field(default_factory=dict)

    def add(self, key: Key, inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Count the inputs of a group."""
        self.collectors.setdefault(key, Collector(self.needs)).add(inputs, dense_inputs)

    def check(self, key: Key) -> None:
        """Wait for what was added to a group; see :meth:`Collector.check`."""
        if key in self.collectors:
            self.collectors[key].check()


def combine(
    leaves: Iterator[tuple[int, Leaf]], keys: Iterable[Key], needs: frozenset[str], device: torch.device
) -> dict[Key, Statistics]:
    """Add the runs up, those of other processes too.

    Args:
        leaves: this process's, each with its number, in order; made one at a time where there is one process.
        keys: of all groups, in the same order in every process.
        needs: the statistics that were collected.
        device: where the sums are.
    """
    groups = list(keys)
    sums = {(key, name): TreeSum() for key in groups for name in sorted(needs)}
    tokens = dict.fromkeys(groups, 0)
    mine: dict[int, Leaf] = {}
    own = iter(leaves)
    for number in range(LEAVES):
        source = owner_of(number)
        while number not in mine and (found := next(own, None)) is not None:
            mine[found[0]] = found[1]
            if found[0] >= number:
                break
        leaf = mine.pop(number, None)
        collectors = [leaf.collectors.get(key) if leaf else None for key in groups]
        counts = share([collector.tokens if collector else 0 for collector in collectors], source)
        for key, collector, count in zip(groups, collectors, counts, strict=True):
            tokens[key] += count
            for name in sorted(needs):
                # Sums are given away, so that no more of them are alive than the tree needs; an expert without tokens
                # has none, and nothing needs to be said of them.
                sums[key, name].push(share_tensor(_taken(collector, name), source, device) if count else None)
    return {key: _mean(tokens[key], {name: sums[key, name].total() for name in sorted(needs)}) for key in groups}


def _taken(collector: Collector | None, name: str) -> Tensor | None:
    return collector.sums.pop(name, None) if collector else None


def _mean(tokens: int, sums: dict[str, Tensor | None]) -> Statistics:
    means = {name: total.div_(max(1, tokens)) for name, total in sums.items() if total is not None}
    return Statistics(tokens, **means)


def widen(statistics: dict[Key, Statistics], in_features: dict[Key, int]) -> dict[Key, tuple[Statistics, str | None]]:
    """Give experts that saw few tokens a part in what all experts of their layer saw.

    An expert with fewer tokens than inputs has a Hessian that doesn't determine its weights. Its means are mixed with
    those over all experts, as if so many of their tokens had come to it that there are as many as inputs.

    Returns:
        By group: the statistics to use, and what was done, None for nothing.
    """
    pools: dict[Key, list[Key]] = {}
    for key in statistics:
        if isinstance(key, tuple):
            pools.setdefault(key[:2], []).append(key)
    result: dict[Key, tuple[Statistics, str | None]] = {key: (own, None) for key, own in statistics.items()}
    for members in pools.values():
        total = sum(statistics[key].tokens for key in members)
        few = [key for key in members if statistics[key].tokens < in_features[key]]
        if not few or total == 0:
            continue
        pool = _pooled([statistics[key] for key in members], total)
        for key in few:
            own = statistics[key]
            lent = min(in_features[key] - own.tokens, total)
            note = f"the expert saw {own.tokens} tokens: {lent} as all experts of the layer saw were lent to it"
            result[key] = (_pooled([own, pool], own.tokens + lent, [own.tokens, lent]), note)
    return result


def _pooled(parts: Sequence[Statistics], total: int, weights: Sequence[int] | None = None) -> Statistics:
    counts = [part.tokens for part in parts] if weights is None else weights
    made: dict[str, Tensor] = {}
    for name in ("hessian", "squares", "magnitudes"):
        found = [(getattr(part, name), count) for part, count in zip(parts, counts, strict=True)]
        present = [value * (count / total) for value, count in found if value is not None and count]
        if present:
            made[name] = torch.stack(present).sum(0) if len(present) < 3 else sum(present[1:], present[0])
    return Statistics(total, **made)


def without_deviation(statistics: Statistics) -> Statistics:
    """As if the inputs were those of the dense model: of an expert nobody knows, for there it sees other tokens."""
    if statistics.hessian is None or statistics.deviation is not None:
        return statistics
    return replace(statistics, deviation=statistics.hessian.new_zeros(()).expand_as(statistics.hessian))
