"""Which modules of a checkpoint's model are linear layers; from its configuration, without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.integrations.transformers.experts.fused import FusedExperts
from lowbit.nn.swap import is_conv1d, is_linear, linear_shape

_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModel")


@dataclass(frozen=True)
class Outline:
    """The linear layers of a model, by module name; None where Transformers doesn't know the model.

    Attributes:
        transposed: those that store their weight as ``[in, out]`` (GPT-2's `Conv1D`).
        prefix: of the base model, which files may leave out.
        shapes: ``(out, in)`` of the linear layers, with and without the prefix.
        experts: puts experts together that dense files hold fused.
    """

    linears: frozenset[str] | None = None
    transposed: frozenset[str] = frozenset()
    prefix: str = ""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    experts: FusedExperts | None = None

    def kept(self, packed: Collection[str], dense: Collection[str]) -> list[str]:
        """The linear layers that are not packed, as the checkpoint's files name them; tied heads, which they don't."""
        stored = [name.removesuffix(".weight") for name in dense if name.endswith(".weight")]
        if self.linears is None:
            return sorted({name for name in stored if name.rpartition(".")[2].endswith(("proj", "head"))} | {"lm_head"})
        found = {name for name in stored if self._knows(name, self.linears)}
        tied = {name for name in self.linears if "." not in name and name not in packed}
        return sorted(found | tied)

    def is_transposed(self, module: str) -> bool:
        return self._knows(module, self.transposed)

    def _knows(self, name: str, names: frozenset[str]) -> bool:
        return name in names or f"{self.prefix}.{name}" in names


def outline(folder: Path, data: Mapping[str, Any] | None = None) -> Outline:
    """The outline of the model of a configuration; empty where Transformers has no such model.

    Args:
        folder: of the checkpoint.
        data: what its ``config.json`` would say, where there is none.
    """
    try:
        if data is None:
            config = transformers.AutoConfig.from_pretrained(folder)
        else:
            config = transformers.AutoConfig.for_model(**data)
    except (OSError, ValueError, KeyError, ImportError):
        return Outline()
    for name in _CLASSES:
        try:
            with torch.device("meta"):
                model = getattr(transformers, name).from_config(config)
        except (ValueError, ImportError, AttributeError):
            continue
        linears = {name: module for name, module in model.named_modules() if is_linear(module)}
        transposed = frozenset(name for name, module in linears.items() if is_conv1d(module))
        prefix, found = model.base_model_prefix, {name: linear_shape(module) for name, module in linears.items()}
        shapes = {name.removeprefix(f"{prefix}."): shape for name, shape in found.items()} | found
        return Outline(frozenset(linears), transposed, prefix, shapes, FusedExperts(model))
    return Outline()
