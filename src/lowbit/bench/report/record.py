"""What a quantization run has written down about itself: ``quantization_report.json`` in the checkpoint's folder.

Every part is optional, since other tools and older versions may leave some out; what is there has to be of its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lowbit.errors import FormatError
from lowbit.wire.store import read_json

RECORD: Final = "quantization_report.json"
VERSION: Final = 1
_LARGEST: Final = 1e30  # sums of these stay finite


@dataclass(frozen=True)
class LayerRecord:
    """What the run says of one layer; errors are relative squared errors.

    Attributes:
        weight_error: ``|dW|^2 / |W|^2``.
        output_error: ``tr(dW H dW^T) / tr(W H W^T)`` with the inputs' Gram matrix ``H``.
        input_error: of the layer's inputs, from the layers before it.
        tokens: how many the statistics were gathered over.
    """

    name: str
    block: int | None = None
    shape: tuple[int, ...] = ()
    spec: str = ""
    bits_per_weight: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    input_error: float | None = None
    damp: float | None = None
    seconds: float | None = None
    tokens: int | None = None
    input_kurtosis: float | None = None
    input_max_over_rms: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockRecord:
    """The relative squared error of one block's output, and the time that it took."""

    block: int
    output_error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        calibration, settings, versions: as written, for showing.
        layers: by module name.
    """

    method: str = ""
    format: str = ""
    model: str = ""
    seconds: float | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    blocks: tuple[BlockRecord, ...] = ()
    notes: tuple[str, ...] = ()


def read_record(folder: Path) -> Record | None:
    """The record in a checkpoint's folder; None where there is none.

    Raises:
        FormatError: the file is too large, not JSON, or of another version; or a field is of the wrong type, named.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    fields = _Fields(read_json(path), str(path), "")
    version = fields.count("version")
    if version not in (None, VERSION):
        raise FormatError("a record of another version", file=str(path), found=version, expected=VERSION)
    layers = [_layer(entry) for entry in fields.objects("layers")]
    return Record(
        method=fields.text("method"),
        format=fields.text("format"),
        model=fields.text("model"),
        seconds=fields.number("seconds"),
        versions=fields.mapping("versions"),
        calibration=fields.mapping("calibration"),
        settings=fields.mapping("settings"),
        layers={layer.name: layer for layer in layers},
        blocks=tuple(_block(entry) for entry in fields.objects("blocks")),
        notes=fields.texts("notes"),
    )


def _layer(fields: _Fields) -> LayerRecord:
    return LayerRecord(
        name=fields.required_text("name"),
        block=fields.count("block"),
        shape=fields.counts("shape"),
        spec=fields.text("spec"),
        bits_per_weight=fields.number("bits_per_weight"),
        weight_error=fields.number("weight_error"),
        output_error=fields.number("output_error"),
        input_error=fields.number("input_error"),
        damp=fields.number("damp"),
        seconds=fields.number("seconds"),
        tokens=fields.count("tokens"),
        input_kurtosis=fields.number("input_kurtosis"),
        input_max_over_rms=fields.number("input_max_over_rms"),
        notes=fields.texts("notes"),
    )


def _block(fields: _Fields) -> BlockRecord:
    number = fields.count("block")
    if number is None:
        raise fields.wrong("block", None, "a number of a block")
    return BlockRecord(number, fields.number("output_error"), fields.number("seconds"))


class _Fields:
    """A JSON object whose fields are taken by type; null is the same as missing."""

    def __init__(self, data: Mapping[str, Any], file: str, where: str) -> None:
        self._data, self._file, self._where = data, file, where

    def wrong(self, key: str, value: object, expected: str) -> FormatError:
        found = "nothing" if value is None else repr(value)[:80]
        return FormatError(f"{self._where}{key} has a wrong value", file=self._file, found=found, expected=expected)

    def text(self, key: str) -> str:
        value = self._data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value or ""

    def required_text(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise self.wrong(key, self._data.get(key), "a text")
        return value

    def number(self, key: str) -> float | None:
        value = self._data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_sound(value):
            raise self.wrong(key, value, f"a number from 0 to {_LARGEST:g}")
        return float(value)

    def count(self, key: str) -> int | None:
        value = self._data.get(key)
        if value is not None and not _is_count(value):
            raise self.wrong(key, value, "a whole number, not negative")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        value = self._data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(map(_is_count, value)):
            raise self.wrong(key, value, "a list of whole numbers")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(key, value, "a list of texts")
        return tuple(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._data.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return value or {}

    def objects(self, key: str) -> Iterator[_Fields]:
        value = self._data.get(key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(key, value, "a list of objects")
        for number, entry in enumerate(value or ()):
            if not isinstance(entry, dict):
                raise self.wrong(f"{key}[{number}]", entry, "an object")
            yield _Fields(entry, self._file, f"{self._where}{key}[{number}].")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_sound(value: float) -> bool:
    return 0 <= value <= _LARGEST  # which NaN is not either
