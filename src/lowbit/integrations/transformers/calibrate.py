"""A dense checkpoint, calibration data and a quantization config in, a quantized checkpoint out; all streamed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.algorithms import Algorithm
from lowbit.calibration.data import Calibration, check_ids
from lowbit.calibration.distributed import gather, world
from lowbit.calibration.job import BlockResult, Job
from lowbit.calibration.memory import free_memory
from lowbit.calibration.rounding import can_learn
from lowbit.calibration.runner import RunConfig, Runner, Tell
from lowbit.calibration.stacks import Stack, block_lists, find_stacks
from lowbit.calibration.tune import Distillation, Student, TuneConfig
from lowbit.calibration.units import Unit, find_units
from lowbit.core import Grouping, Kept, Plan, QuantSpec, QuantTensor
from lowbit.errors import PlanError
from lowbit.integrations.transformers.assemble import Assembly, Results, write_report
from lowbit.integrations.transformers.quantizer import LowbitQuantizer
from lowbit.integrations.transformers.rotating import Rotated, rotate_streamed
from lowbit.integrations.transformers.streaming import Streamed, auto_class_of, model_identity, stream_model

_BATCH_TOKENS: Final = 8192
_VERSIONS: Final = ("torch", "transformers", "lowbit")
_ROWS: Final = 4096  # of the embedding that are looked at together
_LEARNING_BYTES: Final = 32  # per weight that is learned: itself, its offset, gradients, Adam's moments, and slack


@dataclass(frozen=True)
class Calibrated:
    """How to quantize with calibration data.

    Attributes:
        algorithm_of: the algorithm of a weight, by its module's name.
        label: of the method, for reports.
        true_sequential: see :class:`RunConfig`.
        tune: learn each block's codes and scales against the dense block.
        distill: learn all codes, scales and norms against the dense model at the end; it has to fit the device.
        permuted: whether groups are made of columns by falling activation, which then are stored (act-order).
        prepare: see :class:`RunConfig`.
        prepare_needs: see :class:`RunConfig`.
        batch_tokens: how many tokens go through a block at once.
        seconds: for `distill`, the time that may be spent; fewer epochs are done where more would take longer.
        rotate: whether the residual stream and the heads are rotated first, merged into the weights.
        seed: of the rotation.
        settings: JSON data that tells this method's results from those of others.
    """

    algorithm_of: Callable[[str], Algorithm]
    label: str
    true_sequential: bool = True
    tune: TuneConfig | None = None
    distill: TuneConfig | None = None
    permuted: bool = False
    prepare: Any = None
    prepare_needs: frozenset[str] = frozenset()
    batch_tokens: int = _BATCH_TOKENS
    seconds: float | None = None
    rotate: bool = False
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


class CalibratedRun:
    """One run, from the plan to the finished checkpoint.

    Args:
        source: folder of the dense checkpoint.
        config: the quantization config.
        method: how the numbers are chosen.
        calibration: the data.
        folder: of the job; made if need be, and taken up where it was left.
        device: where the work is done.

    Raises:
        PlanError: the model can't be loaded, nothing would be quantized, or an algorithm can't make what is asked for.
    """

    def __init__(
        self,
        source: Path,
        config: Any,
        method: Calibrated,
        calibration: Calibration,
        folder: Path,
        device: torch.device,
    ) -> None:
        if not calibration.samples:
            raise PlanError("there are no calibration samples; give data that holds some")
        self.source, self.method, self.calibration, self.device = source, method, calibration, device
        self.folder = folder
        self.started = time.perf_counter()
        rank = world()[0]  # each process writes its own: one may still read what another would write anew
        self._offload = folder.with_name(f"{folder.name}.weights{f'-{rank}' if rank else ''}")
        existed = folder.exists()
        self.job = Job(folder, writes=rank == 0)
        try:
            self._open(config)
        except BaseException:
            self.close()
            if rank == 0 and not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _open(self, config: Any) -> None:
        self.streamed: Streamed = stream_model(self.source, self._offload)
        self.calibration = usable_samples(self.calibration, self.streamed.model.get_input_embeddings().weight)
        self.quantizer = plan_for(self.streamed.model, config, self.streamed.dtype)
        self.units = [self._completed(unit) for unit in find_units(self.streamed.model, self.plan)]
        self.stacks: list[Stack] = find_stacks(self.streamed.model, self.units)
        self.blocks = sum(len(stack.blocks) for stack in self.stacks)
        self._check()
        self.rotated = self._rotate() if self.method.rotate else None
        self.job.identify(self._identity())
        gather(None)  # nobody puts anything into the folder before the first process has looked at it

    def _identity(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            "model": model_identity(self.source),
            "data": {"fingerprint": self.calibration.fingerprint, "batch_tokens": self.method.batch_tokens},
            "config": self.quantizer.quantization_config.to_dict(),
            "method": method_identity(self.method, [unit.name for unit in self.units]),
            "versions": {**versions(), "device": device_name(self.device)},
        }

    @property
    def plan(self) -> Any:
        if self.quantizer.plan is None:
            raise PlanError("the model has no plan yet")
        return self.quantizer.plan

    def _completed(self, unit: Unit) -> Unit:
        """With the spec for this model's dtype, and with permuted groups where they are asked for."""
        name = unit.full_parameter if unit.expert is not None else unit.module
        spec = self.quantizer.planned(name, self.streamed.dtype)
        if self.method.permuted and spec.grouping.cols:
            spec = replace(spec, grouping=Grouping.groups(spec.grouping.cols, permuted=True))
        return replace(unit, spec=spec)

    def _check(self) -> None:
        inside = {block for stack in self.stacks for block in stack.blocks}
        for unit in self.units:
            algorithm = self.method.algorithm_of(unit.name)
            if not algorithm.supports(unit.spec):
                raise PlanError(f"{unit.name}: {algorithm.name} can't make '{unit.spec}'")
            if not any(unit.module.startswith(f"{block}.") or unit.module == block for block in inside):
                raise PlanError(f"{unit.name} is outside of the repeated blocks, which are what is calibrated; skip it")

    def _rotate(self) -> Rotated:
        if self.method.distill is not None:
            raise PlanError("a rotated model is not learned against the dense one; leave one of the two out")
        if len(self.stacks) != 1:
            raise PlanError(f"a rotated model has one stack of blocks, this one has {len(self.stacks)}")
        tokens = next(iter(self.batches()))["input_ids"]
        return rotate_streamed(self.streamed, self.stacks[0], tokens, self.method.seed)

    def close(self) -> None:
        """Let others at the job, and remove what only this run needed."""
        self.job.close()
        shutil.rmtree(self._offload, ignore_errors=True)

    def run(self, tell: Tell = lambda done, description=None: None) -> None:
        """Quantize all blocks, and learn afterwards where that is asked for."""
        method = self.method
        config = RunConfig(
            algorithm_of=method.algorithm_of,
            true_sequential=method.true_sequential,
            tune=method.tune,
            transform=None if self.rotated is None else self.rotated.rotate_block,
            prepare=method.prepare,
            prepare_needs=method.prepare_needs,
            dtype=torch.float32 if self.device.type == "cpu" else None,
        )
        runner = Runner(self.streamed.model, self.streamed.weights, self.units, config, self.job, self.device, tell)
        self.notes = runner.notes
        learns = method.distill is not None and world()[0] == 0 and not self._has_learned()
        if learns:
            self._check_fits()  # rather than after all blocks
        with solid_matmuls():
            runner.run(self.stacks, list(self.batches()))
            if method.distill is not None and learns:
                self._distill(method.distill, tell)
        if world()[1] > 1:
            torch.distributed.barrier()
        shutil.rmtree(self.folder / "activations", ignore_errors=True)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """What the model is called with, batch by batch."""
        size = max(1, self.method.batch_tokens // max(1, self.calibration.longest))
        encodes = bool(getattr(self.streamed.model.config, "is_encoder_decoder", False))
        for ids in self.calibration.batches(size):
            yield {"input_ids": ids, **({"decoder_input_ids": ids} if encodes else {})}

    # -------------------------------------------------------------------------------------------------------- learning

    def _has_learned(self) -> bool:
        return self.job.finished(self.blocks + 1, "learned") == self.blocks + 1

    def _distill(self, config: TuneConfig, tell: Tell) -> None:
        """Learn against the dense model, an epoch at a time; state is kept after each."""
        self._check_fits()
        model = auto_class_of(self.streamed.model.config).from_pretrained(
            self.source, dtype=torch.float32, device_map={"": str(self.device)}
        )
        model.eval()
        quantized = {
            name: tensor for number in range(self.blocks) for name, tensor in self._block(number).units.items()
        }
        learnable = [unit for unit in self.units if can_learn(unit.spec)]
        tokens = torch.stack([sample for sample in self.calibration.samples if len(sample) == self.calibration.longest])
        student = Student(model, "", learnable, quantized, config)
        work = Distillation(student, tokens, self.device)
        kept = self.job.load_state("learning")
        if kept is not None:
            work.restore(*_step_of(kept))
        with torch.enable_grad():
            self._learn(work, tell)
        units, dense = student.finish()
        self._file(units, dense)

    def _learn(self, work: Distillation, tell: Tell) -> None:
        while work.step < work.steps:
            began = time.perf_counter()
            work.run_epoch(lambda done: tell(0, f"learning: step {work.step} of {work.steps}"))
            if self.method.seconds is not None and work.step == work.per_epoch:
                self._shorten(work, time.perf_counter() - began)
            if work.step < work.steps:
                self.job.save_state("learning", work.state(), {"step": work.step, "steps": work.steps})

    def _shorten(self, work: Distillation, epoch_seconds: float) -> None:
        """Settle, once, how many epochs there is time for."""
        left = max(0.0, (self.method.seconds or 0.0) - (time.perf_counter() - self.started))
        epochs = self.job.decide(
            "epochs", lambda: max(1, min(work.student.config.epochs, 1 + int(left / epoch_seconds)))
        )
        work.steps = min(work.steps, work.per_epoch * int(epochs))

    def _check_fits(self) -> None:
        count = sum(parameter.numel() for parameter in self.streamed.model.parameters())
        needed = count * _LEARNING_BYTES
        free = free_memory(self.device)
        if needed > free:
            raise PlanError(
                f"learning against the dense model takes {needed / 2**30:.1f} GiB on {self.device}, where "
                f"{free / 2**30:.1f} GiB are free; leave it out, or use a larger device"
            )

    def _block(self, number: int) -> BlockResult:
        found = self.job.load(number)
        if found is None:
            raise PlanError(f"block {number} of the job in '{self.folder}' is damaged; run again")
        return found

    def _file(self, units: dict[str, QuantTensor], dense: dict[str, Tensor]) -> None:
        dtype_of = {name: parameter.dtype for name, parameter in self.streamed.model.named_parameters()}
        dense = {name: value.to("cpu", dtype_of[name]) for name, value in dense.items()}
        for number in range(self.blocks):
            before = self._block(number)
            learned = {name: units.get(name, tensor) for name, tensor in before.units.items()}
            inside = {name: dense.pop(name) for name in list(dense) if name.startswith(f"{before.report['name']}.")}
            self.job.save(number, BlockResult(learned, before.dense | inside, before.report), "learned")
        self.job.save(self.blocks, BlockResult({}, dense, {}), "learned")

    # --------------------------------------------------------------------------------------------------------- writing

    def write(self, folder: Path, advance: Callable[[int], object] = lambda done: None) -> None:
        """Write the finished checkpoint into an empty folder."""
        self.quantizer._describe_in_config()
        model, changes = self.streamed.model, {} if self.rotated is None else self.rotated.config
        assembly = Assembly(self.source, model, self.quantizer, self.units, self.results(), changes)
        assembly.write(folder, advance)
        write_report(folder, self.report())

    def results(self) -> Results:
        """What the job has of every unit."""
        if self.method.distill is not None:
            return Results(self.job, self.blocks + 1, "learned")
        return Results(self.job, self.blocks, "blocks", None if self.rotated is None else self.rotated.outside)

    def report(self) -> dict[str, Any]:
        """What ``quantization_report.json`` says."""
        blocks = [self.job.report(number) for number in range(self.blocks)]
        layers = [{**layer, "block": block["block"]} for block in blocks for layer in block["layers"]]
        data = self.calibration
        return {
            "version": 1,
            "method": self.method.label,
            "format": self.quantizer.recipe.wire.name,
            "model": self.source.name,
            "seconds": sum(block["seconds"] for block in blocks),
            "versions": versions(),
            "calibration": {
                "description": data.description,
                "tokens": data.tokens,
                "samples": len(data.samples),
                "length": data.longest,
            },
            "settings": _plain(self.method.settings),
            "layers": layers,
            "blocks": [{key: block.get(key) for key in ("block", "output_error", "seconds")} for block in blocks],
            "notes": [*data.notes, *(self.rotated.notes if self.rotated else ()), *getattr(self, "notes", ())],
        }


def plan_for(model: Any, config: Any, dtype: torch.dtype) -> LowbitQuantizer:
    """The quantizer of a config, with its plan for a model on any device that is to be calibrated."""
    quantizer = LowbitQuantizer(config, pre_quantized=False)
    quantizer._plan_dense(model, None, dtype, calibrated=True)
    if quantizer.plan is not None:
        quantizer.plan = _calibrated_part(quantizer.plan, model)
    return quantizer


def _calibrated_part(plan: Plan, model: Any) -> Plan:
    """A plan that keeps dense what calibration doesn't see: what isn't in a repeated block, or not reached by text."""
    text, lists = text_part(model), tuple(f"{name}." for name in block_lists(model))

    def fate(name: str, entry: QuantSpec | Kept) -> QuantSpec | Kept:
        if isinstance(entry, Kept):
            return entry
        if not name.startswith(f"{text}." if text else ""):
            return Kept(f"not a part of {text}, and so not reached by text")
        return entry if name.startswith(lists) else Kept("not in a repeated block, which are what is calibrated")

    kept = Plan({name: fate(name, entry) for name, entry in plan.entries.items()}, plan.shapes)
    if not kept.quantized:
        raise PlanError(f"nothing that is calibrated would be quantized:\n{kept}")
    return kept


def text_part(model: Any) -> str:
    """The module of a model of several kinds of input that decodes text; empty where text goes through all of it."""
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True) is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def usable_samples(calibration: Calibration, embedding: Tensor) -> Calibration:
    """The samples without tokens whose rows of the embedding ``[vocabulary, features]`` are NaN or infinite.

    Raises:
        PlanError: no sample is left, or a token has no row.
    """
    check_ids(embedding.shape[0], calibration)
    used = torch.cat(calibration.samples).unique()
    finite = torch.cat([torch.isfinite(embedding[part]).all(-1) for part in used.split(_ROWS)])
    if bool(finite.all()):
        return calibration
    damaged = used[~finite]
    kept = [sample for sample in calibration.samples if not bool(torch.isin(sample, damaged).any())]
    without = f"the model's embeddings of {len(damaged)} tokens ({damaged[:4].tolist()}) are NaN or infinite"
    if not kept:
        raise PlanError(f"no calibration sequence is usable: {without}, and each has one of them")
    left_out = len(calibration.samples) - len(kept)
    note = f"{left_out} calibration sequences were left out: {without}"
    return replace(calibration, samples=kept, notes=[*calibration.notes, note])


