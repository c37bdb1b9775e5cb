"""The figures that a layer can have, each with its name, its scale and how it is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lowbit.bench.report.contents import Layer, Report
from lowbit.bench.report.markup import bits, duration, number, percent
from lowbit.bench.report.record import LayerRecord

STEPS: Final = 9  # of the colour scale
# Between the ends of a colour scale: a ratio, or a difference where it isn't logarithmic, which are bits.
_LEAST_RATIO: Final = 2.0
_LEAST_DIFFERENCE: Final = 1.0


@dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
        key: in the page's data.
        title: for people.
        short: the head of a column.
        help: what it is.
        of: a layer's value; None where it isn't known.
        write: a value as text.
        logarithmic: whether ratios and not differences matter.
    """

    key: str
    title: str
    short: str
    help: str
    of: Callable[[Layer], float | None]
    write: Callable[[float], str]
    logarithmic: bool = False


def _recorded(name: str) -> Callable[[Layer], float | None]:
    def of(layer: Layer) -> float | None:
        value = getattr(layer.record or _NOTHING, name)
        return None if value is None else float(value)

    return of


_NOTHING: Final = LayerRecord("")

OUTPUT: Final = Metric(
    "output",
    "Output error",
    "Output error",
    "Squared error of the layer's output over the calibration tokens, relative to the output",
    _recorded("output_error"),
    percent,
    logarithmic=True,
)
WEIGHT: Final = Metric(
    "weight",
    "Weight error",
    "Weight error",
    "Squared error of the weights, relative to the weights",
    lambda layer: layer.weight_error,
    percent,
    logarithmic=True,
)
BITS: Final = Metric(
    "bits",
    "Bits per weight",
    "Bits",
    "Stored bits per weight; scales, zero points, codebooks and indices count",
    lambda layer: layer.bits,
    bits,
)
OUTLIER: Final = Metric(
    "outlier",
    "Largest weight over RMS",
    "Max / RMS",
    "The largest absolute weight over the root mean square of all",
    lambda layer: layer.max_over_rms,
    number,
    logarithmic=True,
)
KURTOSIS: Final = Metric(
    "kurtosis",
    "Kurtosis of the weights",
    "Kurtosis",
    "How heavy the tails of the weights are; 3 for a normal distribution",
    lambda layer: layer.kurtosis,
    number,
    logarithmic=True,
)
_OTHERS: Final = (
    Metric(
        "input",
        "Input error",
        "Input error",
        "Squared error that the layers before leave in this layer's inputs, relative to the inputs",
        _recorded("input_error"),
        percent,
        logarithmic=True,
    ),
    Metric(
        "activation",
        "Largest activation over RMS",
        "Act. max / RMS",
        "The largest absolute input over the root mean square of all, over the calibration tokens",
        _recorded("input_max_over_rms"),
        number,
        logarithmic=True,
    ),
    Metric(
        "activation-kurtosis",
        "Kurtosis of the activations",
        "Act. kurtosis",
        "How heavy the tails of the layer's inputs are; 3 for a normal distribution",
        _recorded("input_kurtosis"),
        number,
        logarithmic=True,
    ),
)
# Only in the table.
_COLUMNS: Final = (
    Metric(
        "tokens", "Tokens", "Tokens", "Calibration tokens that the layer saw", _recorded("tokens"), "{:,.0f}".format
    ),
    Metric(
        "damp", "Damping", "Damping", "Added to the Hessian's diagonal, relative to its mean", _recorded("damp"), number
    ),
    Metric("seconds", "Time", "Time", "Quantizing the layer took", _recorded("seconds"), duration),
)


def plotted(report: Report) -> list[Metric]:
    """The figures that this report knows, the most telling first."""
    return _known(report, (OUTPUT, WEIGHT, BITS, OUTLIER, KURTOSIS, *_OTHERS))


def columns(report: Report) -> list[Metric]:
    """The figures of the table, from left to right."""
    return _known(report, (BITS, WEIGHT, OUTPUT, *_OTHERS[:1], OUTLIER, KURTOSIS, *_OTHERS[1:], *_COLUMNS))


def main_error(report: Report) -> Metric | None:
    """The error that says most: of outputs where most layers have it, else of weights; None without either."""
    for metric in (OUTPUT, WEIGHT):
        if 2 * len(values(metric, report.layers)) >= max(1, len(report.layers)):
            return metric
    return None


def values(metric: Metric, layers: Iterable[Layer]) -> list[float]:
    """What is known of the layers."""
    found = (metric.of(layer) for layer in layers)
    return [value for value in found if value is not None and math.isfinite(value)]


def _known(report: Report, metrics: Sequence[Metric]) -> list[Metric]:
    return [metric for metric in metrics if values(metric, report.layers)]


@dataclass(frozen=True)
class Scale:
    """Values to steps of colour or to positions, between the smallest and the largest that there is.

    Attributes:
        low, high: the ends; on a logarithmic scale the smallest positive value is the lower end.
    """

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, found: Sequence[float], logarithmic: bool) -> Scale:
        """The scale of some values; a logarithmic one leaves the smallest out where they are thousands of times less.

        Without that, one layer that lost nothing (8 bits among 2) would leave a single colour to all others.
        """
        if not logarithmic:
            return cls(min(found), max(found), logarithmic)
        positive = [value for value in found if value > 0] or [1.0]
        high, middle = max(positive), statistics.median(positive)
        return cls(max(min(positive), min(high, middle) / 1000), high, logarithmic)

    def widened(self) -> Scale:
        """A scale on which layers that hardly differ have colours that hardly differ."""
        if self.logarithmic:
            factor = max(1.0, math.sqrt(_LEAST_RATIO * self.low / self.high))
            return Scale(self.low / factor, self.high * factor, logarithmic=True)
        margin = max(0.0, (_LEAST_DIFFERENCE - (self.high - self.low)) / 2)
        return Scale(self.low - margin, self.high + margin, logarithmic=False)

    def position(self, value: float) -> float:
        """0 at the lower end, 1 at the upper, clipped."""
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            span = math.log(self.high / self.low)
            place = math.log(max(value, self.low) / self.low) / span
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def step(self, value: float) -> int:
        """The number of the colour."""
        return min(STEPS - 1, int(self.position(value) * STEPS))

    def value(self, position: float) -> float:
        """The value at a position."""
        if self.logarithmic:
            return self.low * (self.high / self.low) ** position
        return self.low + position * (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers between the ends, about two to six."""
        return _decades(self.low, self.high) if self.logarithmic else _evenly(self.low, self.high)


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) >= 3:
            return found[:: -(-len(found) // 6)]
    return _evenly(low, high)


def _evenly(low: float, high: float) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
