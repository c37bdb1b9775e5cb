"""``--method best``: widths for each layer by measured sensitivity, GPTQ, then learning against the dense model.

What each ingredient brings is measured in ``docs/quality.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.algorithms.gptq import Gptq
from lowbit.calibration.allocate import Option, Sensitivity, allocate, measure_sensitivity
from lowbit.calibration.data import Calibration
from lowbit.calibration.distributed import share, world
from lowbit.calibration.memory import free_memory
from lowbit.calibration.tune import TuneConfig
from lowbit.calibration.units import Unit, find_units
from lowbit.core import Kept
from lowbit.errors import PlanError
from lowbit.integrations.transformers.calibrate import Calibrated, plan_for, repeatable, tune_settings
from lowbit.integrations.transformers.methods import make_recipe, method_named
from lowbit.integrations.transformers.methods.compressed_tensors import CompressedTensorsConfig
from lowbit.integrations.transformers.methods.gptq import GPTQConfig
from lowbit.integrations.transformers.streaming import auto_class_of
from lowbit.nn.planning import matches
from lowbit.nn.swap import is_linear

# Perplexity grew again behind these (docs/quality.md): so few tokens are learned by heart.
LEARNING: Final = TuneConfig(epochs=12)
_SEQUENCES: Final = 16  # that sensitivities are measured on
_FORMATS: Final = ("gptq", "compressed-tensors")
_MEASURED_WEIGHT_BYTES: Final = 12

Advance = Callable[[int, str], object]


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        config: the quantization config, with every layer's width.
        method: how to get there.
        bits: per weight, everything that is stored counted.
        divergence: that was expected before any correction, nats per token; None where nothing could be measured.
    """

    config: Any
    method: Calibrated
    bits: float
    divergence: float | None


def choose(
    source: Path,
    calibration: Calibration,
    target_bits: float,
    device: torch.device,
    *,
    form: str | None = None,
    skip: Sequence[str] = (),
    seconds: float | None = None,
    learning: TuneConfig | None = LEARNING,
    advance: Advance = lambda done, what: None,
) -> Choice:
    """Choose widths, format and method for a dense checkpoint.

    Args:
        source: its folder.
        calibration: the data.
        target_bits: bits per weight, over the weights that are quantized, with all that is stored beside the codes.
        device: where the work is done.
        form: the format; None for the one with the least expected divergence.
        skip: patterns of modules that stay dense.
        seconds: that may be spent on learning.
        learning: how; None for not at all.
        advance: called with steps done, and a description.

    Raises:
        PlanError: no format gets by with so few bits, or the model can't be loaded.
    """
    formats = _FORMATS if form is None else (form,)
    if unknown := [name for name in formats if name not in _FORMATS]:
        raise PlanError(f"best writes {' or '.join(_FORMATS)}, not {unknown[0]}")
    # One process decides for all: on another device the last bits of a sensitivity, and so a width, may differ.
    mine = _widths(source, calibration, target_bits, device, formats, skip, advance) if world()[0] == 0 else None
    config, bits, divergence = share(mine, 0)
    return Choice(config, method_for(learning, seconds), bits, divergence)


@repeatable()
def _widths(
    source: Path,
    calibration: Calibration,
    target_bits: float,
    device: torch.device,
    formats: Sequence[str],
    skip: Sequence[str],
    advance: Advance,
) -> tuple[Any, float, float]:
    """The config with the least expected divergence, its bits per weight, and that divergence."""
    model = _load(source, device)
    tokens = torch.stack([sample for sample in calibration.samples if len(sample) == calibration.longest])
    chosen: dict[str, Any] = {}
    reasons: list[str] = []
    sensitivities: dict[str, Sensitivity] = {}
    for name in formats:
        candidates = _Candidates(model, name, skip)
        if not sensitivities:
            names = [unit.module for unit in candidates.units if unit.expert is None]
            sensitivities = measure_sensitivity(
                model, names, tokens[:_SEQUENCES], advance=lambda done: advance(done, "measuring sensitivities")
            )
        try:
            chosen[name] = candidates.choose(sensitivities, target_bits, advance)
        except PlanError as error:
            reasons.append(f"{name}: {error}")
    if not chosen:
        raise PlanError("; ".join(reasons))
    return min(chosen.values(), key=lambda entry: entry[2])


def method_for(learning: TuneConfig | None, seconds: float | None = None) -> Calibrated:
    """GPTQ, and learning where it is asked for."""
    algorithm = Gptq()
    return Calibrated(
        algorithm_of=lambda name: algorithm,
        label="best",
        distill=learning,
        seconds=seconds,
        settings={"learning": tune_settings(learning), "seconds": seconds},
    )


