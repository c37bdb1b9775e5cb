"""``lowbit quantize`` with calibration data: streamed, resumable, on one device or several."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lowbit.cli import console
from lowbit.cli.loading import device_map, load_tokenizer
from lowbit.cli.replace import check_target, replaced
from lowbit.cli.request import Format, Method, Request
from lowbit.errors import PlanError

if TYPE_CHECKING:
    import torch

    from lowbit.calibration.data import Calibration
    from lowbit.integrations.transformers.calibrate import Calibrated, CalibratedRun
    from lowbit.integrations.transformers.calibrated_methods import Settings

NAMES: Final = ("gptq", "awq", "autoround", "aqlm", "gguf", "best")
_FORMATS: Final = {
    "gptq": ("gptq", "awq", "compressed-tensors"),
    "awq": ("awq", "gptq", "compressed-tensors"),
    "autoround": ("gptq", "awq", "compressed-tensors"),
    "best": ("gptq", "compressed-tensors"),
    "aqlm": ("aqlm",),
    "gguf": ("gguf",),
}
_BUDGET: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_CODEBOOKS: Final = re.compile(r"(\d+)x(\d+)")
_PATIENCE: Final = timedelta(days=7)
_SAMPLES: Final = 128
_LENGTH: Final = 2048


@dataclass(frozen=True)
class CalibratedRequest:
    """The options; None where the user said nothing.

    Attributes:
        method: one of :data:`NAMES`.
        variant: what follows the method's name: a GGUF type, or AQLM's ``<codebooks>x<bits>``.
        settings: of the method.
        target_bits: for ``best``: bits per weight, everything that is stored counted.
        budget: for ``best``: seconds.
    """

    method: str
    settings: Settings
    variant: str = ""
    bits: int | None = None
    group_size: int | None = None
    form: Format | None = None
    skip: tuple[str, ...] = ()
    target_bits: float | None = None
    budget: float | None = None

    def check(self) -> None:
        """Refuse what can't be, before any work.

        Raises:
            PlanError: options contradict each other.
        """
        forms = _FORMATS[self.method]
        if self.form is not None and self.form.value not in forms:
            raise PlanError(f"{self.method} is written as {' or '.join(forms)}, not as {self.form.value}")
        if self.method != "best" and (self.target_bits is not None or self.budget is not None):
            raise PlanError(f"--target-bits and --budget are for best, not for {self.method}")
        if self.method != "gptq" and (self.settings.tune or self.settings.correction):
            raise PlanError(f"--tune and --correction are for gptq, not for {self.method}")
        if self.variant and self.method not in ("gguf", "aqlm"):
            raise PlanError(f"'{self.method}' has no variants; found '{self.variant}'")
        if self.method == "gguf" and not self.variant:
            raise PlanError("say which type: --method gguf:Q4_K_M, for example")
        if self.method == "best" and self.bits is None and self.target_bits is None:
            raise PlanError("best needs --bits or --target-bits")
        if self.settings.desc_act and self.method != "gptq":
            raise PlanError(f"--desc-act is for gptq, not for {self.method}")
        if self.group_size is not None and self.method in ("aqlm", "gguf", "best"):
            raise PlanError(f"{self.method} chooses what shares a scale itself, so that there is no group size")
        if self.settings.desc_act and self.written_as != "gptq" and not self.settings.static_groups:
            raise PlanError(f"--desc-act without --static-groups stores a group index, which {self.written_as} has not")
        if self.method != "best":
            self.config()

    @property
    def written_as(self) -> str:
        return self.form.value if self.form else _FORMATS[self.method][0]

    def config(self) -> Any:
        """The quantization config, for all methods but ``best``.

        Raises:
            PlanError: the format has no such weights.
        """
        if self.method == "gguf":
            return _gguf_config(self.variant, self.skip)
        if self.method == "aqlm":
            return _aqlm_config(self.variant, self.bits, self.skip)
        rounding = Request(
            Method.rtn,
            self.bits,
            self.group_size,
            self.settings.symmetric,
            format=Format(self.written_as),
            skip=self.skip,
        )
        config = rounding.config()
        if self.written_as == "gptq":
            config.desc_act = self.settings.desc_act and self.method == "gptq"
            config.damp_percent = self.settings.damp_percent
            config.true_sequential = self.settings.true_sequential
        return config

    def choose(self, source: Path, calibration: Calibration, device: torch.device) -> tuple[Any, Calibrated]:
        """The config and the method; ``best`` looks at the model for it."""
        from lowbit.integrations.transformers.calibrated_methods import calibrated_method

        if self.method != "best":
            return self.config(), calibrated_method(self.method, self.settings)
        from lowbit.integrations.transformers import best

        target = (self.bits or 0) + 0.25 if self.target_bits is None else self.target_bits
        form = None if self.form is None else self.form.value
        with console.progress("choosing widths", 1) as bar:
            choice = best.choose(
                source,
                calibration,
                target,
                device,
                form=form,
                skip=self.skip,
                seconds=self.budget,
                advance=lambda done, what: bar(0, description=what),
            )
        return choice.config, choice.method


def _gguf_config(kind: str, skip: tuple[str, ...]) -> Any:
    import lowbit

    return lowbit.GgufConfig(type=kind, modules_to_not_convert=list(skip) or None)


def _aqlm_config(variant: str, bits: int | None, skip: tuple[str, ...]) -> Any:
    import lowbit

    found = _CODEBOOKS.fullmatch(variant or f"{bits or 2}x8")
    if found is None:
        raise PlanError(f"codebooks are given as <number>x<bits>, such as aqlm:2x8; found '{variant}'")
    count, width = int(found[1]), int(found[2])
    return lowbit.AqlmConfig(
        in_group_size=8,
        nbits_per_codebook=width,
        num_codebooks=count,
        linear_weights_not_to_quantize=list(skip) or None,
    )


def settings(**given: Any) -> Settings:
    """What methods let a user choose."""
    from lowbit.integrations.transformers.calibrated_methods import Settings

    return Settings(**given)


def parse_method(text: str) -> tuple[str, str]:
    """``gguf:Q4_K_M`` -> ``("gguf", "Q4_K_M")``.

    Raises:
        PlanError: there is no such method.
    """
    name, _, variant = text.partition(":")
    plain = [method.value for method in Method]
    if name not in (*plain, *NAMES):
        raise PlanError(f"--method is one of {', '.join((*plain, *NAMES))}; found '{text}'")
    if variant and name not in NAMES:
        raise PlanError(f"'{name}' has no variants; found '{variant}'")
    return name, variant


def parse_budget(text: str) -> float:
    """Seconds, from ``90s``, ``10m`` or ``1.5h``.

    Raises:
        PlanError: it is none.
    """
    found = _BUDGET.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise PlanError(f"a budget is a number and s, m or h, as in 10m; found '{text}'")
    return float(found[1]) * _SECONDS[found[2]]


@dataclass
class Work:
    """What a run needs beside the request.

    Attributes:
        source: folder of the dense checkpoint.
        target: folder to write, or a file that ends in .gguf.
        dataset: a file, or the name of a dataset.
        job: folder of the job's state; None for one beside the target, which goes away at the end.
    """

    source: Path
    target: Path
    dataset: str
    samples: int = _SAMPLES
    length: int | None = None
    seed: int = 0
    device: str | None = None
    job: Path | None = None
    overwrite: bool = False


def run(request: CalibratedRequest, work: Work) -> None:
    """Quantize a checkpoint, or go on where an earlier run of the same command was stopped."""
    request.check()
    _check_target(request, work)
    with _processes() as (rank, place):
        console.silence(bars=rank != 0)
        calibration = _data(work)
        device = place or next(iter(_indexed(work.device)))
        config, method = request.choose(work.source, calibration, device)
        folder = work.job or _beside(work.target)
        made = _open(work.source, config, method, calibration, folder, device)
        try:
            _quantize(made, folder, rank)
            if rank == 0:
                _write(request, work, made)
        finally:
            made.close()
        if rank == 0:
            _print(work, made)
            if work.job is None:
                shutil.rmtree(folder, ignore_errors=True)


def _open(
    source: Path, config: Any, method: Calibrated, calibration: Calibration, folder: Path, device: torch.device
) -> CalibratedRun:
    from lowbit.calibration.data import check_ids
    from lowbit.integrations.transformers.calibrate import CalibratedRun

    made = CalibratedRun(source, config, method, calibration, folder, device)
    check_ids(made.streamed.model.get_input_embeddings().weight.shape[0], calibration)
    return made


def _quantize(made: CalibratedRun, folder: Path, rank: int) -> None:
    if rank == 0:
        console.print_plan(made.plan)
    done = made.job.finished(made.blocks) if rank == 0 else 0
    if done:
        console.note(f"going on behind {done} finished {'block' if done == 1 else 'blocks'} in {folder}")
    with console.progress("quantizing", made.blocks) as bar:
        try:
            made.run(lambda done, description=None: bar(done, description=description))
        except KeyboardInterrupt:
            console.note(f"stopped; the same command goes on where this one was ({folder})")
            raise


def _write(request: CalibratedRequest, work: Work, made: CalibratedRun) -> None:
    from lowbit.integrations.convert import copy_companions

    if work.target.suffix != ".gguf":
        with replaced(work.target) as partial:
            made.write(partial)
            copy_companions(work.source, partial)
        return
    from lowbit.integrations.checkpoint import open_checkpoint
    from lowbit.integrations.convert_gguf import write_gguf

    with tempfile.TemporaryDirectory(dir=work.target.resolve().parent, prefix=".lowbit-") as scratch:
        made.write(Path(scratch))
        copy_companions(work.source, Path(scratch))
        write_gguf(open_checkpoint(Path(scratch)), work.target, request.variant)


def _check_target(request: CalibratedRequest, work: Work) -> None:
    if work.target.suffix != ".gguf":
        check_target(work.source, work.target, work.overwrite)
    elif request.method != "gguf":
        raise PlanError(f"'{work.target}' is a GGUF file's name; --method gguf:TYPE makes one")
    elif work.target.exists() and not work.overwrite:
        raise PlanError(f"'{work.target}' exists; --overwrite replaces it")


def _data(work: Work) -> Calibration:
    from transformers import AutoConfig

    from lowbit.calibration.data import DataConfig, check_length, load_calibration, max_positions

    limit = max_positions(AutoConfig.from_pretrained(work.source))
    length = work.length or min(_LENGTH, limit or _LENGTH)
    check_length(limit, length)
    data = DataConfig(samples=work.samples, length=length, seed=work.seed)
    calibration = load_calibration(work.dataset, load_tokenizer(work.source), data)
    for note in calibration.notes:
        console.note(note)
    return calibration


def _beside(target: Path) -> Path:
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.job")


def _indexed(device: str | None) -> list[torch.device]:
    import torch

    if device == "auto":
        raise PlanError("calibration works on one device, or with torchrun on one for each process; not on 'auto'")
    return [torch.device(place) for place in device_map(device).values()]


@contextmanager
def _processes() -> Iterator[tuple[int, torch.device | None]]:
    """This process's rank, and its device where ``torchrun`` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ:
        yield 0, None
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    # The others wait while the first learns, which may take longer than what is thought to be a hang.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank(), torch.device("cuda", local) if cuda else torch.device("cpu")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _print(work: Work, made: CalibratedRun) -> None:
    from lowbit.bench import checkpoint_bytes

    report = made.report()
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    bits = sum(layer["bits_per_weight"] * layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    before = checkpoint_bytes(work.source)
    after = checkpoint_bytes(work.target) if work.target.is_dir() else work.target.stat().st_size
    out = console.stdout()
    out.print(f"saved             {work.target}")
    ratio = f", {before / after:.2f} times smaller" if before > after > 0 else ""
    out.print(f"size              {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now{ratio}")
    out.print(f"bits per weight   {bits / max(1, weights):.3f} in the quantized layers, scales and zeros included")
    for note in _notes(report):
        console.note(note)


def _notes(report: dict[str, Any]) -> list[str]:
    """What somebody should read; layers one by one only while they are few."""
    found = [f"{layer['name']}: {note}" for layer in report["layers"] for note in layer.get("notes", ())]
    shown = found if len(found) <= 5 else [*found[:5], f"... and {len(found) - 5} more in quantization_report.json"]
    return [*report["notes"], *shown]
