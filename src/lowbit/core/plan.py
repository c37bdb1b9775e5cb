"""What happens to each weight of a model: a spec, or the reason why it stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lowbit.core.spec import QuantSpec


@dataclass(frozen=True)
class Kept:
    """A weight that stays dense, and why."""

    reason: str


@dataclass(frozen=True)
class Plan:
    """An ordered mapping from weight names to their fate; pure data.

    Attributes:
        entries: a :class:`QuantSpec` or :class:`Kept` per weight, keyed by module name
            (``model.layers.0.mlp.down_proj``), or by parameter name where a module holds several weights.
        shapes: the logical ``(out, in)`` shape of each entry (3-D for fused experts).
    """

    entries: Mapping[str, QuantSpec | Kept]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, QuantSpec]:
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, QuantSpec)}

    @property
    def kept(self) -> dict[str, Kept]:
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, Kept)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def rows(self) -> list[tuple[str, str, str]]:
        """``(name, shape, fate)`` per entry; runs of layers with the same fate are folded into one line."""
        return _fold_layers([(name, self._shape(name), _fate(entry)) for name, entry in self.entries.items()])

    def _shape(self, name: str) -> str:
        return " x ".join(map(str, self.shapes.get(name, ())))

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{len(self.quantized)} weights quantized, {len(self.kept)} kept", *lines])


def _fate(entry: QuantSpec | Kept) -> str:
    return f"kept: {entry.reason}" if isinstance(entry, Kept) else str(entry)


def _fold_layers(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Write ``layers.0.x .. layers.31.x`` as ``layers.*.x (32)`` where shape and fate agree."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for name, shape, fate in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        names.setdefault((pattern, shape, fate), []).append(name)
    return [
        (f"{pattern} ({len(found)})" if len(found) > 1 else found[0], shape, fate)
        for (pattern, shape, fate), found in names.items()
    ]
