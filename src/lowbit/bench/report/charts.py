"""The plots, as SVG whose colours are the page's: classes ``h0`` to ``h8`` are the steps of the colour scale.

Every mark has a ``<title>``, which browsers show without any script and screen readers read.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lowbit.bench.report.contents import Layer, Measured
from lowbit.bench.report.figures import FIGURES, Figure
from lowbit.bench.report.markup import Child, Markup, bits, brief, join, number, shortened, tag
from lowbit.bench.report.metrics import OUTLIER, STEPS, Metric, Scale, values

WIDTH: Final = 440  # of a plot in half the page's width; text is 11 units high
_LABEL: Final = 27  # characters of a row's label
_CELL_HEIGHT: Final = 24
_CELL_WIDTHS: Final = (11, 160)  # pixels, from and to
_NARROW: Final = 250  # pixels that a telephone has for the cells
_TICK_WIDTH: Final = 25
_PAD: Final = 0.025  # of a plot, that no mark lies on its edge


@dataclass(frozen=True)
class Frame:
    """The inside of a plot: positions from 0 to 1 become units of the drawing."""

    left: float = 56
    top: float = 12
    right: float = WIDTH - 14
    bottom: float = 236

    def x(self, position: float) -> float:
        return self.left + (_PAD + (1 - 2 * _PAD) * position) * (self.right - self.left)

    def y(self, position: float) -> float:
        return self.bottom - (_PAD + (1 - 2 * _PAD) * position) * (self.bottom - self.top)


def _units(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _svg(label: str, width: float, height: float, *children: Child, class_: str = "plot") -> Markup:
    box = f"0 0 {_units(width)} {_units(height)}"
    return tag("svg", *children, class_=class_, viewBox=box, role="img", aria_label=label)


def _text(x: float, y: float, text: str, class_: str = "") -> Markup:
    return tag("text", text, x=_units(x), y=_units(y), class_=class_ or None)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=_units(x1), y1=_units(y1), x2=_units(x2), y2=_units(y2), class_=class_)


def _dot(x: float, y: float, title: str, class_: str = "dot", radius: float = 3.5) -> Markup:
    return tag("circle", tag("title", title), cx=_units(x), cy=_units(y), r=_units(radius), class_=class_)


def _grid_x(frame: Frame, scale: Scale, write: Callable[[float], str], title: str) -> Markup:
    ticks = [(frame.x(scale.position(tick)), brief(write(tick))) for tick in scale.ticks()]
    lines = [_line(x, frame.top, x, frame.bottom, "grid") for x, _ in ticks]
    labels = [_text(x, frame.bottom + 15, text, "tick mid") for x, text in ticks]
    return join(lines, labels, _text(frame.x(0.5), frame.bottom + 32, title, "axis mid"))


def _grid_y(frame: Frame, scale: Scale, write: Callable[[float], str]) -> Markup:
    ticks = [(frame.y(scale.position(tick)), brief(write(tick))) for tick in scale.ticks()]
    lines = [_line(frame.left, y, frame.right, y, "grid") for y, _ in ticks]
    return join(lines, [_text(frame.left - 6, y + 4, text, "tick end") for y, text in ticks])


# -------------------------------------------------------------------------------------------------------------- heatmap


@dataclass(frozen=True)
class Cell:
    """All layers of one kind in one block: one, or its experts."""

    row: int
    column: int
    layers: tuple[Layer, ...]

    def value(self, metric: Metric) -> float | None:
        """The mean over the layers."""
        found = values(metric, self.layers)
        return statistics.fmean(found) if found else None

    @property
    def name(self) -> str:
        first = self.layers[0]
        if len(self.layers) == 1:
            return shortened(first.name)
        return (
            f"{shortened(f'{first.place.stack}.{first.place.block}.{first.place.path}')} ({len(self.layers)} experts)"
        )

    def text(self, metric: Metric) -> str:
        """The value, and the worst of several."""
        found = values(metric, self.layers)
        if not found:
            return ""
        mean = metric.write(statistics.fmean(found))
        return mean if len(found) == 1 else f"{mean} on average, {metric.write(max(found))} at most"


@dataclass(frozen=True)
class Heatmap:
    """The cells, and the labels of their rows: kinds; columns are blocks."""

    cells: tuple[Cell, ...]
    rows: tuple[str, ...]
    columns: int

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> Heatmap:
        """The cells of all layers that are in blocks."""
        grouped: dict[tuple[str, str], dict[int, list[Layer]]] = defaultdict(lambda: defaultdict(list))
        for layer in layers:
            if layer.place.block is not None:
                grouped[layer.place.stack, layer.place.path][layer.place.block].append(layer)
        stacks = {stack for stack, _ in grouped}
        labels = []
        cells = []
        for row, ((stack, _), blocks) in enumerate(grouped.items()):
            kind = next(iter(blocks.values()))[0].place.kind
            labels.append(shortened(kind if len(stacks) == 1 else f"{stack.split('.')[0]} {kind}", _LABEL))
            cells += [Cell(row, block, tuple(found)) for block, found in sorted(blocks.items())]
        return cls(tuple(cells), tuple(labels), 1 + max((cell.column for cell in cells), default=-1))

    @property
    def dense_enough(self) -> bool:
        """Whether the numbers of the blocks can be columns: a file may call a block 99999."""
        return 0 < self.columns <= max(64, 4 * len({cell.column for cell in self.cells}))

    def scale(self, metric: Metric) -> Scale:
        found = [value for cell in self.cells if (value := cell.value(metric)) is not None]
        return Scale.over(found, metric.logarithmic).widened()

    def steps(self, metric: Metric) -> list[int | None]:
        """The colour of each cell; None where the value isn't known."""
        scale = self.scale(metric)
        return [None if (value := cell.value(metric)) is None else scale.step(value) for cell in self.cells]


