"""GGUF: llama.cpp's single-file format; its container and its number types."""

from lowbit.wire.gguf.codec import read_blocks, spec_of, type_of, write_blocks
from lowbit.wire.gguf.container import Gguf, GgufFile, TensorInfo, open_gguf
from lowbit.wire.gguf.mixtures import MIXTURES, Mixture, ModelFacts, mixture
from lowbit.wire.gguf.types import GgmlType
from lowbit.wire.gguf.values import Typed, ValueType
from lowbit.wire.gguf.writer import Entry, write_gguf

__all__ = [
    "MIXTURES",
    "Entry",
    "GgmlType",
    "Gguf",
    "GgufFile",
    "Mixture",
    "ModelFacts",
    "TensorInfo",
    "Typed",
    "ValueType",
    "mixture",
    "open_gguf",
    "read_blocks",
    "spec_of",
    "type_of",
    "write_blocks",
    "write_gguf",
]
