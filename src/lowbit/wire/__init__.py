"""Wires spell: each reads and writes the bytes of one format, and knows nothing of models, kernels or algorithms."""

from lowbit.wire.awq import AwqWire
from lowbit.wire.base import Settings, Wire, field, require_layout, require_tensor, require_tensors
from lowbit.wire.bitsandbytes import Bitsandbytes4Wire, Bitsandbytes8Wire
from lowbit.wire.detect import find_wire, register_wire, unregister_wire, wire_named, wires
from lowbit.wire.gptq import GptqWire
from lowbit.wire.store import Checkpoint, CheckpointFiles, open_checkpoint

__all__ = [
    "AwqWire",
    "Bitsandbytes4Wire",
    "Bitsandbytes8Wire",
    "Checkpoint",
    "CheckpointFiles",
    "GptqWire",
    "Settings",
    "Wire",
    "field",
    "find_wire",
    "open_checkpoint",
    "register_wire",
    "require_layout",
    "require_tensor",
    "require_tensors",
    "unregister_wire",
    "wire_named",
    "wires",
]
