"""Rotating a streamed model: what lies outside of its blocks at once, each block as it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.capture import Capture
from lowbit.calibration.rotation import RotationPlan, final_norm_name, find_rotation
from lowbit.calibration.stacks import Stack
from lowbit.calibration.streaming import loaded
from lowbit.errors import PlanError
from lowbit.integrations.transformers.streaming import Streamed

_SEQUENCES, _TOKENS = 2, 64


@dataclass(frozen=True)
class Rotated:
    """A model whose blocks are rotated as they come.

    Attributes:
        rotate_block: for each block, once.
        outside: the parameters outside of the blocks that changed, by name.
        config: what changed in the model's configuration.
        notes: what somebody should know.
    """

    rotate_block: Callable[[nn.Module], None]
    outside: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@torch.no_grad()
def rotate_streamed(streamed: Streamed, stack: Stack, tokens: Tensor, seed: int) -> Rotated:
    """Plan the rotation of a decoder by its first block, and rotate what lies outside of the blocks, in place.

    Args:
        streamed: the model.
        stack: its only one.
        tokens: ``int64 [sequences, length]``, to run the block with.
        seed: of the random signs.

    Raises:
        PlanError: the model can't be rotated; the message says why.
    """
    model, name = streamed.model, stack.blocks[0]
    block = model.get_submodule(name)
    with loaded(block, name, streamed.weights, torch.device("cpu")):
        plan, norm_name = _plan(model, Stack(stack.name, (name,)), block, tokens[:_SEQUENCES, :_TOKENS], seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plan.rotate_outside(embedding, model.get_submodule(norm_name), head)
    names = {module: own for own, module in model.named_modules()}
    changed = [embedding, model.get_submodule(norm_name), head]
    outside = {
        f"{names[module]}.{own}": value.detach() for module in changed for own, value in module.named_parameters()
    }
    config = {"tie_word_embeddings": False} if plan.untie else {}
    model.config.tie_word_embeddings = not plan.untie and model.config.tie_word_embeddings
    return Rotated(plan.rotate_block, outside, config, tuple(plan.notes))


def _plan(model: Any, stack: Stack, block: nn.Module, tokens: Tensor, seed: int) -> tuple[RotationPlan, str]:
    hidden: dict[int, Tensor] = {}
    capture = Capture(model, stack, lambda args, kwargs: block(*args, **kwargs))
    captured = capture.run({0: {"input_ids": tokens}}, lambda batch, inputs: hidden.update({batch: inputs}))
    if 0 not in hidden:
        raise PlanError("the model's first block was not reached; it can't be rotated")
    plan = find_rotation(model, block, lambda: captured.call(block, 0, 0, hidden[0]), seed=seed)
    return plan, final_norm_name(model, block)
