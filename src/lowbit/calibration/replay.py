"""A block's forward, recorded once and repeated on a copy, so that changes can be tried before they are made."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowbit.errors import PlanError


@dataclass(frozen=True)
class Call:
    """What went through a module: its arguments, its first floating-point input, and its first output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Tensor
    output: Tensor


class Replay:
    """A copy of a block in fp32, and one call of it that can be repeated.

    Args:
        block: any module; it is left as it is.
        run: calls the block at least once, directly or through its model. A small input is enough: what takes time
            here is the number of repetitions.

    Attributes:
        block: the copy, in evaluation mode and without hooks.
        base: what :meth:`outputs` gives while nothing has been changed.

    Raises:
        PlanError: the block isn't called, has no data yet, gives NaN, or doesn't give the same twice.
    """

    def __init__(self, block: nn.Module, run: Callable[[], object]) -> None:
        if any(parameter.is_meta for parameter in block.parameters()):
            raise PlanError(f"{type(block).__name__} is on the meta device; load its weights before tracing it")
        self._args, self._kwargs = _as_fp32(_capture(block, run))
        self.block = copy.deepcopy(block).float().eval().requires_grad_(False)
        for module in self.block.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.base = self.outputs()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.base):
            raise PlanError(f"{type(block).__name__} gives NaN or infinite outputs; nothing can be compared with them")
        again = self.outputs()
        if len(again) != len(self.base) or not all(torch.equal(*pair) for pair in zip(self.base, again, strict=True)):
            raise PlanError(
                f"{type(block).__name__} gives other outputs when the same call is repeated; "
                "run it with use_cache=False, and without random numbers"
            )

    @property
    def hidden(self) -> Tensor:
        """The first floating-point input, of three dimensions in decoders: ``fp32 [batch, tokens, hidden]``."""
        found = self.floating_inputs()
        if not found:
            raise PlanError(f"{type(self.block).__name__} was called without a floating-point input")
        return found[0]

    def floating_inputs(self) -> list[Tensor]:
        """All of them, the hidden states first."""
        named = self._kwargs.get("hidden_states")
        leaves = pytree.tree_leaves((self._args, {"first": named}, self._kwargs))
        return [leaf for leaf in leaves if _is_floating(leaf)]

    @torch.no_grad()
    def outputs(self, hidden: Tensor | None = None) -> list[Tensor]:
        """Call the copy again.

        Args:
            hidden: instead of the first floating-point input.

        Returns:
            The first output, and whatever the block left in dictionaries that it was given (keys and values that later
            blocks share).
        """
        first = self.hidden
        args, kwargs = pytree.tree_map(
            lambda leaf: hidden if hidden is not None and leaf is first else leaf, (self._args, self._kwargs)
        )
        before = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        result = _first_tensor(self.block(*args, **kwargs))
        left = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_floating(leaf) and id(leaf) not in before]
        return [result, *left]

    def record(self) -> dict[str, Call]:
        """The last call of every module below the block that took and gave a tensor, in order of execution."""
        calls: dict[str, Call] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
                inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_floating(leaf)]
                outputs = [leaf for leaf in pytree.tree_leaves(output) if _is_floating(leaf)]
                if inputs and outputs:
                    calls.pop(name, None)
                    calls[name] = Call(args, kwargs, inputs[0], outputs[0])

            return hook

        named = [(name, module) for name, module in self.block.named_modules() if name]
        handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in named]
        try:
            self.outputs()
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def inputs_of(self, name: str) -> Tensor:
        """The first floating-point input of the module `name` in a new call."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.extend(leaf for leaf in pytree.tree_leaves((args, kwargs))[:1] if _is_floating(leaf))

        handle = self.block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.outputs()
        finally:
            handle.remove()
        if not seen:
            raise PlanError(f"'{name}' isn't called with a tensor")
        return seen[-1]

    @contextlib.contextmanager
    def scaled_output(self, name: str, factors: Tensor) -> Iterator[None]:
        """Within, the output of the module `name` is multiplied by ``factors [out]``."""
        module = self.block.get_submodule(name)
        handle = module.register_forward_hook(lambda _module, _args, output: output * factors)
        try:
            yield
        finally:
            handle.remove()


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The Euclidean distance of two lists of outputs; infinite where they differ in shape or are not finite."""
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return float("inf")
    total = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(left, right, strict=True))
    return total**0.5 if total == total else float("inf")


def _capture(block: nn.Module, run: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append((args, kwargs))

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    if not calls:
        raise PlanError(f"run() doesn't call the block ({type(block).__name__})")
    return calls[0]


def _as_fp32(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def convert(leaf: Any) -> Any:
        if hasattr(leaf, "get_seq_length"):
            return None  # a cache of keys and values would grow with every repetition
        return leaf.detach().float().clone() if _is_floating(leaf) else leaf

    return pytree.tree_map(convert, call)


def _first_tensor(output: object) -> Tensor:
    for leaf in pytree.tree_leaves(output):
        if _is_floating(leaf):
            return leaf
    raise PlanError("the block gives no tensor")


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