def _load(source: Path, device: torch.device) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    auto = auto_class_of(config)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    needed, free = count * _MEASURED_WEIGHT_BYTES, free_memory(device)
    if needed > free:
        raise PlanError(
            f"measuring sensitivities takes {needed / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} GiB are "
            "free; use --method gptq with --bits, which streams the model, or a larger device"
        )
    model = auto.from_pretrained(source, dtype=torch.float32, device_map={"": str(device)})
    model.eval().requires_grad_(False)
    return model


class _Candidates:
    """The ways in which a format can hold each weight of a model."""

    def __init__(self, model: Any, form: str, skip: Sequence[str]) -> None:
        self.model, self.form = model, form
        # Not every format's list of what it leaves out takes patterns.
        left_out = [name for name, module in model.named_modules() if is_linear(module) and matches(name, list(skip))]
        self.uniform = [_config(form, bits, size, left_out) for bits, size in _SIZES[form]]
        self.quantizers = [plan_for(model, config, torch.bfloat16) for config in self.uniform]
        plan = self.quantizers[0].plan
        if plan is None:
            raise PlanError("the model has no plan")
        self.plan = plan
        self.units: list[Unit] = find_units(model, plan)

    def choose(
        self, sensitivities: Mapping[str, Sensitivity], target: float, advance: Advance
    ) -> tuple[Any, float, float]:
        """The config, its bits per weight, and the divergence that is expected of it."""
        options: dict[str, list[Option]] = {unit.name: [] for unit in self.units}
        rounding = Gptq()
        for number, (bits, size) in enumerate(_SIZES[self.form]):  # one spec after the other: each is prepared once
            for unit in self.units:
                options[unit.name].append(self._option(unit, number, sensitivities.get(unit.module), rounding))
            advance(1, f"{self.form}: {bits} bits in groups of {size}")
        sizes = {unit.name: unit.shape[0] * unit.shape[1] for unit in self.units}
        chosen = allocate(options, sizes, target)
        stored = sum(options[name][index].bits for name, index in chosen.items()) / sum(sizes.values())
        loss = sum(options[name][index].loss for name, index in chosen.items())
        return self._joined(chosen), stored, loss

    def _option(self, unit: Unit, number: int, sensitivity: Sensitivity | None, rounding: Gptq) -> Option:
        recipe = self.quantizers[number].recipe
        spec = recipe.spec_for(unit.name, unit.shape, torch.bfloat16)
        if isinstance(spec, Kept):
            raise PlanError(f"{unit.name}: {spec.reason}")
        settings = recipe.settings_of(unit.name)
        if reason := recipe.wire.refusal(settings, spec, unit.shape):
            raise PlanError(f"{unit.name}: {reason}")
        layout = recipe.wire.expected(settings, spec, unit.shape)
        bits = sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in layout.values())
        weight = unit.weight(self.model.get_submodule(unit.module)).float()
        error = rounding.quantize(weight, spec).to(str(weight.device)).dequantize() - weight
        return Option(_loss(error, sensitivity), bits)

    def _joined(self, chosen: Mapping[str, int]) -> Any:
        settings = {name: self.quantizers[index].recipe.settings_of(name) for name, index in chosen.items()}
        wire = self.quantizers[0].recipe.wire
        kept = [name for name, entry in self.plan.kept.items() if not entry.reason.startswith(("embedding", "tied"))]
        data = wire.config(wire.join(settings, [name for name in kept if "norm" not in name]))
        method = method_named(wire.quant_method)
        if method is None:
            raise PlanError(f"there is no method '{wire.quant_method}'")
        config = method.config_class.from_dict(data)
        make_recipe(config)  # what is written has to be understood
        return config


def _loss(error: Tensor, sensitivity: Sensitivity | None) -> float:
    return float(error.square().sum()) if sensitivity is None else sensitivity.divergence(error)


_SIZES: Final = {
    "gptq": [*((bits, size) for bits in (2, 3, 4) for size in (64, 128)), (8, 128)],
    "compressed-tensors": [(2, 64), (4, 32), (4, 64), (4, 128), (8, 128)],  # 3 bits would take 3.2 there
}


def _config(form: str, bits: int, size: int, skip: Sequence[str]) -> Any:
    if form == "gptq":
        return GPTQConfig(bits, group_size=size, sym=False, modules_to_not_convert=list(skip) or None)
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return CompressedTensorsConfig(config_groups=groups, ignore=["lm_head", *skip])
