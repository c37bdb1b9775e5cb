"""The methods that use calibration data, by name: which algorithm, and what happens to a block before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit.algorithms import Algorithm
from lowbit.algorithms.aqlm import AdditiveQuantization
from lowbit.algorithms.awq import ActivationAware
from lowbit.algorithms.ggml import GgmlBlocks
from lowbit.algorithms.ggml_feedback import ErrorFeedbackBlocks
from lowbit.algorithms.gptq import Gptq
from lowbit.algorithms.signround import SignRoundStart
from lowbit.algorithms.statistics import HESSIAN, MAGNITUDES, Statistics
from lowbit.calibration.equalize import equalize_block
from lowbit.calibration.pairs import Pair, find_pairs
from lowbit.calibration.tune import SIGN_ROUND, TuneConfig
from lowbit.calibration.units import Unit
from lowbit.errors import PlanError
from lowbit.integrations.transformers.calibrate import Calibrated, tune_settings


@dataclass(frozen=True)
class Settings:
    """What methods let a user choose; each takes what concerns it.

    Attributes:
        symmetric: whether zero points stay in the middle.
        damp_percent: GPTQ: see :class:`lowbit.algorithms.gptq.Gptq`.
        desc_act: GPTQ: columns by falling activation.
        static_groups: GPTQ: scales chosen beforehand; with `desc_act` no group index is stored.
        true_sequential: whether what runs later in a block is calibrated behind what is quantized already.
        scale_search: GPTQ: whether scales are searched for, or go from the minimum to the maximum.
        sweeps: GPTQ: see :class:`lowbit.algorithms.gptq.Gptq`.
        correction: GPTQ: whether errors of earlier layers are made up for (GPTAQ).
        feedback: GGUF: whether rounding errors are made up for by later columns.
        steps: AutoRound: of learning per block.
        tune: GPTQ: steps of learning per block afterwards: codes, scales, zero points and norms.
        rotate: whether the model is rotated first.
        seed: of whatever is random.
    """

    symmetric: bool = False
    damp_percent: float = 0.01
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    scale_search: bool = True
    sweeps: int | None = None
    correction: bool = False
    feedback: bool = True
    steps: int = 200
    tune: int = 0
    rotate: bool = False
    seed: int = 0


def calibrated_method(name: str, settings: Settings) -> Calibrated:
    """How a method quantizes.

    Raises:
        PlanError: there is no such method, or a setting is out of its range.
    """
    make = _METHODS.get(name)
    if make is None:
        raise PlanError(f"there is no calibrated method '{name}'; there are {', '.join(_METHODS)}")
    method = make(settings)
    own = {key: value for key, value in vars(settings).items() if value != getattr(Settings, key, None)}
    known = {**method.settings, **own}
    return replace(
        method,
        label=name,
        true_sequential=settings.true_sequential,
        rotate=settings.rotate,
        seed=settings.seed,
        settings=known,
    )


def _always(algorithm: Algorithm) -> Callable[[str], Algorithm]:
    return lambda name: algorithm


def _gptq(settings: Settings) -> Calibrated:
    algorithm = Gptq(
        damp_percent=settings.damp_percent,
        desc_act=settings.desc_act,
        static_groups=settings.static_groups,
        symmetric=settings.symmetric,
        scale_search=settings.scale_search,
        sweeps=settings.sweeps,
        correction=settings.correction,
    )
    tune = TuneConfig(steps=settings.tune, seed=settings.seed) if settings.tune else None
    permuted = settings.desc_act and not settings.static_groups
    return Calibrated(_always(algorithm), "gptq", permuted=permuted, tune=tune)


def _awq(settings: Settings) -> Calibrated:
    equalizer = Equalizer(settings.symmetric)
    needs = frozenset({HESSIAN, MAGNITUDES})
    return Calibrated(_always(ActivationAware(settings.symmetric)), "awq", prepare=equalizer, prepare_needs=needs)


def _autoround(settings: Settings) -> Calibrated:
    tune: TuneConfig = replace(SIGN_ROUND, steps=settings.steps, seed=settings.seed)
    algorithm = SignRoundStart(settings.damp_percent, settings.symmetric)
    return Calibrated(_always(algorithm), "autoround", tune=tune, settings={"tune": tune_settings(tune)})


def _aqlm(settings: Settings) -> Calibrated:
    return Calibrated(_always(AdditiveQuantization(seed=settings.seed)), "aqlm")


def _gguf(settings: Settings) -> Calibrated:
    plain = GgmlBlocks()
    feedback = ErrorFeedbackBlocks(damp_percent=settings.damp_percent)
    return Calibrated(_always(_FirstThatCan([feedback, plain] if settings.feedback else [_Important()])), "gguf")


class _Important(GgmlBlocks):
    """ggml's quantizers with the importance of the inputs, as llama.cpp has it."""

    needs = frozenset({"squares"})


class _FirstThatCan(Algorithm):
    """The first of several algorithms that makes a spec."""

    name = "gguf"

    def __init__(self, algorithms: Sequence[Algorithm]) -> None:
        self.algorithms = algorithms
        self.needs = frozenset[str]().union(*(algorithm.needs for algorithm in algorithms))

    def _one(self, spec: Any) -> Algorithm:
        for algorithm in self.algorithms:
            if algorithm.supports(spec):
                return algorithm
        raise PlanError(f"none of {[algorithm.name for algorithm in self.algorithms]} makes '{spec}'")

    def supports(self, spec: Any) -> bool:
        return any(algorithm.supports(spec) for algorithm in self.algorithms)

    def quantize(self, weight: Tensor, spec: Any) -> Any:
        return self._one(spec).quantize(weight, spec)

    def calibrated(self, weight: Tensor, spec: Any, statistics: Statistics) -> Any:
        return self._one(spec).calibrated(weight, spec, statistics)


class Equalizer:
    """AWQ's scales for each block, before it is quantized; pairs are looked for once per kind of block."""

    def __init__(self, symmetric: bool) -> None:
        self.symmetric = symmetric
        self._pairs: dict[tuple[Any, ...], list[Pair]] = {}

    def __call__(
        self,
        block: nn.Module,
        prefix: str,
        units: Sequence[Unit],
        statistics: Mapping[str, Statistics],
        run: Callable[[nn.Module], Tensor],
    ) -> list[str]:
        """See :class:`lowbit.calibration.runner.RunConfig`."""
        kind = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        if kind not in self._pairs:
            self._pairs[kind] = find_pairs(block, lambda: run(block))
        own: MutableMapping[str, Statistics] = {
            name.removeprefix(f"{prefix}."): found for name, found in statistics.items()
        }
        specs = {unit.name.removeprefix(f"{prefix}."): unit.spec for unit in units}
        done = equalize_block(block, self._pairs[kind], own, specs, symmetric=self.symmetric)
        return [f"{prefix}: {entry.pair.source} was not scaled: {entry.note}" for entry in done if entry.note]


_METHODS: Final[dict[str, Callable[[Settings], Calibrated]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "autoround": _autoround,
    "aqlm": _aqlm,
    "gguf": _gguf,
}


def pick_device(device_map: Any = None) -> torch.device:
    """Where to calibrate for a model that will be placed by `device_map`: a GPU where it names one, or there is one."""
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    for place in places:
        if isinstance(place, int):
            return torch.device("cuda", place)
        if isinstance(place, torch.device | str) and str(place).startswith(("cpu", "cuda", "xpu", "mps")):
            return torch.device(place)
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.empty(0, device=found).device
