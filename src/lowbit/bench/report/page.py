"""The page: one HTML file that needs nothing beside it, nor a script to be read."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, Final

import lowbit
from lowbit.bench.report import charts
from lowbit.bench.report.charts import Heatmap
from lowbit.bench.report.contents import Layer, Measured, Report
from lowbit.bench.report.figures import MEASURED_ON
from lowbit.bench.report.insights import insights
from lowbit.bench.report.markup import (
    Markup,
    bits,
    decibel,
    duration,
    join,
    number,
    percent,
    shortened,
    size,
    tag,
)
from lowbit.bench.report.metrics import OUTLIER, WEIGHT, Metric, Scale, columns, main_error, plotted, values

_ROWS: Final = 1500  # of the table; beyond these, the experts of a block share one
_KEPT_ROWS: Final = 300
_NOTES: Final = 100
_SHOWN: Final = 4  # names in a sentence


def render(report: Report) -> str:
    """The report as one HTML file in UTF-8.

    It loads nothing from anywhere, which its own content security policy enforces: the browser runs the one script and
    the one style sheet whose hashes it names. Whatever stands in the checkpoint is escaped.
    """
    heatmap = Heatmap.of(report.layers)
    style, script = _asset("page.css") + charts.heatmap_style(heatmap), _asset("page.js")
    title = f"{shortened(report.name)} · lowbit report"
    allowed = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    rows = _table_rows(report.layers)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    sections = (
        _tiles(report),
        _where_the_bytes_are(report),
        _stands_out(report),
        _heatmap(report, heatmap),
        _plots(report),
        _table(report, rows),
        _kept(report),
        _run(report),
        _definitions(report),
    )
    body = tag(
        "body",
        tag("a", "Skip to the layers", href="#layers", class_="skip"),
        _header(report),
        tag("main", *sections),
        tag("footer", f"Made by lowbit {lowbit.__version__}. This file is complete: it loads nothing."),
        tag("div", id="tip", role="status", aria_live="polite", hidden=True),
        tag("script", _data(report, heatmap, rows), type="application/json", id="data"),
        tag("script", Markup(script)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _card(title: str, *children: Any, note: str = "", id: str | None = None, class_: str = "card") -> Markup:
    heading = tag("h2", title)
    below = tag("p", note, class_="note") if note else None
    return tag("section", heading, below, *children, class_=class_, id=id, aria_label=title)


# ------------------------------------------------------------------------------------------------------------- headline


def _header(report: Report) -> Markup:
    method = report.record.method if report.record and report.record.method else ""
    chips = [("format", report.format), ("method", method), *report.model.items()]
    parameters = ("parameters", _millions(report.parameters))
    shown = [
        tag("li", tag("span", title), shortened(text, 60))
        for title, text in [*chips[:3], parameters, *chips[3:]]
        if text
    ]
    heading = tag("div", tag("p", "lowbit report", class_="brand"), tag("h1", shortened(report.name)))
    button = tag("button", "Dark", id="theme", type="button", hidden=True, title="Light or dark")
    return tag("header", tag("div", heading, button, class_="bar"), tag("ul", *shown, class_="chips"))


def _millions(count: int) -> str:
    for unit, power in (("T", 12), ("B", 9), ("M", 6), ("K", 3)):
        if count >= 10**power:
            return f"{number(count / 10**power)}{unit}"
    return str(count)


def _tile(title: str, value: str, *rest: str) -> Markup:
    lines = [tag("p", line, class_="rest") for line in rest if line]
    return tag("li", tag("p", title, class_="what"), tag("p", value, class_="value"), *lines)


def _tiles(report: Report) -> Markup:
    everything = _mean_bits(report.layers)
    inside = [layer for layer in report.layers if layer.place.block is not None]
    over_all = 8 * report.file_bytes / report.parameters if report.parameters else 0.0
    blocks = f"{bits(_mean_bits(inside))} in the blocks" if 0 < len(inside) < len(report.layers) else ""
    ratio = report.before / report.file_bytes if report.file_bytes else 0.0
    smaller = f"{number(ratio)} times smaller" if ratio >= 1 else ""
    where = f"({shortened(report.reference, 40)})" if report.reference else "with all weights in 16 bits"
    tiles = [
        _tile("Bits per weight", bits(everything), blocks, f"{bits(over_all)} over the whole file"),
        _tile("Size", size(report.file_bytes), smaller, f"{size(report.before)} before {where}"),
        *_measured_tiles(report.measured),
        *_error_tiles(report),
    ]
    return tag("section", tag("ul", *tiles, class_="tiles"), aria_label="At a glance")


def _measured_tiles(measured: Measured | None) -> list[Markup]:
    if measured is None:
        return []
    windows = f"{measured.windows} {'window' if measured.windows == 1 else 'windows'} of {measured.seq_len} tokens"
    text = f"{shortened(measured.text, 40)}, {windows}"
    growth = measured.growth
    grown = "" if growth is None else f"{charts.growth_text(growth)} over {number(measured.reference or 0, 4)}"
    tiles = [_tile("Perplexity", number(measured.perplexity, 4), grown, text)]
    if measured.kl is not None:
        spread = "" if measured.kl_error is None else f"± {number(measured.kl_error, 2)} nats per token"
        same = "" if measured.agreement is None else f"same first choice for {percent(measured.agreement)}"
        tiles.append(_tile("KL divergence", number(measured.kl), spread or "nats per token", same))
    return tiles


def _error_tiles(report: Report) -> list[Markup]:
    metric = main_error(report)
    if metric is None:
        return []
    known = [(value, layer.count) for layer in report.layers if (value := metric.of(layer)) is not None]
    mean = sum(value * count for value, count in known) / sum(count for _, count in known)
    spread = f"{metric.write(min(known)[0])} to {metric.write(max(known)[0])} by layer"
    return [_tile(metric.title, metric.write(mean), f"{decibel(mean)}, mean over the weights", spread)]


def _mean_bits(layers: Sequence[Layer]) -> float:
    count = sum(layer.count for layer in layers)
    return 8 * sum(layer.stored_bytes for layer in layers) / count if count else 0.0


def _where_the_bytes_are(report: Report) -> Markup:
    found: dict[str, float] = defaultdict(float)
    for layer in report.layers:
        found[shortened(layer.place.kind if layer.place.block is not None else layer.name, 40)] += layer.stored_bytes
    for kept in report.kept:
        large = kept.stored_bytes > report.file_bytes / 20
        found[f"{shortened(kept.name.removesuffix('.weight'), 40)}, dense" if large else "other dense"] += (
            kept.stored_bytes
        )
    first = sorted(found, key=lambda title: -found[title])
    titles = [title for title in first if title != "other dense"]
    parts = {title: found[title] for title in titles[:7]}
    rest = sum(found[title] for title in first if title not in parts)
    header = max(0.0, report.file_bytes - sum(found.values()))
    if rest + header:
        parts["everything else"] = rest + header
    listed = [(title, part, size(part)) for title, part in parts.items()]
    items = [
        tag("li", tag("i", class_=f"s{place % 8}"), tag("span", title), tag("b", text))
        for place, (title, _, text) in enumerate(listed)
    ]
    return _card("Where the bytes are", charts.shares(listed), tag("ul", *items, class_="keys"))


def _stands_out(report: Report) -> Markup | None:
    sentences = [*insights(report), *_caveats(report)]
    return _card("What stands out", tag("ul", *[tag("li", text) for text in sentences])) if sentences else None


def _caveats(report: Report) -> list[str]:
    """What a reader has to know before he trusts the figures."""
    found = []
    if main_error(report) is None and not report.reference:
        found.append("What it has cost each layer isn't known: --reference DENSE_FOLDER compares the weights.")
    if not report.comparable:
        found.append(
            f"The norms differ from those of {shortened(report.reference)}: scales were moved between layers or "
            "weights rotated, so that single weights can't be compared with the reference's. No errors from those."
        )
    if report.missing:
        names = ", ".join(shortened(name, 60) for name in report.missing[:_SHOWN])
        more = f" and {len(report.missing) - _SHOWN} more" if len(report.missing) > _SHOWN else ""
        found.append(f"The reference has no weight of its own for {names}{more}; no errors for these.")
    strangers = set(report.record.layers) - {layer.name for layer in report.layers} if report.record else set()
    if strangers:
        found.append(f"The run's record names {len(strangers)} layers that the checkpoint doesn't have quantized.")
    return found


# ---------------------------------------------------------------------------------------------------------------- plots


def _heatmap(report: Report, heatmap: Heatmap) -> Markup | None:
    if not heatmap.cells or not heatmap.dense_enough:
        return None
    metrics = plotted(report)
    first = metrics[0]
    buttons = [
        tag(
            "button",
            metric.title,
            type="button",
            data_metric=str(place),
            aria_pressed="true" if place == 0 else "false",
            title=metric.help,
        )
        for place, metric in enumerate(metrics)
    ]
    switch = tag("div", *buttons, class_="switch", role="group", aria_label="What the colours show", hidden=True)
    key = tag("p", charts.legend(heatmap.scale(first), first.write), class_="legend")
    cells = tag(
        "div",
        charts.heatmap_cells(heatmap, first),
        class_="scroll",
        id="heat-scroll",
        tabindex="0",
        role="group",
        aria_label="Map of all layers; arrow keys move, Enter goes to the layer's row",
    )
    note = "Blocks from left to right, kinds of layers from top to bottom."
    if any(len(cell.layers) > 1 for cell in heatmap.cells):
        note += " The experts of a block share a cell, which has the colour of their mean."
    shown = tag("div", charts.heatmap_labels(heatmap), cells, class_="heat-frame")
    title = tag("span", first.title, id="heat-title")
    return _card("Block by block", switch, tag("p", title, class_="now"), shown, key, note=note, id="blocks")


def _plots(report: Report) -> Markup:
    metric = main_error(report) or OUTLIER
    inside = [layer for layer in report.layers if layer.place.block is not None and metric.of(layer) is not None]
    cards = []
    if inside:
        whole = {block.block: block.output_error for block in report.blocks if block.output_error is not None}
        known = {block: value for block, value in whole.items() if metric is not OUTLIER}
        ring = " Rings are the error of the block as a whole." if known else ""
        cards += [
            _card(
                f"{metric.title} by kind",
                charts.by_kind(inside, metric),
                note="A dot for each layer, a bar for the median.",
            ),
            _card(
                f"{metric.title} along the blocks",
                charts.by_depth(inside, metric, known),
                note=f"The median of each block, and the range from its best to its worst layer.{ring}",
            ),
        ]
    if main_error(report) is not None:
        note = f"Large weights stretch the steps of a group, and with them its error.{_whose_weights(report)}"
        cards.append(_card("Outliers", charts.outliers(report.layers, metric), note=note))
    cards.append(_growth(report))
    return tag("div", *cards, class_="pair")


def _whose_weights(report: Report) -> str:
    return "" if report.reference and report.comparable else " Taken from the quantized weights."


def _growth(report: Report) -> Markup:
    inside = [layer for layer in report.layers if layer.place.block is not None] or list(report.layers)
    measured, here = report.measured, _mean_bits(inside)
    own = (
        f"This checkpoint: {shortened(measured.text, 40)}, {measured.windows} windows of {measured.seq_len} tokens."
        if measured and measured.growth is not None
        else "What this checkpoint costs was not measured: --text with --reference does."
    )
    note = f"How much perplexity grows. {own} Grey: methods as measured on {MEASURED_ON}; larger models lose less."
    return _card("Perplexity against size", charts.perplexity(here, measured), note=note)


# ---------------------------------------------------------------------------------------------------------------- table

Row = tuple[Layer, ...]


def _table_rows(layers: Sequence[Layer]) -> list[Row]:
    """A row for each layer; of very many, one for all experts of a kind in a block."""
    if len(layers) <= _ROWS:
        return [(layer,) for layer in layers]
    grouped: dict[tuple[Any, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        place = layer.place
        grouped[(place.stack, place.block, place.path)].append(layer)
    return [tuple(group) for group in grouped.values()]


def _row_name(row: Row) -> str:
    first = row[0]
    if len(row) == 1:
        return shortened(first.name)
    return f"{shortened(f'{first.place.stack}.{first.place.block}.{first.place.path}')} ({len(row)} experts)"


def _table(report: Report, rows: Sequence[Row]) -> Markup:
    metrics = columns(report)
    specs = {layer.spec for layer in report.layers}
    notes = any(layer.record and layer.record.notes for layer in report.layers)
    heads = [("Layer", "The name of the module"), ("Shape", "Rows (outputs) and columns (inputs)")]
    heads += [("Stored as", "What the numbers mean")] if len(specs) > 1 else []
    heads += [(metric.short, metric.help) for metric in metrics]
    heads += [("Notes", "What the run says")] if notes else []
    numbers = range(len(heads) - len(metrics) - notes, len(heads) - notes)
    head = tag(
        "tr",
        *[
            tag("th", title, scope="col", title=text, class_="num" if place in numbers else None)
            for place, (title, text) in enumerate(heads)
        ],
    )
    scales = {metric.key: Scale.over(values(metric, report.layers), metric.logarithmic).widened() for metric in metrics}
    body = [_table_row(place, row, metrics, scales, len(specs) > 1, notes) for place, row in enumerate(rows)]
    table = tag("table", tag("thead", head), tag("tbody", *body), id="table")
    tools = tag(
        "div",
        tag("label", "Filter ", tag("input", id="filter", type="search", placeholder="down_proj, layers.3 …")),
        tag("span", f"{len(rows)} rows", id="shown", aria_live="polite"),
        tag("button", "Save as CSV", id="csv", type="button"),
        class_="tools",
        hidden=True,
    )
    note = f"All are {shortened(next(iter(specs)))}." if len(specs) == 1 else ""
    if len(rows) < len(report.layers):
        note += " The experts of a block share a row, with the mean of their figures."
    frame = tag("div", table, class_="scroll table", tabindex="0", role="region", aria_label="Table of the layers")
    return _card("Layers", tools, frame, note=note.strip(), id="layers")


def _table_row(
    place: int, row: Row, metrics: Sequence[Metric], scales: Mapping[str, Scale], with_spec: bool, with_notes: bool
) -> Markup:
    first = row[0]
    cells = [
        tag("th", _row_name(row), scope="row"),
        tag("td", " × ".join(f"{part}" for part in first.shape), data_v=first.count),
    ]
    cells += [tag("td", shortened(", ".join(sorted({layer.spec for layer in row}))))] if with_spec else []
    for metric in metrics:
        found = values(metric, row)
        if found:
            mean = math.fsum(found) / len(found)
            shade = f"num h{scales[metric.key].step(mean)}"
            cells.append(tag("td", metric.write(mean), class_=shade, data_v=f"{mean:.6g}"))
        else:
            cells.append(tag("td", "–", class_="num"))
    if with_notes:
        cells.append(tag("td", shortened("; ".join(_notes(row)), 300), class_="notes"))
    return tag("tr", *cells, id=f"l{place}")


def _notes(row: Iterable[Layer]) -> list[str]:
    return [note for layer in row if layer.record for note in layer.record.notes]


def _kept(report: Report) -> Markup | None:
    kept = sorted(report.kept, key=lambda kept: -kept.stored_bytes)
    if not kept:
        return None
    folded: dict[tuple[str, tuple[int, ...], str], list[float]] = defaultdict(list)
    for entry in kept:
        pattern = ".".join("*" if part.isdigit() else part for part in entry.name.split("."))
        folded[pattern, entry.shape, entry.dtype].append(entry.stored_bytes)
    shown = list(folded.items())[:_KEPT_ROWS]
    lines = [
        tag(
            "tr",
            tag("th", shortened(pattern) + (f" ({len(sizes)})" if len(sizes) > 1 else ""), scope="row"),
            tag("td", " × ".join(map(str, shape)) or "1"),
            tag("td", dtype.lower()),
            tag("td", size(sum(sizes)), class_="num"),
        )
        for (pattern, shape, dtype), sizes in shown
    ]
    titles = (("Tensor", None), ("Shape", None), ("Type", None), ("Size", "num"))
    head = tag("tr", *[tag("th", title, scope="col", class_=class_) for title, class_ in titles])
    more = (
        tag("p", f"{len(folded) - len(shown)} more are not listed.", class_="note")
        if len(shown) < len(folded)
        else None
    )
    frame = tag("div", tag("table", tag("thead", head), tag("tbody", *lines)), class_="scroll")
    total = size(sum(entry.stored_bytes for entry in kept))
    summary = tag("summary", f"{len(kept)} tensors, {total}")
    return _card("Stored as they were", tag("details", summary, frame, more), id="kept")


# ------------------------------------------------------------------------------------------------------------------ run


def _run(report: Report) -> Markup | None:
    record = report.record
    if record is None:
        return None
    facts = [("Method", record.method), ("Format", record.format), ("Model", record.model)]
    facts += [("Time", duration(record.seconds))] if record.seconds is not None else []
    lists = [
        _facts("Run", [(title, text) for title, text in facts if text]),
        _facts("Calibration", _flat(record.calibration)),
        _facts("Settings", _flat(record.settings)),
        _facts("Versions", _flat(record.versions)),
    ]
    noted = [tag("li", shortened(note, 500)) for note in record.notes[:_NOTES]]
    notes = [tag("h3", "Notes"), tag("ul", *noted)] if noted else []
    return _card("The run", tag("div", *lists, class_="facts"), *notes, id="run")


def _facts(title: str, entries: Sequence[tuple[str, str]]) -> Markup | None:
    if not entries:
        return None
    lines = [join(tag("dt", shortened(key, 60)), tag("dd", shortened(value, 300))) for key, value in entries[:_NOTES]]
    return tag("div", tag("h3", title), tag("dl", *lines))


def _flat(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values as text."""
    return [(key.replace("_", " "), _plain(key, value)) for key, value in data.items() if value is not None]


