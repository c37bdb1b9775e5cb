"""Quantizing a model block by block, each from what it sees behind the blocks that are quantized already.

Memory holds one block, its calibration activations (which may be files), and what its algorithm needs. Finished blocks
are filed in the job; a run that was stopped runs the finished ones again, quantized, to see what the next one sees.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.statistics import DEVIATION, Statistics
from lowbit.calibration.activations import HOST_LIMIT
from lowbit.calibration.capture import Captured
from lowbit.calibration.distributed import (
    gather,
    share,
    world,
)
from lowbit.calibration.flow import Flow
from lowbit.calibration.job import BlockResult, Job
from lowbit.calibration.solving import put_dense, put_result
from lowbit.calibration.stacks import Stack
from lowbit.calibration.streaming import ReadAhead, load_block, missing_names, unload_block
from lowbit.calibration.tune import TuneConfig
from lowbit.calibration.units import Unit, units_below
from lowbit.calibration.work import BlockWork
from lowbit.errors import PlanError

Prepare = Callable[[nn.Module, str, Sequence[Unit], Mapping[str, Statistics], Callable[[nn.Module], Tensor]], list[str]]


class Tell(Protocol):
    """Is told how far the work is."""

    def __call__(self, done: int, description: str | None = None) -> object: ...


@dataclass(frozen=True)
class RunConfig:
    """How to work on a block.

    Attributes:
        algorithm_of: the algorithm of a unit, by its name.
        true_sequential: whether what runs later in a block is calibrated behind what is quantized already.
        tune: learn codes and scales of each block afterwards.
        transform: changes every block as soon as it is loaded, the dense model being what comes out (rotations); called
            with the block.
        prepare: may change a block before it is quantized without changing what it computes (AWQ's scales); is given
            the block, its name, its units, their statistics, and something that runs the block. Returns notes.
        prepare_needs: the statistics that `prepare` wants.
        dtype: what blocks compute in; None for what their weights are.
        host_limit: bytes of the host's memory that activations may take before they become files.
    """

    algorithm_of: Callable[[str], Algorithm]
    true_sequential: bool = True
    tune: TuneConfig | None = None
    transform: Callable[[nn.Module], None] | None = None
    prepare: Prepare | None = None
    prepare_needs: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None
    host_limit: int = HOST_LIMIT


class Runner:
    """Quantizes the stacks of a model.

    Args:
        model: its blocks on the meta device, the rest in memory.
        weights: the blocks' parameters by full name.
        units: what is quantized.
        config: how.
        job: where finished blocks go.
        device: where the work is done.
        tell: called with 1 after each block, and with a description in between.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        units: Sequence[Unit],
        config: RunConfig,
        job: Job,
        device: torch.device,
        tell: Tell = lambda done, description=None: None,
    ) -> None:
        self.model, self.units, self.config = model, units, config
        self.weights = ReadAhead(weights)
        self.job, self.device, self.tell = job, device, tell
        self.notes: list[str] = []
        self.left_out: list[str] = []  # notes on this process's batches
        self.dropped: set[int] = set()
        algorithms = [config.algorithm_of(unit.name) for unit in units]
        self.dense_stream = config.tune is not None or any(DEVIATION in one.needs for one in algorithms)

    def run(self, stacks: Sequence[Stack], batches: Sequence[dict[str, Tensor]]) -> None:
        """Quantize every block of every stack.

        Args:
            stacks: in the order in which they run.
            batches: what the model is called with, by name; the same in every process.

        Raises:
            PlanError: no batch is usable, or a block gives NaN or infinite numbers.
            OSError: a finished block can't be filed.
        """
        self.model.eval()
        earlier: list[tuple[Stack, Callable[[int], Tensor], Captured]] = []
        number = 0
        names = [name for stack in stacks for name in stack.blocks]
        with torch.no_grad():
            for stack in stacks:
                flow = Flow(self, stack, batches, earlier)
                for position, name in enumerate(stack.blocks):
                    self._block(flow, number, position, name, names[number + 1 : number + 2])
                    number += 1
                earlier.append((stack, flow.hidden.get, flow.captured))
        for notes in gather(self.left_out):
            self.notes.extend(notes)

    def _block(self, flow: Flow, number: int, position: int, name: str, following: list[str]) -> None:
        started = time.perf_counter()
        block, units = self.model.get_submodule(name), units_below(self.units, name)
        load_block(block, name, self.weights, self.device, self.config.dtype)
        for other in following:
            self.weights.start(missing_names(self.model.get_submodule(other), other))
        if self.config.transform is not None:
            self.config.transform(block)
        try:
            result = self._filed(number)
            dense = copy.deepcopy(block) if self.dense_stream else None
            if result is None:
                work = BlockWork(self, flow, position, name, block, dense, units)
                result = work.run()
                result.report |= {"block": number, "name": name, "seconds": time.perf_counter() - started}
                put_dense(block, name, result)
                error = flow.advance(block, dense, position)
                result.report["output_error"] = error
                self.job.save(number, result)
            else:
                put_result(block, name, units, result)
                flow.advance(block, dense, position)
        finally:
            unload_block(block)
        self.notes.extend(result.report.get("notes", ()))
        self.tell(1, name)

    def _filed(self, number: int) -> BlockResult | None:
        """What an earlier run filed of a block; the first process says whether there is something."""
        first = world()[0] == 0
        result = self.job.load(number) if first else None
        if not share(result is not None, 0):
            return None
        result = result if first else self.job.load(number)
        if result is None:
            raise PlanError(
                f"block {number} of the job in '{self.job.folder}' can't be read by every process; "
                "give a folder that all of them see"
            )
        return result
