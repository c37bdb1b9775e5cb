"""The matrices of a block under one kind of name, whatever module holds them, and its norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.nn.experts import find_projections
from lowbit.nn.swap import is_conv1d, is_linear


@dataclass(frozen=True)
class Matrix:
    """A weight of a block; views that write through to the module.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        module: name of the module that computes with it; experts share theirs.
        linear: whether the module's output is ``x Wᵀ + b`` and nothing else; false for routers and for experts.
        expert: which one it is of, or None.
    """

    weight: Tensor
    bias: Tensor | None
    module: str
    linear: bool = True
    expert: int | None = None


def matrices(block: nn.Module) -> dict[str, Matrix]:
    """Every matrix that inputs are multiplied with, by name.

    Linear layers and routers are called as their modules are, and the matrices of fused experts
    ``<experts>.<number>.<part>`` (``mlp.experts.3.up_proj``), as files call them.
    """
    found: dict[str, Matrix] = {}
    for name, module in block.named_modules():
        if experts := _expert_matrices(name, module):
            found |= experts
            continue
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        oriented = weight.detach().t() if is_conv1d(module) else weight.detach()
        bias = own_bias(module)
        fits = bias is not None and tuple(bias.shape) == (oriented.shape[0],)
        found[name] = Matrix(oriented, bias if fits else None, name, is_linear(module))
    return found


def _expert_matrices(name: str, module: nn.Module) -> dict[str, Matrix]:
    found: dict[str, Matrix] = {}
    for parameter, projection in find_projections(module).items():
        bias = module._parameters.get(f"{parameter}_bias")
        biases = {} if bias is None else projection.split_bias(bias.detach())
        for part, stack in projection.split(module.get_parameter(parameter).detach()).items():
            for expert, weight in enumerate(stack):
                key = f"{name}.{expert}.{part}".removeprefix(".")
                part_bias = biases[part][expert] if part in biases else None
                found[key] = Matrix(weight, part_bias, name, linear=False, expert=expert)
    return found


def norms(block: nn.Module) -> dict[str, nn.Module]:
    """The modules that multiply each channel with a weight of their own: ``weight [n]``, and no children."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and not list(module.children()):
            found[name] = module
    return found


def own_bias(module: nn.Module) -> Tensor | None:
    """The bias of a module, without its gradient."""
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()
