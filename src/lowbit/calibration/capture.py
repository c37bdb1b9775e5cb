"""What reaches the first block of a stack, and what else each block is called with.

The model's own forward runs with its blocks replaced by stand-ins that record their arguments and hand the hidden
states on as they are; embeddings, masks, positions are thus made as the model makes them. Arguments that repeat (from
block to block, from batch to batch) are kept once.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.stacks import Stack

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_HIDDEN = "hidden_states"


class _Stop(Exception):
    """The last block of the stack was reached."""


@dataclass
class Captured:
    """What was recorded of a stack.

    Attributes:
        arguments: by block and batch: positional arguments behind the hidden states, and the others by name.
        keyword: whether the hidden states are passed by name.
        extras: by batch: what blocks return behind the hidden states; None where they return nothing else.
    """

    arguments: dict[tuple[int, int], Arguments] = field(default_factory=dict)
    keyword: bool = False
    extras: dict[int, tuple[Any, ...] | None] = field(default_factory=dict)

    def call(self, block: Callable[..., Any], number: int, batch: int, hidden: Tensor) -> Tensor:
        """Run a block on hidden states with the arguments that the model gave it."""
        args, kwargs = self.arguments[number, batch]
        args, kwargs = _on(args, hidden.device), _on(kwargs, hidden.device)
        out = block(**{_HIDDEN: hidden}, **kwargs) if self.keyword else block(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result


class _Recorder(nn.Module):
    """Stands in for a block of the stack that is captured."""

    def __init__(self, capture: Capture, number: int, block: nn.Module) -> None:
        super().__init__()
        self.capture, self.number = capture, number
        self.__dict__["block"] = block  # not a child: its weights stay where they are

    def __getattr__(self, name: str) -> Any:
        """Models look at attributes of their blocks, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.capture.record(self.number, args, kwargs)


class _Replayer(_Recorder):
    """Stands in for a block of an earlier stack, whose results are known."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.capture.replay(self.number, args, kwargs)


class Capture:
    """Records one stack of a model.

    Args:
        model: everything but the blocks on the device.
        stack: whose arguments are wanted.
        run_first: runs the first block for real on ``(hidden, args, kwargs)`` and gives what it returns, so that it is
            known what blocks return beside the hidden states.
        earlier: stacks that run before it, each with its results by batch and what was captured of it.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        run_first: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        earlier: Sequence[tuple[Stack, Callable[[int], Tensor], Captured]] = (),
    ) -> None:
        self.model, self.stack, self.run_first, self.earlier = model, stack, run_first, earlier
        self.captured = Captured()
        self.inputs: Tensor | None = None
        self._batch = 0
        self._shared: dict[tuple[Any, ...], Tensor] = {}
        self._identical: dict[int, Tensor] = {}
        self._of_replayed: dict[int, tuple[Stack, Callable[[int], Tensor], Captured]] = {}

    def run(self, batches: Mapping[int, dict[str, Any]], keep: Callable[[int, Tensor], None]) -> Captured:
        """Capture all batches; the inputs of the first block go to `keep`."""
        replaced: dict[str, nn.Module] = {}
        count = 0
        try:
            for stack, results, captured in self.earlier:
                for name in stack.blocks:
                    self._of_replayed[count] = (stack, results, captured)
                    self._put(replaced, name, _Replayer(self, count, self.model.get_submodule(name)))
                    count += 1
            for number, name in enumerate(self.stack.blocks):
                self._put(replaced, name, _Recorder(self, number, self.model.get_submodule(name)))
            for batch, inputs in batches.items():
                self._batch, self.inputs = batch, None
                self._identical.clear()
                with contextlib.suppress(_Stop):
                    self.model(**inputs, use_cache=False)
                if self.inputs is not None:
                    keep(batch, self.inputs)
        finally:
            for name, block in replaced.items():
                self.model.set_submodule(name, block)
        return self.captured

    def _put(self, replaced: dict[str, nn.Module], name: str, stand_in: nn.Module) -> None:
        replaced[name] = self.model.get_submodule(name)
        self.model.set_submodule(name, stand_in)

    def record(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by a stand-in."""
        keyword = _HIDDEN in kwargs
        hidden: Tensor = kwargs[_HIDDEN] if keyword else args[0]
        if number == 0:
            self.inputs, self.captured.keyword = hidden, keyword
            self._learn_extras(args, kwargs)
        others = {name: value for name, value in kwargs.items() if name != _HIDDEN}
        kept = self._kept(args if keyword else args[1:]), self._kept(others)
        self.captured.arguments[number, self._batch] = kept
        if number == len(self.stack.blocks) - 1:
            raise _Stop
        extras = self.captured.extras[self._batch]
        return hidden if extras is None else (hidden, *extras)

    def replay(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand on the hidden states; behind the last block of a stack, its results."""
        stack, results, captured = self._of_replayed[number]
        following = self._of_replayed.get(number + 1)
        last = following is None or following[0] != stack
        hidden = results(self._batch) if last else (kwargs[_HIDDEN] if _HIDDEN in kwargs else args[0])
        extras = captured.extras[self._batch]
        return hidden if extras is None else (hidden, *extras)

    def _learn_extras(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        out = self.run_first(args, kwargs)
        self.captured.extras[self._batch] = tuple(out[1:]) if isinstance(out, tuple | list) else None

    def _kept(self, value: Any) -> Any:
        """The arguments with every tensor that has been seen before, under any name, replaced by that one."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, tuple | list):
            return type(value)(self._kept(entry) for entry in value) if type(value) in (tuple, list) else value
        if type(value) is dict:
            return {name: self._kept(entry) for name, entry in value.items()}
        return value

    def _keep_tensor(self, value: Tensor) -> Tensor:
        known = self._identical.get(id(value))
        if known is not None:
            return known
        detached = value.detach()
        raw = detached.to("cpu").reshape(-1).contiguous().view(torch.uint8).numpy()
        key = (tuple(value.shape), value.dtype, hashlib.blake2b(raw.tobytes()).digest())
        kept = self._shared.setdefault(key, detached.clone())
        self._identical[id(value)] = kept
        return kept


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_on(entry, device) for entry in value)
    if type(value) is dict:
        return {name: _on(entry, device) for name, entry in value.items()}
    return value