def heatmap_labels(heatmap: Heatmap) -> Markup:
    """The names of the rows, which stay while the cells scroll."""
    width = 14 + 6.6 * max(map(len, heatmap.rows))
    texts = [
        _text(width - 8, row * _CELL_HEIGHT + _CELL_HEIGHT / 2 + 4, label, "end label")
        for row, label in enumerate(heatmap.rows)
    ]
    height = len(heatmap.rows) * _CELL_HEIGHT + 22
    box = f"0 0 {_units(width)} {height}"
    return tag("svg", *texts, class_="heat-labels", viewBox=box, width=_units(width), height=height, aria_hidden="true")


def heatmap_cells(heatmap: Heatmap, metric: Metric) -> Markup:
    """The cells, coloured by a metric; as wide as there is room, between what :func:`heatmap_style` allows."""
    share = 100 / heatmap.columns
    rectangles = [
        tag(
            "rect",
            tag("title", f"{cell.name}: {cell.text(metric) or 'not known'}"),
            x=f"{cell.column * share:.3f}%",
            y=cell.row * _CELL_HEIGHT,
            width=f"{share:.3f}%",
            height=_CELL_HEIGHT,
            class_="h-" if step is None else f"h{step}",
        )
        for cell, step in zip(heatmap.cells, heatmap.steps(metric), strict=True)
    ]
    bottom = len(heatmap.rows) * _CELL_HEIGHT
    narrowest = max(_CELL_WIDTHS[0], _NARROW / heatmap.columns)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**6) if step * narrowest >= _TICK_WIDTH)
    ticks = [
        tag("text", str(block), x=f"{(block + 0.5) * share:.3f}%", y=bottom + 15, class_="tick mid")
        for block in range(0, heatmap.columns, every)
    ]
    label = f"{metric.title} by block (columns) and kind of layer (rows); the table below has the same figures"
    return tag("svg", rectangles, ticks, id="heat", class_="heat", height=bottom + 22, role="img", aria_label=label)


def heatmap_style(heatmap: Heatmap) -> str:
    """CSS that lets the map shrink to what can still be pointed at, and grow to what doesn't look empty."""
    least, most = (heatmap.columns * width for width in _CELL_WIDTHS)
    return f"@media screen {{ #heat {{ min-width: {least}px; max-width: {most}px; }} }}\n"


# ---------------------------------------------------------------------------------------------------------------- plots


def by_kind(layers: Sequence[Layer], metric: Metric) -> Markup:
    """One row for each kind: every layer a dot, and the median."""
    rows: dict[str, list[tuple[float, Layer]]] = defaultdict(list)
    for layer in layers:
        value = metric.of(layer)
        if value is not None and layer.place.block is not None:
            rows[layer.place.kind].append((value, layer))
    scale = Scale.over([value for found in rows.values() for value, _ in found], metric.logarithmic)
    height = 26
    labels = {kind: shortened(kind, 24) for kind in rows}
    left = 16 + 6.6 * max(map(len, labels.values()))
    frame = Frame(left=left, bottom=12 + height * len(rows))
    marks: list[Markup] = []
    for number_of_row, (kind, found) in enumerate(rows.items()):
        middle = frame.top + (number_of_row + 0.5) * height
        median = statistics.median(value for value, _ in found)
        marks.append(_text(left - 8, middle + 4, labels[kind], "end label"))
        marks.append(_line(left, middle, frame.right, middle, "grid"))
        few = _spread(found)
        marks += [
            _dot(frame.x(scale.position(value)), middle, f"{shortened(layer.name)}: {metric.write(value)}")
            for value, layer in few
        ]
        place = frame.x(scale.position(median))
        title = f"{shortened(kind)}: median {metric.write(median)}"
        marks.append(
            tag(
                "rect",
                tag("title", title),
                x=_units(place - 1.5),
                y=_units(middle - 9),
                width=3,
                height=18,
                class_="median",
            )
        )
    axis = _grid_x(frame, scale, metric.write, metric.title)
    return _svg(f"{metric.title} of every layer by kind", WIDTH, frame.bottom + 40, axis, *marks)


