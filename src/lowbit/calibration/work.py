"""One block on its way from dense to quantized: stages, statistics, solving, learning."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.algorithms.report import LayerReport
from lowbit.algorithms.statistics import DEVIATION, Statistics
from lowbit.calibration.distributed import (
    gather,
    share,
    share_quantized,
    share_tensor,
    world,
)
from lowbit.calibration.flow import Flow
from lowbit.calibration.job import BlockResult
from lowbit.calibration.observe import Watch, execution_stages
from lowbit.calibration.rounding import can_learn
from lowbit.calibration.solving import describe, put_unit, solve
from lowbit.calibration.statistics import Key, Leaf, combine, input_groups, widen, without_deviation
from lowbit.calibration.tune import Student, TuneConfig, tune_block
from lowbit.calibration.units import Unit
from lowbit.core import QuantTensor
from lowbit.errors import PlanError

if TYPE_CHECKING:
    from lowbit.calibration.runner import Runner


class BlockWork:
    """One block on its way from dense to quantized."""

    def __init__(
        self,
        runner: Runner,
        flow: Flow,
        position: int,
        name: str,
        block: nn.Module,
        dense: nn.Module | None,
        units: list[Unit],
    ) -> None:
        self.runner, self.flow, self.position = runner, flow, position
        self.name, self.block, self.dense, self.units = name, block, dense, units
        self.result = BlockResult()
        self.reports: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def run(self) -> BlockResult:
        if self.units:
            stages = self._stages()
            if self.runner.config.prepare is not None:
                self._prepare(stages)
            sequential = self.runner.config.true_sequential
            for together in [[stage] for stage in stages] if sequential else [stages]:
                self._quantize(together)
            if self.runner.config.tune is not None:
                self._tune(self.runner.config.tune)
        self.result.dense |= self._changed()
        self.result.report = {"layers": [self.reports[unit.name] for unit in self.units], "notes": self.notes}
        return self.result

    def _call(self, block: Any, batch: int) -> Tensor:
        return self.flow.captured.call(block, self.position, batch, self.flow.hidden.get(batch))

    def _stages(self) -> list[list[Unit]]:
        """Settled by the process that has the first batch: other batches may reach other experts."""
        source = self.flow.first_owner()
        names: list[list[str]] = []
        if world()[0] == source:
            first = next(iter(self.flow.hidden))
            stages = execution_stages(self.block, self.name, self.units, lambda: self._call(self.block, first))
            names = [[unit.name for unit in stage] for stage in stages]
        by_name = {unit.name: unit for unit in self.units}
        return [[by_name[name] for name in stage] for stage in share(names, source)]

    # ----------------------------------------------------------------------------------------------------- statistics

    def _statistics(self, groups: dict[Key, list[Unit]], needs: frozenset[str]) -> dict[Key, Statistics]:
        if not needs:
            return {key: Statistics() for key in groups}
        return combine(self._leaves(groups, needs), groups, needs, self.runner.device)

    def _leaves(self, groups: dict[Key, list[Unit]], needs: frozenset[str]) -> Iterator[tuple[int, Leaf]]:
        first = {units[0].name: key for key, units in groups.items()}
        watched = [units[0] for units in groups.values()]
        for number, batches in self.flow.leaves():
            leaf = Leaf(needs)
            for batch in batches:
                self._see(batch, watched, first, leaf)
            for name, key in first.items():
                with _overflows(name):
                    leaf.check(key)
            yield number, leaf

    def _see(self, batch: int, watched: list[Unit], first: dict[str, Key], leaf: Leaf) -> None:
        dense: dict[str, Tensor] = {}
        if DEVIATION in leaf.needs and (dense_block := self.dense) is not None:
            with Watch(
                dense_block, self.name, watched, lambda unit, rows: dense.update({unit.name: rows}), stop=True
            ) as watch:
                hidden = self.flow.dense.get(batch)
                watch.run(lambda: self.flow.captured.call(dense_block, self.position, batch, hidden, dense=True))

        def see(unit: Unit, rows: Tensor) -> None:
            # An expert's rows are other tokens in the dense model, whose router sees other numbers.
            theirs = dense.get(unit.name) if unit.expert is None else None
            with _overflows(unit.name):
                leaf.add(first[unit.name], rows, theirs if theirs is not None and theirs.shape == rows.shape else None)

        with Watch(self.block, self.name, watched, see, stop=True) as watch:
            watch.run(lambda: self._call(self.block, batch))

    # ------------------------------------------------------------------------------------------------------- quantize

    def _prepare(self, stages: list[list[Unit]]) -> None:
        """Let the process that has the first batch change the block, and all others take it over."""
        config, source = self.runner.config, self.flow.first_owner()
        groups = input_groups(stages)
        found = self._statistics(groups, config.prepare_needs)
        statistics = {unit.name: found[key] for key, units in groups.items() for unit in units}
        notes: list[str] = []
        if config.prepare is not None and world()[0] == source:
            first = next(iter(self.flow.hidden))
            notes = config.prepare(
                self.block, self.name, self.units, statistics, lambda block: self._call(block, first)
            )
        self.notes.extend(share(notes, source))
        if world()[1] > 1:
            for parameter in self.block.parameters():
                changed = share_tensor(parameter.data, source, self.runner.device)
                if changed is not None:
                    parameter.data.copy_(changed)

    def _quantize(self, stages: list[list[Unit]]) -> None:
        """Quantize units, all by what they see now."""
        needs = frozenset[str]().union(
            *(self.runner.config.algorithm_of(unit.name).needs for stage in stages for unit in stage)
        )
        groups = input_groups(stages)
        statistics = self._statistics(groups, needs)
        self._give_back()
        widened = widen(statistics, {key: units[0].shape[1] for key, units in groups.items()})
        for number, (key, units) in enumerate(groups.items()):
            used, note = widened[key]
            used = without_deviation(used) if DEVIATION in needs else used
            self._solve(units, used, note, statistics[key].tokens, number % world()[1])
        self._give_back()

    def _give_back(self) -> None:
        """Sums, factors and activations differ in size so much that what torch keeps of one doesn't fit the next."""
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _solve(self, units: list[Unit], statistics: Statistics, note: str | None, tokens: int, source: int) -> None:
        """Quantize units with the same inputs in the process `source`, and take them over in all."""
        started = time.perf_counter()
        made: list[tuple[QuantTensor, LayerReport]] = []
        if world()[0] == source:
            made = solve(units, [self._weight(unit) for unit in units], statistics, self.runner.config.algorithm_of)
        for number, unit in enumerate(units):
            self._take(unit, share_quantized(made[number][0] if made else None, source))
        seconds = (time.perf_counter() - started) / len(units)
        extra = [note] if note else []
        described = [
            describe(unit, tensor, report, [*report.notes, *extra], tokens, seconds)
            for unit, (tensor, report) in zip(units, made, strict=bool(made))
        ]
        for found in share(described, source):
            self.reports[found["name"]] = found
            self.runner.tell(0, f"{found['name']}: error {found['output_error']:.2e}")

    def _weight(self, unit: Unit) -> Tensor:
        return unit.weight(self._module(unit)).float()

    def _module(self, unit: Unit) -> nn.Module:
        return self.block.get_submodule(unit.module.removeprefix(self.name).removeprefix("."))

    def _take(self, unit: Unit, tensor: QuantTensor) -> None:
        self.result.units[unit.name] = tensor.to("cpu")
        put_unit(self._module(unit), unit, tensor)

    def _tune(self, config: TuneConfig) -> None:
        """Learn in the first process; the block's target is what the dense model has behind it."""
        learnable = [unit for unit in self.units if can_learn(unit.spec)]
        if not learnable or self.dense is None:
            return
        inputs, targets = self._everywhere(self.dense)
        units: dict[str, QuantTensor] = {}
        norms: dict[str, Tensor] = {}
        ratio = 1.0
        if world()[0] == 0:
            student = self._student(self.dense, learnable, config)
            with torch.enable_grad():
                ratio = tune_block(student, self._call_any, inputs, targets.__getitem__, list(targets))
            units, norms = student.finish()
        ratio, norms = share((ratio, {name: value.to("cpu") for name, value in norms.items()}), 0)
        for unit in learnable:
            self._take(unit, share_quantized(units.get(unit.name), 0))
            self.reports[unit.name]["tuned"] = ratio
        for name, value in norms.items():
            own = self.block.get_parameter(name.removeprefix(f"{self.name}."))
            own.data.copy_(value)

    def _call_any(self, block: Callable[..., Any], batch: int, hidden: Tensor) -> Tensor:
        return self.flow.all_captured.call(block, self.position, batch, hidden)

    def _student(self, dense: nn.Module, learnable: list[Unit], config: TuneConfig) -> Student:
        module = copy.deepcopy(dense)  # what isn't learned computes as it is quantized
        for unit in self.units:
            if unit not in learnable:
                put_unit(self._module_of(module, unit), unit, self.result.units[unit.name])
        return Student(module, self.name, learnable, self.result.units, config)

    def _everywhere(self, dense: nn.Module) -> tuple[Callable[[int], Tensor], dict[int, Tensor]]:
        """The inputs of the block and what the dense model has behind it, by batch.

        Of all batches in the first process, of its own ones in each other.
        """
        targets = {
            batch: self.flow.captured.call(dense, self.position, batch, self.flow.dense.get(batch), dense=True)
            for batch in self.flow.hidden
        }
        if world()[1] == 1:
            return self.flow.hidden.get, targets
        inputs: dict[int, Tensor] = {}
        for source, batches in enumerate(gather(list(targets))):
            for batch in batches:
                mine = world()[0] == source
                hidden = share_tensor(self.flow.hidden.get(batch) if mine else None, source, self.runner.device)
                target = share_tensor(targets[batch] if mine else None, source, self.runner.device)
                if world()[0] == 0 and hidden is not None and target is not None:
                    inputs[batch], targets[batch] = hidden, target
        return inputs.__getitem__, targets

    def _module_of(self, block: nn.Module, unit: Unit) -> nn.Module:
        return block.get_submodule(unit.module.removeprefix(self.name).removeprefix("."))

    def _changed(self) -> dict[str, Tensor]:
        """Parameters beside the units that are no longer what they were (scaled or learned norms)."""
        quantized = {unit.full_parameter for unit in self.units}
        changed: dict[str, Tensor] = {}
        for own, parameter in self.block.named_parameters():
            name = f"{self.name}.{own}"
            if name in quantized:
                continue
            before = self.runner.weights[name]
            if not torch.equal(parameter.detach().to("cpu", before.dtype), before.to("cpu")):
                changed[name] = parameter.detach().to("cpu", before.dtype)
        return changed


@contextmanager
def _overflows(name: str) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise PlanError(f"{name}: {error}; the model's activations overflow in this dtype") from error
