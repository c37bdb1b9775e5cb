"""What reaches the first block of a stack, and what else each block is called with.

The model's own forward runs with its blocks replaced by stand-ins that record their arguments and hand the hidden
states on as they are; embeddings, masks, positions are thus made as the model makes them. Arguments that repeat (from
block to block, from batch to batch) are kept once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.stacks import Stack
from lowbit.errors import PlanError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_HIDDEN = "hidden_states"
_LISTED = 4
_REPEATED = "it can't be calibrated block by block"


class _Stop(Exception):
    """All that is wanted of a forward is known."""


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
    _states: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def on_cpu(self) -> tuple[dict[tuple[int, int], Arguments], bool]:
        """:attr:`arguments` and :attr:`keyword`, as another process can take them; what is shared stays shared."""
        known: dict[int, Tensor] = {}

        def moved(value: Any) -> Any:
            return _mapped(value, lambda tensor: known.setdefault(id(tensor), tensor.to("cpu")))

        return {key: moved(entry) for key, entry in self.arguments.items()}, self.keyword

    def call(
        self, block: Callable[..., Any], number: int, batch: int, hidden: Tensor, *, dense: bool = False
    ) -> Tensor:
        """Run a block on hidden states with the arguments that the model gave it.

        Args:
            block: or a function like it.
            number: of the block in its stack.
            batch: whose arguments are used.
            hidden: ``[batch, tokens, features]`` or what else the block takes.
            dense: whether this is a forward of its own beside that of the quantized blocks; what blocks leave for later
                ones (shared keys and values) then is kept apart.
        """
        if (number, batch) not in self.arguments:
            return hidden  # the model leaves the block out
        args, kwargs = self.arguments[number, batch]
        if dense:
            args, kwargs = self._apart((args, kwargs))
        args, kwargs = _on(args, hidden.device), _on(kwargs, hidden.device)
        out = block(**{_HIDDEN: hidden}, **kwargs) if self.keyword else block(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result

    @property
    def has_state(self) -> bool:
        """Whether blocks are given something that they may leave results in for later blocks."""
        found: list[Any] = []
        _mapped(list(self.arguments.values()), lambda tensor: tensor, found.append)
        return any(map(_is_state, found))

    def _apart(self, arguments: Arguments) -> Any:
        def copied(value: Any) -> Any:
            if not _is_state(value):
                return value
            return self._states.setdefault(id(value), (value, copy.copy(value)))[1]

        return _mapped(arguments, lambda tensor: tensor, copied)


def _stop(*_: object) -> None:
    raise _Stop


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
        required: the blocks that the model has to run; None for all.

    Raises:
        PlanError: the model can't be run on the batches alone, or its blocks can't be run one by one: hidden states
            are changed between blocks, a block runs twice or not at all, or hands on what depends on its inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        run_first: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        earlier: Sequence[tuple[Stack, Callable[[int], Tensor], Captured]] = (),
        required: Collection[str] | None = None,
    ) -> None:
        self.required = required
        self.model, self.stack, self.run_first, self.earlier = model, stack, run_first, earlier
        self.captured = Captured()
        self.inputs: Tensor | None = None
        self._batch = 0
        self._ran: list[int] = []
        self._handed: Tensor | None = None  # what the block before gave
        self._first: Arguments = ((), {})
        self._extras: dict[int, Tensor] = {}
        self._checked = self._checked_end = self._ended = False
        self._shared: dict[tuple[Any, ...], Tensor] = {}
        self._identical: dict[int, tuple[Tensor, Tensor]] = {}
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
                self._batch, self.inputs, self._ran, self._ended = batch, None, [], False
                self._identical.clear()
                with contextlib.suppress(_Stop):
                    self._forward(inputs)
                self._check_all_ran()
                self._checked_end = True
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
        self._check_order(number, hidden)
        if number == 0:
            self.inputs, self.captured.keyword = hidden, keyword
            self._learn_extras(args, kwargs)
        else:
            self._check_extras(number, args, kwargs)
        others = {name: value for name, value in kwargs.items() if name != _HIDDEN}
        kept = self._kept(args if keyword else args[1:]), self._kept(others)
        self.captured.arguments[number, self._batch] = kept
        if number == len(self.stack.blocks) - 1:
            if self._checked_end:
                raise _Stop
            self._ended = True  # the first batch goes on: a model may run its blocks again
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
        extras = _behind_hidden(self.run_first(args, kwargs))
        self.captured.extras[self._batch] = extras
        self._first, self._extras = (args, kwargs), {id(tensor): tensor for tensor in _tensors(extras)}

    # --------------------------------------------------------------------------- what can't be done block by block

    def _forward(self, inputs: dict[str, Any]) -> None:
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        watched = head.register_forward_pre_hook(_stop) if isinstance(head, nn.Module) else contextlib.nullcontext()
        try:
            with watched:
                self.model(**inputs, use_cache=False)
        except (PlanError, torch.OutOfMemoryError):
            raise
        except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
            if self._ended:
                return  # in later stacks, whose weights aren't there
            kind = type(self.model).__name__
            raise PlanError(f"{kind} can't be calibrated on {' and '.join(inputs)} alone: {error}") from error

    def _check_order(self, number: int, hidden: Tensor) -> None:
        name, before = self.stack.blocks[number], self._handed
        if not self._ran and number:
            raise PlanError(f"the model runs '{name}' before '{self.stack.blocks[0]}'; {_REPEATED}")
        if self._ran and number <= self._ran[-1]:
            raise PlanError(f"the model runs '{name}' behind '{self.stack.blocks[self._ran[-1]]}'; {_REPEATED}")
        if self._ran and before is not hidden and not _same(before, hidden):
            raise PlanError(
                f"the model changes what '{self.stack.blocks[self._ran[-1]]}' hands to '{name}'; {_REPEATED}"
            )
        self._ran.append(number)
        self._handed = hidden

    def _check_all_ran(self) -> None:
        left_out = [name for number, name in enumerate(self.stack.blocks) if number not in self._ran]
        missing = [name for name in left_out if self.required is None or name in self.required]
        if missing:
            listed = f"{', '.join(missing[:_LISTED])}{' ...' if len(missing) > _LISTED else ''}"
            raise PlanError(f"the model doesn't run {listed} on the calibration data; skip what is in there")

    def _check_extras(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What reaches later blocks beside the hidden states may come from the first block, but not depend on them."""
        used = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) in self._extras]
        if not used or self._checked:
            return
        self._checked = True
        args, kwargs = self._first
        others = _mapped((args, kwargs), lambda tensor: tensor.flip(-1) if tensor is self.inputs else tensor)
        again = dict(zip(self._extras, _tensors(_behind_hidden(self.run_first(*others))), strict=True))
        if not all(_same(tensor, again[id(tensor)]) for tensor in used):
            raise PlanError(
                f"'{self.stack.blocks[number]}' is given more of what '{self.stack.blocks[0]}' computed than "
                f"hidden states; {_REPEATED}"
            )

    def _kept(self, value: Any) -> Any:
        """The arguments with every tensor that has been seen before, under any name, replaced by that one."""
        return _mapped(value, self._keep_tensor)

    def _keep_tensor(self, value: Tensor) -> Tensor:
        known = self._identical.get(id(value))
        if known is not None:
            return known[1]
        detached = value.detach()
        raw = detached.to("cpu").reshape(-1).contiguous().view(torch.uint8).numpy()
        key = (tuple(value.shape), value.dtype, hashlib.blake2b(raw.tobytes()).digest())
        kept = self._shared.setdefault(key, detached.clone())
        self._identical[id(value)] = value, kept  # alive, or another tensor might have its id
        return kept


def _behind_hidden(out: Any) -> tuple[Any, ...] | None:
    return tuple(out[1:]) if isinstance(out, tuple | list) else None


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return bool(torch.equal(one.nan_to_num(), other.nan_to_num()))


def _on(value: Any, device: torch.device) -> Any:
    return _mapped(value, lambda tensor: tensor.to(device))


def _mapped(value: Any, change: Callable[[Tensor], Tensor], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Arguments with every tensor changed, and what is neither a tensor nor holds any by `other`."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(entry, change, other) for entry in value)
    if type(value) is dict:
        return {name: _mapped(entry, change, other) for name, entry in value.items()}
    return other(value)


def _is_state(value: Any) -> bool:
    return isinstance(value, MutableMapping)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in arguments."""
    found: list[Tensor] = []
    _mapped(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
