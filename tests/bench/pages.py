"""Reading a page as a browser would, strictly; and reports made of nothing but numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from lowbit.bench.report import Layer, LayerRecord, Record, Report
from lowbit.bench.report.places import places

_VOID = {"meta", "br", "hr", "input", "col"}
_KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass
class Page(HTMLParser):
    """A page's elements; a tag that isn't closed in its place is an error.

    Attributes:
        elements: names and attributes, in their order.
        texts: by the name of the element that they are in.
    """

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            found for name, found in self.elements if name == tag and all(found.get(k) == v for k, v in wanted.items())
        ]

    @property
    def text(self) -> str:
        """Everything that is shown."""
        shown = {name: texts for name, texts in self.texts.items() if name not in ("script", "style")}
        return "\n".join(text for texts in shown.values() for text in texts)


def names(blocks: int, kinds: tuple[str, ...] = _KINDS) -> list[str]:
    return [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]


def layers(of: list[str], *, recorded: bool = True, **changes: Any) -> tuple[Layer, ...]:
    """Layers with made-up figures, different for each."""
    found = []
    for number, (name, place) in enumerate(places(of).items()):
        error = 0.001 * (1 + number % 17)
        record = LayerRecord(name, output_error=error, input_error=error / 2, seconds=0.5, tokens=1000 + number)
        entry = {
            "name": name,
            "place": place,
            "shape": (512, 1536),
            "spec": "uint4, groups of 128, integer zero",
            "stored_bytes": 512 * 1536 * 0.52,
            "weight_error": 2 * error,
            "max_over_rms": 5.0 + number % 11,
            "kurtosis": 3.0 + number % 5,
            "record": record if recorded else None,
        }
        found.append(Layer(**{**entry, **changes}))
    return tuple(found)


def report(of: tuple[Layer, ...], **changes: Any) -> Report:
    """A report of nothing but layers."""
    size = int(sum(layer.stored_bytes for layer in of)) + 1000
    entry: dict[str, Any] = {"name": "model-4bit", "format": "gptq", "model": {}, "layers": of, "kept": ()}
    return Report(**{**entry, "file_bytes": size, "record": Record(), **changes})
