"""Quantizing a model block by block, each from what it sees behind the blocks that are quantized already.

Memory holds one block, its calibration activations (which may be files), and what its algorithm needs. Finished blocks
are filed in the job; a run that was stopped runs the finished ones again, quantized, to see what the next one sees.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit.algorithms.base import Algorithm
from lowbit.algorithms.report import LayerReport
from lowbit.algorithms.statistics import DEVIATION, HESSIAN, Statistics
from lowbit.calibration.activations import Activations, choose_place
from lowbit.calibration.capture import Capture, Captured
from lowbit.calibration.distributed import (
    LEAVES,
    gather,
    leaf_of,
    owner_of,
    owns,
    share,
    share_quantized,
    share_tensor,
    world,
)
from lowbit.calibration.job import BlockResult, Job
from lowbit.calibration.observe import Watch, execution_stages
from lowbit.calibration.rounding import can_learn
from lowbit.calibration.stacks import Stack
from lowbit.calibration.statistics import Key, Leaf, combine, input_groups, widen, without_deviation
from lowbit.calibration.streaming import ReadAhead, load_block, missing_names, unload_block
from lowbit.calibration.tune import Student, TuneConfig, tune_block
from lowbit.calibration.units import Unit, units_below
from lowbit.core import QuantTensor
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
    host_limit: int = 1 << 30


@dataclass
class _Progress:
    """What the runner says at the end, beside the blocks."""

    notes: list[str] = field(default_factory=list)


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
                flow = _Flow(self, stack, batches, earlier)
                for position, name in enumerate(stack.blocks):
                    self._block(flow, number, position, name, names[number + 1 : number + 2])
                    number += 1
                earlier.append((stack, flow.hidden.get, flow.captured))
        for notes in gather(self.left_out):
            self.notes.extend(notes)

    def _block(self, flow: _Flow, number: int, position: int, name: str, following: list[str]) -> None:
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
                work = _BlockWork(self, flow, position, name, block, dense, units)
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


class _Flow:
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


class _BlockWork:
    """One block on its way from dense to quantized."""

    def __init__(
        self,
        runner: Runner,
        flow: _Flow,
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


def solve(
    units: Sequence[Unit],
    weights: Sequence[Tensor],
    statistics: Statistics,
    algorithm_of: Callable[[str], Algorithm],
) -> list[tuple[QuantTensor, LayerReport]]:
    """Quantize weights ``fp32 [out, in]`` with the same inputs; algorithms that can do so share what they factorize.

    Raises:
        PlanError: a weight can't be quantized; names it, or those that were quantized together.
    """
    algorithms = [algorithm_of(unit.name) for unit in units]
    many = getattr(algorithms[0], "calibrated_many", None)
    if many is not None and all(one is algorithms[0] for one in algorithms):
        with _about(units):
            return list(many(list(weights), [unit.spec for unit in units], statistics))
    made = []
    for unit, weight, algorithm in zip(units, weights, algorithms, strict=True):
        single = getattr(algorithm, "calibrated_with_report", None)
        with _about([unit]):
            if single is not None:
                made.append(single(weight, unit.spec, statistics))
                continue
            tensor = algorithm.calibrated(weight, unit.spec, statistics)
        made.append((tensor, measure(weight, tensor, statistics)))
    return made


@contextmanager
def _about(units: Sequence[Unit]) -> Iterator[None]:
    """Let errors of an algorithm, which knows no names, say what they are about."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{', '.join(unit.name for unit in units)}: {error}") from error


def measure(weight: Tensor, tensor: QuantTensor, statistics: Statistics) -> LayerReport:
    """The errors of a weight ``fp32 [out, in]`` that an algorithm made which doesn't report any."""
    difference = weight - tensor.to(str(weight.device)).dequantize()
    relative = float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    output = relative
    if statistics.hessian is not None:
        output = _quadratic(difference, statistics.hessian) / max(1e-30, _quadratic(weight, statistics.hessian))
    elif (importance := statistics.importance()) is not None:
        output = float((difference.square() @ importance).sum() / (weight.square() @ importance).sum().clamp(min=1e-30))
    return LayerReport(0.0, 0, False, relative, output)


def _quadratic(weight: Tensor, hessian: Tensor) -> float:
    return float(((weight @ hessian) * weight).sum())


def describe(
    unit: Unit, tensor: QuantTensor, report: LayerReport, notes: list[str], tokens: int, seconds: float
) -> dict[str, Any]:
    """What the report of a run says of one unit."""
    facts = {key: value for key, value in asdict(report).items() if key != "notes"}
    return {
        "name": unit.name,
        "shape": list(unit.shape),
        "spec": str(tensor.spec),
        "bits_per_weight": tensor.bits_per_weight,
        **facts,
        "tokens": tokens,
        "seconds": seconds,
        "notes": notes,
    }


def put_unit(module: nn.Module, unit: Unit, tensor: QuantTensor) -> None:
    """Let a dense module compute with the quantized weight."""
    place = unit.weight(module)
    dense = tensor.to(str(place.device)).dequantize(tensor.spec.dtype)
    place.copy_(dense.to(place.dtype))


def put_result(block: nn.Module, prefix: str, units: Sequence[Unit], result: BlockResult) -> None:
    """Let a dense block compute as it was quantized before."""
    for unit in units:
        put_unit(block.get_submodule(unit.module.removeprefix(prefix).removeprefix(".")), unit, result.units[unit.name])
    put_dense(block, prefix, result)


def put_dense(block: nn.Module, prefix: str, result: BlockResult) -> None:
    """Let a block compute with its changed parameters as they are filed, which may be in a narrower dtype."""
    for name, value in result.dense.items():
        block.get_parameter(name.removeprefix(f"{prefix}.")).data.copy_(value)


__all__ = [
    "HESSIAN",
    "Prepare",
    "RunConfig",
    "Runner",
    "Tell",
    "describe",
    "measure",
    "put_dense",
    "put_result",
    "put_unit",
    "solve",
]
