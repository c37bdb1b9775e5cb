"""compressed-tensors, the format of llm-compressor and vLLM: integers, small floats, and sparse weights.

========================== ======================================================================================
pack-quantized             ``weight_packed int32 [out, ceil(in * b / 32)]`` a dense bit stream, ``weight_shape``
int-quantized              ``weight int8 [out, in]``
float-quantized            ``weight e4m3 [out, in]``
naive-quantized            either of these two
nvfp4-pack-quantized       ``weight_packed uint8 [out, in / 2]``, ``weight_scale`` e4m3, ``weight_global_scale`` fp32
mxfp4-, mxfp6-, mxfp8-     4, 6 or 8 bits in ``weight_packed`` or ``weight``, ``weight_scale uint8 [out, in / 32]``
sparse-bitmask, -24-       ``compressed``, ``bitmask``, ``shape``; also of the codes of a quantized weight
mixed-precision            each scheme names its own
========================== ======================================================================================

``W = (q - zero) * scale``, one scale per tensor, row, group, or block; NVFP4's scales are ``weight_scale`` divided by
the global one. ``config_groups`` gives each module a scheme, by its name, an expression, or the class ``Linear``.
"""

from lowbit.wire.compressed_tensors.schemes import PRESETS, Args, Scheme, Sparsity
from lowbit.wire.compressed_tensors.settings import CompressedTensorsSettings, flatten
from lowbit.wire.compressed_tensors.specs import spec_of
from lowbit.wire.compressed_tensors.targets import first_match
from lowbit.wire.compressed_tensors.wire import METHOD, CompressedTensorsWire

__all__ = [
    "METHOD",
    "PRESETS",
    "Args",
    "CompressedTensorsSettings",
    "CompressedTensorsWire",
    "Scheme",
    "Sparsity",
    "first_match",
    "flatten",
    "spec_of",
]
