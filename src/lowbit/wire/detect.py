"""Which wire a checkpoint is written in."""

from __future__ import annotations

import functools
from typing import Any

from lowbit.errors import FormatError
from lowbit.wire.aqlm import AqlmWire
from lowbit.wire.awq import AwqWire
from lowbit.wire.base import Json, Wire
from lowbit.wire.bitsandbytes import Bitsandbytes4Wire, Bitsandbytes8Wire
from lowbit.wire.compressed_tensors import CompressedTensorsWire
from lowbit.wire.eetq import EetqWire
from lowbit.wire.fbgemm_fp8 import FbgemmFp8Wire
from lowbit.wire.gguf.wire import GgufWire
from lowbit.wire.gptq import GptqWire
from lowbit.wire.hqq.wire import HqqWire
from lowbit.wire.quanto import QuantoWire
from lowbit.wire.torchao.wire import TorchAoWire


@functools.cache
def _registered() -> list[Wire[Any]]:
    return [
        Bitsandbytes4Wire(),
        Bitsandbytes8Wire(),
        GptqWire(),
        AwqWire(),
        HqqWire(),
        QuantoWire(),
        AqlmWire(),
        GgufWire(),
        CompressedTensorsWire(),
        EetqWire(),
        FbgemmFp8Wire(),
        TorchAoWire(),
    ]


def wires() -> tuple[Wire[Any], ...]:
    """All known wires, in the order in which they are asked."""
    return tuple(_registered())


def register_wire(wire: Wire[Any]) -> None:
    """Add a wire; its name must be new.

    Raises:
        ValueError: a wire of this name exists.
    """
    if any(known.name == wire.name for known in _registered()):
        raise ValueError(f"a wire named '{wire.name}' is registered already")
    _registered().append(wire)


def unregister_wire(name: str) -> None:
    """Take a wire back; unknown names are ignored."""
    _registered()[:] = [wire for wire in _registered() if wire.name != name]


def find_wire(config: Json) -> Wire[Any]:
    """The wire of a ``quantization_config``.

    Raises:
        FormatError: no wire knows the method.
    """
    for wire in _registered():
        if wire.detect(config):
            return wire
    methods = sorted({wire.quant_method for wire in _registered()})
    raise FormatError("unknown quantization method", found=repr(config.get("quant_method"))[:80], expected=methods)


def wire_named(name: str) -> Wire[Any]:
    """The wire called `name`.

    Raises:
        FormatError: there is none.
    """
    for wire in _registered():
        if wire.name == name:
            return wire
    raise FormatError("unknown format", found=name, expected=[wire.name for wire in _registered()])
