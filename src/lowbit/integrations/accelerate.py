"""accelerate: layers whose weights are offloaded to the CPU or the disk while they don't run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn


def is_offloaded(layer: nn.Module) -> bool:
    """Whether the layer's own weights are elsewhere and are brought when it runs."""
    return any(tensor.device.type == "meta" for tensor in layer.parameters(recurse=False))


@contextmanager
def on_host(layer: nn.Module) -> Iterator[None]:
    """Bring the weights of an offloaded layer back for as long as they are needed; other layers stay where they are."""
    if not is_offloaded(layer):
        yield
        return
    with align_module_device(layer, execution_device="cpu"):
        yield


def hand_over_hooks(old: nn.Module, new: nn.Module, *, offloaded: bool) -> None:
    """Let `new`, which takes the place of `old`, run where `old` ran; an offloaded layer's weights stay on the host."""
    hook = _align_hook(getattr(old, "_hf_hook", None))
    if hook is None:
        return
    remove_hook_from_module(old)
    replacement = AlignDevicesHook(
        execution_device=hook.execution_device, io_same_device=hook.io_same_device, offload=offloaded
    )
    add_hook_to_module(new, replacement)


def _align_hook(hook: ModelHook | None) -> AlignDevicesHook | None:
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((entry for entry in hooks if isinstance(entry, AlignDevicesHook)), None)
