"""Dense checkpoints whose experts are fused: put together from the matrices that packed ones hold one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lowbit.integrations.transformers.experts.names import ExpertNames, ExpertStack


class FusedExperts:
    """Collects the matrices and biases of experts until a parameter is whole.

    Args:
        model: of the checkpoint, on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        mapping: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._names = ExpertNames(model, mapping)
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._parts: dict[str, dict[tuple[str, int], Tensor]] = {}

    def owns(self, name: str) -> bool:
        """Whether a dense tensor of this name belongs into a parameter that dense files hold fused."""
        return self._find(name) is not None

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take one tensor (``...experts.3.gate_proj.weight`` or ``.bias``); yields a parameter once it is whole."""
        found = self._find(name)
        if found is None:
            return
        stack, number, before = found
        projection, biased = stack.projection, name.endswith(".bias")
        parameter = f"{before}.{projection.name}{'_bias' if biased else ''}"
        parts = self._parts.setdefault(parameter, {})
        parts[stack.part, number] = tensor
        if len(parts) < len(projection.parts) * projection.experts:
            return
        del self._parts[parameter]
        stacked = {
            part: torch.stack([parts[part, expert] for expert in range(projection.experts)])
            for part in projection.parts
        }
        yield parameter, projection.join_bias(stacked).contiguous() if biased else projection.join(stacked)

    def _find(self, name: str) -> tuple[ExpertStack, int, str] | None:
        """The matrix that a tensor is, and what the files call its experts."""
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        renamed = f"{module}.weight"
        for renaming in self._renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        renamed = renamed.removesuffix(".weight")
        spellings = renamed, f"{self._prefix}{renamed}", renamed.removeprefix(self._prefix)
        found = next((found for spelled in spellings if (found := self._names.locate(spelled))), None)
        if found is None or found[0].parameter in self._names.merged:
            return None
        stack, number = found
        return stack, number, module.removesuffix(f".{number}.{stack.leaf}")
