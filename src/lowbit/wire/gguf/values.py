"""The types that a value of GGUF's metadata has, shared by reader and writer."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lowbit.errors import FormatError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT_KEY: Final = "general.alignment"
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 20


class ValueType(enum.IntEnum):
    """How a metadata value is stored."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALARS: Final[Mapping[ValueType, str]] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
WIDTHS: Final[Mapping[ValueType, int]] = {kind: struct.calcsize(f"<{code}") for kind, code in SCALARS.items()}


@dataclass(frozen=True)
class Typed:
    """A metadata value that is written as `kind`; of a list, that is the type of its elements."""

    value: Any
    kind: ValueType


def kind_of(value: object, *, element: bool = False) -> ValueType:
    """The type that a plain value is written as.

    An int becomes UINT32 (in a list INT32), one that doesn't fit INT32 or 64 bits; a float FLOAT32; bool and str
    themselves. Wrap a value in :class:`Typed` to have it otherwise.

    Raises:
        FormatError: GGUF holds nothing of the kind.
    """
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, int):
        return _integer_kind(value, element)
    if isinstance(value, float):
        return ValueType.FLOAT32
    if isinstance(value, str):
        return ValueType.STRING
    if isinstance(value, (list, tuple)):
        return ValueType.ARRAY
    raise FormatError("GGUF metadata holds no such value", found=type(value).__name__, expected="int, float, str, list")


def _integer_kind(value: int, element: bool) -> ValueType:
    order = (ValueType.INT32, ValueType.UINT32) if element else (ValueType.UINT32, ValueType.INT32)
    for kind in (*order, ValueType.UINT64, ValueType.INT64):
        signed = kind in (ValueType.INT32, ValueType.INT64)
        bits = 8 * WIDTHS[kind]
        low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
        if low <= value < high:
            return kind
    raise FormatError("an integer takes more than 64 bits", found=value)
