"""Layers: the one quantized linear, what replaces what, and the plan for a model."""

from lowbit.nn.experts import QuantExperts, QuantStack
from lowbit.nn.linear import QuantLinear
from lowbit.nn.planning import plan_model
from lowbit.nn.swap import dequantize_model, quantize_model, swap_linear

__all__ = [
    "QuantExperts",
    "QuantLinear",
    "QuantStack",
    "dequantize_model",
    "plan_model",
    "quantize_model",
    "swap_linear",
]