def method_identity(method: Calibrated, units: Sequence[str]) -> dict[str, Any]:
    """What tells a method's results from those of others: all its settings, and which algorithm each unit has."""
    numbers: dict[int, int] = {}
    algorithms: list[Algorithm] = []
    assigned: list[int] = []
    for unit in units:
        algorithm = method.algorithm_of(unit)
        if id(algorithm) not in numbers:
            numbers[id(algorithm)] = len(algorithms)
            algorithms.append(algorithm)
        assigned.append(numbers[id(algorithm)])
    return {
        "name": method.label,
        "algorithms": _traits(algorithms),
        "assigned": hashlib.sha256(bytes(json.dumps(assigned), "ascii")).hexdigest(),
        "prepare": _traits(method.prepare),
        "tune": tune_settings(method.tune),
        "distill": tune_settings(method.distill),
        **{key: getattr(method, key) for key in ("true_sequential", "permuted", "rotate", "seed", "seconds")},
        "settings": _plain(method.settings),
    }


def _traits(value: Any) -> Any:
    """JSON data that is the same for objects of one class with the same public attributes."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _traits(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_traits(entry) for entry in value]
    if not hasattr(value, "__dict__"):
        return str(value)
    public = {key: entry for key, entry in vars(value).items() if not key.startswith("_")}
    return {"class": type(value).__qualname__, **_traits(public)}


def versions() -> dict[str, str]:
    """Of what results depend on."""
    return {package: _version(package) for package in _VERSIONS}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def device_name(device: torch.device) -> str:
    """Results on different kinds of devices differ in their last bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def repeatable() -> Iterator[None]:
    """Sums in the order that makes them come out the same every time."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def solid_matmuls() -> Iterator[None]:
    """:func:`repeatable`, and products of 16-bit numbers exactly."""
    before = torch.backends.cuda.matmul.allow_tf32
    # The inputs of Hessians are 16-bit numbers, which TF32 holds; their products are added in fp32.
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with repeatable():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _step_of(kept: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], int]:
    return kept[0], int(kept[1]["step"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def tune_settings(config: TuneConfig | None) -> dict[str, Any] | None:
    """As JSON data."""
    return None if config is None else asdict(config)