def _plain(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 1 << 63:
        return f"{value:,}" if key == "tokens" else str(value)
    return value if isinstance(value, str) else shortened(json.dumps(value, ensure_ascii=False), 300)


def _definitions(report: Report) -> Markup:
    terms = [(metric.title, metric.help) for metric in columns(report)]
    terms += [
        ("Perplexity", "exp of the mean negative log-likelihood of each token, in windows that don't overlap"),
        ("KL divergence", "Mean of KL(dense ‖ quantized) over the tokens, in nats"),
        ("Size", "Bytes of the files that hold weights, in powers of ten"),
    ]
    lines = [join(tag("dt", title), tag("dd", f"{text}.")) for title, text in terms]
    source = ""
    if report.reference and report.comparable:
        source = f"Weight errors were computed from the weights themselves, against {shortened(report.reference)}."
    elif values(WEIGHT, report.layers):
        source = "Weight errors are what the run has recorded."
    text = tag("p", source + _whose_weights(report).replace("Taken", "Outliers and kurtosis are taken"))
    return _card("What the figures mean", tag("details", tag("summary", "Definitions"), tag("dl", *lines), text))


def _data(report: Report, heatmap: Heatmap, rows: Sequence[Row]) -> Markup:
    """What the script needs, as JSON that can't end its element."""
    data: dict[str, Any] = {"metrics": []}
    if heatmap.cells and heatmap.dense_enough:
        row_of = {layer.name: place for place, row in enumerate(rows) for layer in row}
        data["rows"] = [row_of[cell.layers[0].name] for cell in heatmap.cells]
        data["at"] = [[cell.row, cell.column] for cell in heatmap.cells]
        data["names"] = [cell.name for cell in heatmap.cells]
        for metric in plotted(report):
            low, high = charts.legend_ends(heatmap.scale(metric), metric.write)
            texts = [cell.text(metric) for cell in heatmap.cells]
            entry = {"title": metric.title, "low": low, "high": high, "texts": texts, "steps": heatmap.steps(metric)}
            data["metrics"].append(entry)
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
