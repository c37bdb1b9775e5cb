"""Bits per weight against perplexity, drawn with matplotlib (``pip install lowbit[plot]``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.bench.demo import Row
from lowbit.errors import PlanError

SUFFIXES = (".png", ".svg", ".pdf")
_LINEAR = 0.1  # changes of the perplexity up to here are drawn to a linear scale
_OFFSET = {"textcoords": "offset points"}
# In points: from a point to its label, from a label to the next, and between points whose labels would collide.
_GAP, _LINE, _NEAR = 14, 12, 60


def check_plot_file(file: Path) -> None:
    """Find out before any work whether a plot can be written to `file`.

    Raises:
        PlanError: unknown suffix, missing folder, or matplotlib is not installed.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise PlanError(f"a plot is written as {', '.join(SUFFIXES)}, not as '{file.name}'")
    if not file.absolute().parent.is_dir():
        raise PlanError(f"there is no folder {file.absolute().parent} to write the plot to")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlanError("plotting needs matplotlib: pip install 'lowbit[plot]'")


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw each row but the first as a labelled point; the first, the dense model, is the line at the bottom.

    The scale is logarithmic in the distance from the dense model's perplexity, since 8 bits cost hundredths and 2 bits
    hundreds.

    Raises:
        PlanError: see :func:`check_plot_file`.
    """
    check_plot_file(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    dense, *quantized = rows
    for number, (family, members) in enumerate(_families(quantized).items()):
        points = [row.bits_per_weight for row in members], [row.change for row in members]
        axes.scatter(*points, s=45, marker="osD^v"[number % 5], label=family, zorder=3)
    _scale(axes, dense, quantized)
    axes.set_xlabel("bits per weight, scales and zeros included")
    axes.set_ylabel("perplexity (logarithmic above the dense model's)")
    axes.legend(loc="upper right", frameon=False)
    figure.draw_without_rendering()  # places the axes, which the labels need to know
    _label(axes, quantized)
    figure.savefig(file, dpi=150)


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the first word of their method, the format."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.method.split()[0], []).append(row)
    return families


def _scale(axes: Any, dense: Row, rows: Sequence[Row]) -> None:
    """Limits, and ticks that say the perplexity where the axis measures its change."""
    largest = max([row.change for row in rows] + [1.0])
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.set_ylim(min([row.change for row in rows] + [0.0]) - _LINEAR / 3, 2 * largest)
    axes.set_xlim(min(row.bits_per_weight for row in rows) - 0.5, max(row.bits_per_weight for row in rows) + 2)
    ticks = [0.0, *(tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000) if tick < 2 * largest)]
    axes.set_yticks(ticks, [f"{dense.perplexity + tick:.{1 if tick >= 1 else 2}f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.92")
    axes.axhline(0, color="0.5", linewidth=1, linestyle="--")
    axes.annotate(dense.method, (0, 0), xycoords=axes.get_yaxis_transform(), xytext=(6, 4), **_OFFSET, color="0.4")


def _label(axes: Any, rows: Sequence[Row]) -> None:
    """Write each method beside its point, left of it where another is close on the right; stack what is close."""
    scale = 72 / axes.figure.dpi  # points per pixel
    points = [axes.transData.transform((row.bits_per_weight, row.change)) * scale for row in rows]
    stacks: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for (x, y), twins in sorted(_merged(points, rows), key=lambda place: place[0][1]):
        left = any(0 < other_x - x < _NEAR and abs(other_y - y) < _NEAR for other_x, other_y in points)
        floors = [top + _LINE for other_x, top in stacks[left] if abs(other_x - x) < 2 * _NEAR]
        height = max([y, *floors])
        stacks[left].append((x, height))
        axes.annotate(
            ", ".join(row.method for row in twins),
            (twins[0].bits_per_weight, twins[0].change),
            xytext=(-_GAP if left else _GAP, height - y),
            **_OFFSET,
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.7, "shrinkB": 4, "relpos": (left, 0.5)},
        )


def _merged(points: Sequence[Any], rows: Sequence[Row]) -> list[tuple[tuple[float, float], list[Row]]]:
    """Points with all the rows that can't be told apart there."""
    merged: dict[tuple[int, int], tuple[tuple[float, float], list[Row]]] = {}
    for (x, y), row in zip(points, rows, strict=True):
        merged.setdefault((round(x), round(y)), ((x, y), []))[1].append(row)
    return list(merged.values())
