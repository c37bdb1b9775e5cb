"""What stands out in a report, in sentences."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

from lowbit.bench.report.contents import Layer, Report
from lowbit.bench.report.markup import bits, brief, number, percent, shortened, size
from lowbit.bench.report.metrics import Metric, main_error, values

_FAR: Final = 2.0  # times the median: what is that far from the others is worth a sentence
_HEAVY: Final = 30.0  # largest weight over RMS: of a million normal numbers the largest is 5
_LARGE_REST: Final = 0.25  # of the file
_HIGH: Final = 0.05  # relative squared error, 13 dB; where 3 bits rounded to nearest are


def insights(report: Report) -> list[str]:
    """The sentences, the most important first; none where nothing is known but bits that are all the same."""
    return list(_sentences(report))


def _sentences(report: Report) -> Iterator[str]:
    metric = main_error(report)
    if metric is not None:
        yield from _worst_layer(report.layers, metric)
        yield from _worst_kind(report.layers, metric)
    yield from _widths(report.layers)
    yield from _outlier(report.layers)
    yield from _rest(report)
    noted = sum(bool(layer.record and layer.record.notes) for layer in report.layers)
    if noted:
        yield f"The run has notes on {noted} {'layer' if noted == 1 else 'layers'}; the table has them."


def _worst_layer(layers: tuple[Layer, ...], metric: Metric) -> Iterator[str]:
    known = [(value, layer) for layer in layers if (value := metric.of(layer)) is not None]
    worst, layer = max(known, key=lambda entry: entry[0])
    median = statistics.median(value for value, _ in known)
    if median > 0 and worst > _FAR * median:
        yield (
            f"{shortened(layer.name)} has the largest {metric.title.lower()}: {metric.write(worst)}, "
            f"{number(worst / median)} times the median of {metric.write(median)}."
        )
    elif median > 0:
        title = metric.title.lower()
        yield (
            f"The layers are even: the {title} is {metric.write(median)} in the median and nowhere above "
            f"{metric.write(worst)}."
        )
    above = sum(value > _HIGH for value, _ in known)
    if above and above < len(known):
        yield f"The {metric.title.lower()} of {above} of {len(known)} layers is above {brief(percent(_HIGH))}."


def _worst_kind(layers: tuple[Layer, ...], metric: Metric) -> Iterator[str]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for layer in layers:
        if layer.place.block is not None:
            kinds[layer.place.kind] += values(metric, [layer])
    medians = {kind: statistics.median(found) for kind, found in kinds.items() if found}
    if len(medians) < 2:
        return
    worst, best = max(medians, key=lambda kind: medians[kind]), min(medians, key=lambda kind: medians[kind])
    if medians[worst] > 1.25 * medians[best]:
        yield (
            f"{shortened(worst)} loses most: {metric.write(medians[worst])} in the median; "
            f"{shortened(best)} least, {metric.write(medians[best])}."
        )


def _widths(layers: tuple[Layer, ...]) -> Iterator[str]:
    specs = Counter(layer.spec for layer in layers)
    if len(specs) > 1:
        least, most = min(layer.bits for layer in layers), max(layer.bits for layer in layers)
        yield f"The weights are stored in {len(specs)} ways, from {bits(least)} to {bits(most)} bits per weight."


def _outlier(layers: tuple[Layer, ...]) -> Iterator[str]:
    layer = max(layers, key=lambda layer: layer.max_over_rms)
    if layer.max_over_rms > _HEAVY:
        yield (
            f"{shortened(layer.name)} has a weight {number(layer.max_over_rms)} times the root mean square: "
            "it stretches the steps of its whole group."
        )


def _rest(report: Report) -> Iterator[str]:
    rest = sum(kept.stored_bytes for kept in report.kept)
    share = rest / report.file_bytes if report.file_bytes else 0.0
    if share > _LARGE_REST:
        largest = max(report.kept, key=lambda kept: kept.stored_bytes)
        yield (
            f"What stays dense takes {percent(share)} of the file, {size(rest)}; the largest of it is "
            f"{shortened(largest.name)}, {size(largest.stored_bytes)}."
        )
