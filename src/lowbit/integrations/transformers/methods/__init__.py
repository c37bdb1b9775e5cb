"""The quantization methods: one file each, with its config class and how a config becomes a recipe."""

from __future__ import annotations

from typing import Any, Final

from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.methods import (
    aqlm,
    awq,
    bitsandbytes,
    compressed_tensors,
    eetq,
    fbgemm_fp8,
    gguf,
    gptq,
    hqq,
    quanto,
    torchao,
)
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wires
from lowbit.wire.bitsandbytes import is_bitsandbytes

METHODS: Final[dict[str, Method]] = {
    method.name: method
    for method in (
        bitsandbytes.METHOD,
        gguf.METHOD,
        gptq.METHOD,
        awq.METHOD,
        hqq.METHOD,
        quanto.METHOD,
        aqlm.METHOD,
        eetq.METHOD,
        fbgemm_fp8.METHOD,
        torchao.METHOD,
        compressed_tensors.METHOD,
    )
}
_added: dict[str, Method] = {}


def add_method(method: Method) -> None:
    """Add a method of the user's."""
    _added[method.name] = method


def remove_method(name: str) -> None:
    """Take a method of the user's back; unknown names are ignored."""
    _added.pop(name, None)


def method_named(name: str) -> Method | None:
    """The method whose configs say `name`, or None."""
    return _added.get(name) or METHODS.get(name)


def method_of(config: Any) -> Method:
    """The method of a quantization config, an object or a dict.

    Raises:
        FormatError: lowbit has no such method.
    """
    data = config if isinstance(config, dict) else config.to_dict()
    spelled = data.get("quant_method") if isinstance(config, dict) else config.quant_method
    if spelled is None:  # older files of compressed-tensors say it deeper down
        spelled = next((wire.quant_method for wire in wires() if wire.detect(data)), None)
    name = "bitsandbytes" if is_bitsandbytes(data) else str(getattr(spelled, "value", spelled))
    method = method_named(name)
    if method is None and any(wire.detect({**data, "quant_method": name}) for wire in wires()):
        raise PlanError(f"the wire of '{name}' has no quantization method of its own; add one with register_method")
    if method is None:
        raise FormatError("unknown quantization method", found=repr(spelled)[:80], expected=sorted({*METHODS, *_added}))
    return method


def make_recipe(config: Any) -> Recipe:
    """The recipe of a quantization config (an object of Transformers', ours, or anything with `to_dict`).

    Raises:
        FormatError: the config is of an unknown method or has values out of range.
        PlanError: it asks for something that lowbit doesn't do.
    """
    return method_of(config).recipe(config, dict(config.to_dict()))
