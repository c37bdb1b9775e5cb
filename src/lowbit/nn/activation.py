"""Activations whose outputs are divided by scales: what AutoAWQ does where no layer before could take the scales in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.errors import FormatError, PlanError


class ScaledActivation(nn.Module):
    """``act(x) / scales``, with ``scales [features]`` and `x` of any leading dimensions."""

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.act(inputs)
        return outputs / self.scales.to(outputs.dtype)


def scale_activations(model: nn.Module, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Wrap activations of a model on the meta device.

    Args:
        sizes: how many scales each has, by module name.

    Raises:
        FormatError: the model has no such activation.
    """
    modules = dict(model.named_modules())
    for name, size in sizes.items():
        act = modules.get(name)
        if act is None or isinstance(act, nn.Linear | nn.Embedding) or any(True for _ in act.parameters()):
            found = "no such module" if act is None else type(act).__name__
            raise FormatError(
                "the checkpoint has scales for an activation", tensor=f"{name}.scales", found=found, expected=name
            )
        model.set_submodule(name, ScaledActivation(act, torch.empty(size, dtype=dtype, device="meta")))


def fold_activations(model: nn.Module) -> None:
    """Move the scales of activations into the dense layers behind them, so that the model has none any more.

    Raises:
        PlanError: which layer comes behind an activation can't be told by its size.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, ScaledActivation):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        behind = [
            layer
            for layer in parent.children()
            if type(layer) is nn.Linear and layer.in_features == module.scales.numel() != layer.out_features
        ]
        if len(behind) != 1:
            raise PlanError(f"which layer follows the scaled activation '{name}' is unclear, so it can't be folded")
        weight = behind[0].weight
        with torch.no_grad():
            scaled = (weight.float() / module.scales.to(weight.device, torch.float32)).to(weight.dtype)
        behind[0].weight = nn.Parameter(scaled, requires_grad=weight.requires_grad)
        model.set_submodule(name, module.act)
