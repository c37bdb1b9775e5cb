"""The activations on their way through a stack, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.calibration.activations import Activations, choose_place
from lowbit.calibration.capture import Capture, Captured
from lowbit.calibration.distributed import (
    LEAVES,
    gather,
    leaf_of,
    owner_of,
    owns,
    share,
    world,
)
from lowbit.calibration.stacks import Stack
from lowbit.calibration.streaming import load_block, unload_block
from lowbit.calibration.units import units_below
from lowbit.errors import PlanError

if TYPE_CHECKING:
    from lowbit.calibration.runner import Runner


class Flow:
    """The activations on their way through a stack: behind quantized blocks and, where needed, behind dense ones."""

    def __init__(
        self,
        runner: Runner,
        stack: Stack,
        batches: Sequence[dict[str, Tensor]],
        earlier: Sequence[tuple[Stack, Callable[[int], Tensor], Captured]],
    ) -> None:
        self.runner, self.total, self._stack = runner, len(batches), stack
        device, config = runner.device, runner.config
        mine = {
            number: batch
            for number, batch in enumerate(batches)
            if owns(number, self.total) and number not in runner.dropped
        }
        self._place = self._choose_place(batches, len(mine))
        self.hidden, self.dense = self._store("hidden"), self._store("dense")
        outside = _Outside(runner.model, stack, earlier, device, config.dtype)
        first = runner.model.get_submodule(stack.blocks[0])

        def run_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return first(*args, **kwargs)

        with outside:
            load_block(first, stack.blocks[0], runner.weights, device, config.dtype)
            try:
                required = [name for name in stack.blocks if units_below(runner.units, name)]
                capture = Capture(runner.model, stack, run_first, earlier, required)
                on_device = {
                    number: {key: value.to(device) for key, value in batch.items()} for number, batch in mine.items()
                }
                self.captured = capture.run(on_device, self._keep)
            finally:
                unload_block(first)
        self._require_some()
        self.all_captured = self._captured_by_all()

    def _captured_by_all(self) -> Captured:
        """The arguments of all batches, in the first process, which learns from all of them."""
        if world()[1] == 1 or self.runner.config.tune is None:
            return self.captured
        if any(gather(self.captured.has_state)):
            raise PlanError("blocks of this model share keys and values; learning them takes a single process")
        together = Captured()
        for source in range(world()[1]):
            arguments, keyword = share(self.captured.on_cpu() if world()[0] == source else None, source)
            if world()[0] == 0 and arguments:
                together.arguments |= arguments
                together.keyword = keyword
        return together

    def _choose_place(self, batches: Sequence[dict[str, Tensor]], mine: int) -> Any:
        config: Any = self.runner.model.config
        width = getattr(config.get_text_config(decoder=True), "hidden_size", 0) or 4096
        tokens = max((batch["input_ids"].numel() for batch in batches), default=0)
        nbytes = mine * tokens * width * (self.runner.config.dtype or torch.bfloat16).itemsize
        return choose_place(nbytes * (1 + self.runner.dense_stream), self.runner.device, self.runner.config.host_limit)

    def _store(self, name: str) -> Activations:
        folder = self.runner.job.folder / "activations" / self._stack.name / f"{name}-{world()[0]}"
        if self._place == "disk":
            folder.mkdir(parents=True, exist_ok=True)
        return Activations(self._place, self.runner.device, folder)

    def _keep(self, batch: int, hidden: Tensor) -> None:
        if not bool(torch.isfinite(hidden).all()):
            self.runner.dropped.add(batch)
            self.runner.left_out.append(
                f"{len(hidden)} calibration sequences were left out: the model's embeddings of them are NaN or infinite"
            )
            return
        self.hidden.put(batch, hidden)
        if self.runner.dense_stream:
            self.dense.put(batch, hidden)

    def _require_some(self) -> None:
        if not any(gather(len(self.hidden))):
            raise PlanError("no calibration sequence is usable: all give NaN or infinite numbers in this model")

    def first_owner(self) -> int:
        """The process that has the first of all batches."""
        return next(rank for rank, count in enumerate(gather(len(self.hidden))) if count)

    def leaves(self) -> Iterator[tuple[int, list[int]]]:
        """This process's runs of batches."""
        alive = list(self.hidden)
        for leaf in range(LEAVES):
            if owner_of(leaf) == world()[0]:
                yield leaf, [batch for batch in alive if leaf_of(batch, self.total) == leaf]

    def advance(self, block: nn.Module, dense: nn.Module | None, position: int) -> float | None:
        """Carry the activations through a block; returns the relative squared error behind it, where it is known."""
        finite: dict[int, Tensor] = {}
        measured: dict[int, Tensor] = {}
        for batch in list(self.hidden):  # nothing in here waits for a GPU
            out = self.captured.call(block, position, batch, self.hidden.get(batch))
            finite[batch] = torch.isfinite(out).all()
            self.hidden.put(batch, out)
            if dense is not None:
                wanted = self.captured.call(dense, position, batch, self.dense.get(batch), dense=True)
                self.dense.put(batch, wanted)
                error = (out.float() - wanted.float()).square().sum()
                measured[batch] = torch.stack([error, wanted.float().square().sum()])
        for batch, fine in finite.items():
            if not bool(fine):
                self._drop(batch, len(self.hidden.get(batch)), self._stack.blocks[position])
        self._require_some()
        errors = {batch: entry.tolist() for batch, entry in measured.items() if bool(finite[batch])}
        found = [errors[batch] for errors in gather(errors) for batch in sorted(errors)]
        error, norm = sum(entry[0] for entry in found), sum(entry[1] for entry in found)
        return error / norm if norm else None

    def _drop(self, batch: int, sequences: int, block: str) -> None:
        self.hidden.drop(batch)
        self.dense.drop(batch)
        self.runner.dropped.add(batch)
        self.runner.left_out.append(
            f"{sequences} calibration sequences were left out: {block} gives NaN or infinite numbers for them"
        )


class _Outside:
    """Everything but the blocks on the device for as long as a stack is captured."""

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        earlier: Sequence[tuple[Stack, Any, Any]],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        moved: dict[int, Any] = {}
        for module in self.model.modules():
            for own in (module._parameters, module._buffers):
                for name, value in own.items():
                    if value is not None and not value.is_meta:
                        self._before.append((own, name, value))
                        own[name] = moved.setdefault(id(value), self._moved(value))

    def _moved(self, value: Tensor) -> Tensor:
        cast = self.dtype if self.dtype is not None and isinstance(value, nn.Parameter) else value.dtype
        found = value.detach().to(self.device, cast if value.is_floating_point() else value.dtype)
        return nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found

    def __exit__(self, *_: object) -> None:
        for own, name, value in self._before:
            own[name] = value
        self._before.clear()