_DOTS: Final = 160  # of one row or plot


def _spread(found: Sequence[tuple[float, Layer]]) -> Sequence[tuple[float, Layer]]:
    """Of very many, the extremes and every n-th between them."""
    if len(found) <= _DOTS:
        return found
    ordered = sorted(found, key=lambda entry: entry[0])
    return [*ordered[:: -(-len(ordered) // _DOTS)], ordered[-1]]


def by_depth(layers: Sequence[Layer], metric: Metric, written: dict[int, float] | None = None) -> Markup:
    """Along the blocks: the median of the layers between the least and the largest, and the error of whole blocks.

    Args:
        written: the output errors of blocks, where the run has them.
    """
    blocks: dict[int, list[float]] = defaultdict(list)
    for layer in layers:
        value = metric.of(layer)
        if value is not None and layer.place.block is not None:
            blocks[layer.place.block].append(value)
    numbers = sorted(blocks)
    whole = {block: value for block, value in (written or {}).items() if block in blocks}
    everything = [value for found in blocks.values() for value in found]
    scale = Scale.over([*everything, *whole.values()], metric.logarithmic)
    frame = Frame()
    first, last = numbers[0], max(numbers[-1], numbers[0] + 1)

    def x(block: int) -> float:
        return frame.x((block - first) / (last - first))

    def y(value: float) -> float:
        return frame.y(scale.position(value))

    upper = [f"{_units(x(block))},{_units(y(max(blocks[block])))}" for block in numbers]
    lower = [f"{_units(x(block))},{_units(y(min(blocks[block])))}" for block in reversed(numbers)]
    medians = {block: statistics.median(blocks[block]) for block in numbers}
    path = " ".join(f"{_units(x(block))},{_units(y(value))}" for block, value in medians.items())
    marks = [tag("polygon", points=" ".join(upper + lower), class_="band"), tag("polyline", points=path, class_="line")]
    for block, value in medians.items():
        rest = f"{metric.write(min(blocks[block]))} to {metric.write(max(blocks[block]))}"
        marks.append(_dot(x(block), y(value), f"Block {block}: median {metric.write(value)}, {rest}", radius=3))
    for block, value in whole.items():
        marks.append(_dot(x(block), y(value), f"Block {block} as a whole: {metric.write(value)}", "ring", radius=4))
    ticks = Scale(first, last, logarithmic=False)
    labels = [
        _text(x(round(tick)), frame.bottom + 15, str(round(tick)), "tick mid")
        for tick in ticks.ticks()
        if tick == round(tick)
    ]
    axes = join(
        _grid_y(frame, scale, metric.write), labels, _text(frame.x(0.5), frame.bottom + 32, "Block", "axis mid")
    )
    return _svg(f"{metric.title} along the blocks", WIDTH, frame.bottom + 40, axes, *marks)


def outliers(layers: Sequence[Layer], metric: Metric) -> Markup:
    """Each layer's largest weight against its error."""
    found = [(value, layer) for layer in layers if (value := metric.of(layer)) is not None and layer.max_over_rms > 0]
    across = Scale.over([layer.max_over_rms for _, layer in found], logarithmic=True)
    up = Scale.over([value for value, _ in found], metric.logarithmic)
    frame = Frame()
    marks = [
        _dot(
            frame.x(across.position(layer.max_over_rms)),
            frame.y(up.position(value)),
            f"{shortened(layer.name)}: {metric.write(value)}, largest weight {number(layer.max_over_rms)} × RMS",
        )
        for value, layer in _spread(found)
    ]
    return _svg(
        f"{metric.title} against the largest weight of each layer",
        WIDTH,
        frame.bottom + 40,
        _grid_y(frame, up, metric.write),
        _grid_x(frame, across, number, OUTLIER.title),
        *marks,
    )


# Few enough to be read, each on the side where no other point is.
_LABELLED: Final = {
    "GGUF Q8_0": "left",
    "GGUF Q5_K_M": "right",
    "GGUF Q3_K_M": "left",
    "GGUF Q2_K": "left",
    "round-to-nearest, 2 bits": "right",
}
_LEAST, _MOST = 0.01, 1000.0  # percent; what is drawn of how perplexity grows


def perplexity(size: float, measured: Measured | None) -> Markup:
    """How perplexity grows with fewer bits: other methods where they were measured, and this checkpoint.

    Args:
        size: bits per weight of this checkpoint's blocks.
    """
    across = Scale(min(2.0, size), max(9.0, size), logarithmic=False)
    up = Scale(_LEAST, _MOST, logarithmic=True)
    frame = Frame(left=62)
    growth = measured.growth if measured else None
    here = frame.x(across.position(size)), frame.y(1 if growth is None else up.position(max(growth, _LEAST)))
    others = []
    for figure in FIGURES:
        x, y = frame.x(across.position(figure.bits)), frame.y(up.position(figure.growth))
        others.append(_dot(x, y, _figure_title(figure), "other"))
        side = _LABELLED.get(figure.title)
        if side and not _collides(x, y, here):
            is_left = side == "left"
            text = figure.title.removeprefix("GGUF ")
            others.append(_text(x - 7 if is_left else x + 7, y + 4, text, "tick end" if is_left else "tick"))
    axes = join(
        _grid_y(frame, up, lambda value: f"+{number(value, 1)} %"),
        _grid_x(frame, across, number, "Bits per weight of the blocks' linear layers"),
    )
    label = "Growth of perplexity against bits per weight"
    return _svg(label, WIDTH, frame.bottom + 40, axes, others, _here(frame, here, size, growth))


def _here(frame: Frame, here: tuple[float, float], size: float, growth: float | None) -> Markup:
    """This checkpoint: a point, or where its perplexity isn't known, a line at its bits."""
    x, y = here
    is_right = x > frame.x(0.6)
    anchor = " end" if is_right else ""
    line = _line(x, y, x, frame.bottom, "here-line")
    place = x - 10 if is_right else x + 10
    if growth is None:
        return join(line, _text(place, y + 10, f"this checkpoint: {bits(size)} bits", f"here-text{anchor}"))
    title = f"This checkpoint: {growth_text(growth)} at {bits(size)} bits per weight"
    text = _text(place, y - 8, f"this checkpoint {growth_text(growth)}", f"here-text{anchor}")
    return join(line, _dot(x, y, title, "here", radius=6), text)


def _collides(x: float, y: float, here: tuple[float, float]) -> bool:
    """Whether a label at a point would meet this checkpoint's."""
    return abs(x - here[0]) < 150 and -16 < y - here[1] < 24


def growth_text(growth: float) -> str:
    """A growth in percent, with its sign."""
    return f"{'−' if growth < 0 else '+'}{number(abs(growth))} %"


def _figure_title(figure: Figure) -> str:
    return f"{figure.title}: {growth_text(figure.growth)} at {bits(figure.bits)} bits per weight (on another model)"


# ----------------------------------------------------------------------------------------------------------------- bars


def shares(parts: Sequence[tuple[str, float, str]]) -> Markup:
    """One bar of which each part is a share.

    Args:
        parts: title, size, and the size as text.
    """
    total = sum(part for _, part, _ in parts) or 1.0
    start, marks = 0.0, []
    for place, (title, part, text) in enumerate(parts):
        width = 1000 * part / total
        label = f"{title}: {text}, {number(100 * part / total)} %"
        marks.append(
            tag(
                "rect",
                tag("title", label),
                x=_units(start),
                y=0,
                width=f"{max(width - 2, 0.5):.2f}",
                height=22,
                class_=f"s{place % 8}",
            )
        )
        start += width
    listed = ", ".join(f"{title} {text}" for title, _, text in parts)
    box = "0 0 1000 22"
    return tag("svg", *marks, class_="shares", viewBox=box, preserveAspectRatio="none", role="img", aria_label=listed)


def legend(scale: Scale, write: Callable[[float], str]) -> Markup:
    """The colour scale with the values at its ends and in the middle."""
    steps = [tag("rect", x=step * 16, y=0, width=15, height=10, class_=f"h{step}") for step in range(STEPS)]
    bar = tag("svg", *steps, class_="legend-bar", viewBox="0 0 144 10", width=144, height=10, aria_hidden="true")
    low, high = legend_ends(scale, write)
    return join(tag("span", low, id="legend-low"), bar, tag("span", high, id="legend-high"))


def legend_ends(scale: Scale, write: Callable[[float], str]) -> tuple[str, str]:
    """The values at the ends of the colour scale."""
    return write(scale.low), write(scale.high)
