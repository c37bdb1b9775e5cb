"""A quantized checkpoint as one page: what each layer cost, where the bytes are, and what the run has recorded."""

from lowbit.bench.report.contents import Kept, Layer, Measured, Report, collect
from lowbit.bench.report.page import render
from lowbit.bench.report.record import BlockRecord, LayerRecord, Record, read_record

__all__ = [
    "BlockRecord",
    "Kept",
    "Layer",
    "LayerRecord",
    "Measured",
    "Record",
    "Report",
    "collect",
    "read_record",
    "render",
]
