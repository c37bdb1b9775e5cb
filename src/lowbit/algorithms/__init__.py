"""Algorithms choose numbers: a dense weight, a spec and what was measured of the activations give a `QuantTensor`.

They never touch files or modules. :func:`quantize` picks the algorithm that a spec calls for.
"""

from lowbit.algorithms.affine import AffineIntegers, Int4Additive
from lowbit.algorithms.base import Algorithm, find_algorithm, quantize, register_algorithm
from lowbit.algorithms.blockwise import BlockwiseTable, nested_map
from lowbit.algorithms.eetq import HalfAwayRows
from lowbit.algorithms.float8 import ScaledFloat8
from lowbit.algorithms.ggml import GgmlBlocks
from lowbit.algorithms.ggml_feedback import ErrorFeedbackBlocks
from lowbit.algorithms.rows import Int8Rows
from lowbit.algorithms.rtn import RoundToNearest
from lowbit.core import int8_spec, integer_spec, table_spec

__all__ = [
    "AffineIntegers",
    "Algorithm",
    "BlockwiseTable",
    "ErrorFeedbackBlocks",
    "GgmlBlocks",
    "HalfAwayRows",
    "Int4Additive",
    "Int8Rows",
    "RoundToNearest",
    "ScaledFloat8",
    "find_algorithm",
    "int8_spec",
    "integer_spec",
    "nested_map",
    "quantize",
    "register_algorithm",
    "table_spec",
]
