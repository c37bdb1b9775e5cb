"""The mathematics: what a stored weight means. Imports torch and nothing else of lowbit but its errors."""

from lowbit.core.packing import pack, packed_bytes, unpack
from lowbit.core.plan import Kept, Plan
from lowbit.core.presets import int8_spec, integer_spec, table_spec
from lowbit.core.qtensor import QuantTensor
from lowbit.core.reference import dequantize, linear
from lowbit.core.respell import respell, why_not
from lowbit.core.spec import (
    Activation,
    BlockCode,
    Code,
    FloatCode,
    Grouping,
    IntCode,
    QuantSpec,
    Scale,
    SecondLevel,
    TableCode,
    VectorCode,
    Zero,
)

__all__ = [
    "Activation",
    "BlockCode",
    "Code",
    "FloatCode",
    "Grouping",
    "IntCode",
    "Kept",
    "Plan",
    "QuantSpec",
    "QuantTensor",
    "Scale",
    "SecondLevel",
    "TableCode",
    "VectorCode",
    "Zero",
    "dequantize",
    "int8_spec",
    "integer_spec",
    "linear",
    "pack",
    "packed_bytes",
    "respell",
    "table_spec",
    "unpack",
    "why_not",
]
