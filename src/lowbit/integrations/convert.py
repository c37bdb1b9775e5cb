"""Checkpoints from one format to another: one weight at a time, to the bit, or not without being asked."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.algorithms import quantize
from lowbit.core import QuantSpec, QuantTensor, dtypes
from lowbit.core.respell import respell, simplest, why_not
from lowbit.errors import FormatError, LowbitError, PlanError, SpecError
from lowbit.integrations.transformers.gguf.loading import load_tokenizer
from lowbit.integrations.transformers.outline import Outline, outline
from lowbit.integrations.transformers.saving import write_side_files
from lowbit.wire import Checkpoint, Wire, wire_named, wires
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles
from lowbit.wire.shards import SHARD_BYTES, ShardWriter
from lowbit.wire.store import SIDECARS, read_json

DENSE: Final = "dense"
# Names that people know, each with the wire and what of it.
_ALIASES: Final = {
    "gptq_v2": ("gptq", "v2"),
    "int8": ("bitsandbytes-8bit", ""),
    "llm-int8": ("bitsandbytes-8bit", ""),
    "nf4": ("bitsandbytes-4bit", ""),
    "fp4": ("bitsandbytes-4bit", ""),
}
_WEIGHT_FILES: Final = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
_OF_FORMATS: Final = (*SIDECARS, "config.json", "quanto_qmap.json", "*.gguf")

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """What is asked for: a wire and a variant of it, or None for dense weights.

    Attributes:
        dtype: of dense weights; None for the one that ``config.json`` names.
        requantize: whether weights that can't be spelled are quantized anew.
    """

    wire: Wire[Any] | None
    variant: str = ""
    dtype: torch.dtype | None = None
    requantize: bool = False

    @classmethod
    def parse(cls, text: str, *, dtype: torch.dtype | None = None, requantize: bool = False) -> Target:
        """From ``gptq``, ``gptq:v2``, ``awq:gemv``, ``dense``, ...

        Raises:
            PlanError: there is no such format, or `dtype` is given for another than ``dense``.
        """
        name, _, variant = text.partition(":")
        name, variant = _ALIASES.get(name, (name, variant))
        if name == DENSE:
            return cls(None, dtype=dtype)
        if dtype is not None:
            raise PlanError(f"a dtype is for '{DENSE}'; the dtypes of '{name}' are those of its scales")
        try:
            return cls(wire_named(name), variant, requantize=requantize)
        except FormatError as error:
            known = [DENSE, *(wire.name for wire in wires())]
            raise PlanError(f"unknown format '{name}'; there are {', '.join(known)}") from error


@dataclass(frozen=True)
class Weight:
    """One packed weight of the source, and the spec that it gets; None where it becomes dense."""

    spec: QuantSpec
    plain: QuantSpec
    shape: tuple[int, int]
    target: QuantSpec | None = None


@dataclass
class Cost:
    """What quantizing anew has changed.

    Attributes:
        weights: how many were quantized anew.
        dense: how many became dense, since the format can't hold them.
        mean: the mean of ``|new - old|`` over that of ``|old|``.
        most: the largest ``|new - old|``, of the weight `where`.
    """

    weights: int = 0
    dense: int = 0
    most: float = 0.0
    where: str = ""
    _difference: float = field(default=0.0, repr=False)
    _magnitude: float = field(default=0.0, repr=False)

    @property
    def mean(self) -> float:
        return self._difference / self._magnitude if self._magnitude else 0.0

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Count one weight, given as fp32."""
        difference = (after - before).abs()
        self.weights += 1
        self._difference += float(difference.sum(dtype=torch.float64))
        self._magnitude += float(before.abs().sum(dtype=torch.float64))
        if float(difference.max()) >= self.most:
            self.most, self.where = float(difference.max()), name


class Conversion:
    """A checkpoint and what becomes of it, found out before anything is written.

    Attributes:
        weights: by module.
        settings: of the target's wire, for the whole checkpoint; None for dense.
        steps: how often `advance` is called with 1 by :meth:`prepare` and :meth:`run` together.

    Raises:
        FormatError: the source is damaged.
    """

    def __init__(self, source: Checkpoint, target: Target) -> None:
        self.source, self.target = source, target
        self.weights: dict[str, Weight] = {}
        self.settings: Any = None
        self.steps = 2 * len(source.weights) + len(source.dense)
        self.cost = Cost()
        self.config = _config_of(source)
        is_gguf = isinstance(source.files, GgufCheckpointFiles)
        self._outline: Outline = outline(source.files.folder, self.config if is_gguf else None)

    # ------------------------------------------------------------------------------------------------------ before

    def prepare(self, advance: Advance = lambda done: None) -> None:
        """Read every weight once and decide.

        Raises:
            PlanError: the format can't spell a weight, named with the reason.
        """
        self._check_activation_scales()
        self._check_fused_experts()
        for module, tensor in self.source.weights.items():
            self.weights[module] = Weight(tensor.spec, simplest(tensor), tensor.shape)
            advance(1)
        if self.target.wire is not None:
            self.settings, self.weights = self._choose(self.target.wire)

    def _check_activation_scales(self) -> None:
        own = self.source.wire.activation_scales
        theirs = self.target.wire.activation_scales if self.target.wire else ()
        for name in self.source.dense:
            if own and name.endswith(own) and not name.endswith(theirs or ("\0",)):
                raise PlanError(f"'{name}' divides activations, which only '{self.source.format}' can say")

    def _check_fused_experts(self) -> None:
        names, endings = set(self.source.dense), self.source.wire.fused_suffixes
        for name in names if endings else ():
            if name.endswith(endings[-1]) and name.removesuffix(endings[-1]) in names:
                raise PlanError(f"'{name}' belongs to experts that '{self.source.format}' keeps fused; load the model")

    def _choose(self, wire: Wire[Any]) -> tuple[Any, dict[str, Weight]]:
        """The first settings under which every weight can be spelled; each attempt's first reason, if none."""
        reasons = []
        attempts = list(self._attempts(wire))
        for settings, specs in attempts:
            chosen, reason = self._apply(wire, settings, specs)
            if reason is None:
                return settings, chosen
            reasons.append(reason)
        if self.target.requantize and attempts:
            settings, specs = attempts[0]
            return settings, self._apply(wire, settings, specs)[0]
        raise PlanError(f"{reasons[0] if reasons else self._why_none(wire)}")

    def _attempts(self, wire: Wire[Any]) -> Iterator[tuple[Any, dict[str, QuantSpec]]]:
        """Settings of the whole checkpoint to try, with the specs of its weights that they were made from.

        First each weight's own, without the zero points that say nothing, then with them; then the settings of one
        weight for all, the most frequent first: narrow codes fit wide ones, and large groups are many small ones.
        """
        kept = self._kept()
        variants = []
        plain = {name: weight.plain for name, weight in self.weights.items()}
        for specs in (plain, {name: weight.spec for name, weight in self.weights.items()}):
            with contextlib.suppress(FormatError):
                packed = [name for name in specs if not self._is_outside(name)]
                own = {name: self._settings_for(wire, specs[name]) for name in packed}
                variants.append((own, specs))
                yield wire.join(own, kept), specs
        for own, specs in variants:
            for settings, _ in Counter(map(_Same, own.values())).most_common():
                with contextlib.suppress(FormatError):
                    yield wire.join(dict.fromkeys(own, settings.value), kept), specs

    def _settings_for(self, wire: Wire[Any], spec: QuantSpec) -> Any:
        settings = wire.settings_for(spec)
        if not self.target.variant:
            return settings
        try:
            return wire.vary(settings, self.target.variant)
        except FormatError as error:
            raise PlanError(str(error)) from error

    def _why_none(self, wire: Wire[Any]) -> str:
        """What the format says where it has no settings at all for the first weight that it can't take."""
        own, name = {}, ""
        try:
            for name, weight in self.weights.items():
                if not self._is_outside(name):
                    own[name] = self._settings_for(wire, weight.spec)
            name = ""
            wire.join(own, self._kept())
        except FormatError as error:
            return f"{name}{': ' if name else ''}{error}{_OTHERWISE}"
        return f"no settings of '{wire.name}' fit all weights"

    def _apply(
        self, wire: Wire[Any], settings: Any, specs: Mapping[str, QuantSpec]
    ) -> tuple[dict[str, Weight], str | None]:
        """Every weight with its target under these settings, and the first reason why one can't be spelled so."""
        chosen, first = {}, None
        for name, weight in self.weights.items():
            if self._is_outside(name):
                chosen[name] = weight
                continue
            own = wire.of(settings, name)
            target = wire.spelling(own, specs[name])
            unfit = wire.refusal(own, target, weight.shape)
            reason = unfit or why_not(weight.spec, target)
            if reason and first is None:
                first = f"{name} can't be spelled in '{wire.name}': {reason}{_OTHERWISE}"
            chosen[name] = Weight(weight.spec, weight.plain, weight.shape, None if unfit else target)
        return chosen, first

    def _kept(self) -> list[str]:
        return self._outline.kept(set(self.weights), self.source.dense)

    def _is_outside(self, module: str) -> bool:
        """Whether a weight becomes dense for other formats: GGUF files hold embeddings and heads packed as well."""
        return isinstance(self.source.files, GgufCheckpointFiles) and not any(map(str.isdigit, module.split(".")))

    # ------------------------------------------------------------------------------------------------------- doing

    def run(self, folder: Path, advance: Advance = lambda done: None, shard_bytes: int = SHARD_BYTES) -> Cost:
        """Write the whole checkpoint into an empty folder; returns what it has cost.

        Raises:
            PlanError: a weight's numbers can't be spelled, which only they say.
        """
        writer = ShardWriter(folder, self._metadata(), shard_bytes)
        owner = {f"{module}.{suffix}": module for module in self.weights for suffix in self.source.wire.suffixes}
        done: set[str] = set()
        for name in self.source.files.names():
            module = owner.get(name)
            if module is None:
                self._add(writer, name, self._dense(self.source.files.tensor(name)))
            elif module not in done:
                done.add(module)
                for suffix, tensor in self._convert(module).items():
                    self._add(writer, f"{module}.{suffix}", tensor)
            else:
                continue
            advance(1)
        files = writer.close()
        self._write_config(folder)
        if self.target.wire is not None:
            write_side_files(folder, self.target.wire.side_files(self.settings, self._packed()))
        if isinstance(self.source.files, GgufCheckpointFiles):
            load_tokenizer(self.source.files.path).save_pretrained(folder)
        else:
            copy_companions(self.source.files.folder, folder)
        for file in files:  # written for the owner alone; whoever may read the config may read these
            file.chmod((folder / "config.json").stat().st_mode)
        return self.cost

    def _add(self, writer: ShardWriter, name: str, tensor: Tensor) -> None:
        """Write a tensor; what is dense and of one of several experts that files hold fused, when all are there."""
        experts, module = self._outline.experts, name.rpartition(".")[0]
        packed = module in self.weights and self.weights[module].target is not None
        if packed or experts is None or not experts.owns(name):
            writer.add(name, tensor)
            return
        for parameter, whole in experts.add(name, tensor):
            writer.add(parameter, whole)

    def _metadata(self) -> dict[str, str]:
        wire = self.target.wire
        if wire is None:
            return {}
        others = self.source.dense + [f"{name}.weight" for name, weight in self.weights.items() if not weight.target]
        return wire.metadata(self.settings, self._packed(), others)

    def _packed(self) -> dict[str, tuple[QuantSpec, tuple[int, int]]]:
        return {name: (weight.target, weight.shape) for name, weight in self.weights.items() if weight.target}

    def _convert(self, module: str) -> dict[str, Tensor]:
        wire, weight, tensor = self.target.wire, self.weights[module], self.source.weights[module]
        if wire is None or weight.target is None:
            self.cost.dense += wire is not None and not self._is_outside(module)
            return {"weight": self._dense_weight(module, tensor)}
        try:
            spelled = respell(tensor, weight.target)
        except SpecError as error:
            if not self.target.requantize:
                raise PlanError(f"{module} can't be spelled in '{wire.name}': {error}{_OTHERWISE}") from error
            spelled = self._quantize_anew(module, tensor, weight.target)
        return wire.write(wire.of(self.settings, module), spelled)

    def _quantize_anew(self, module: str, tensor: QuantTensor, target: QuantSpec) -> QuantTensor:
        before = tensor.dequantize()
        try:
            after = quantize(before, target)
        except LowbitError as error:
            raise PlanError(f"{module} can't be quantized to '{target}': {error}") from error
        self.cost.add(module, before, after.dequantize())
        return after

    def _dense_weight(self, module: str, tensor: QuantTensor) -> Tensor:
        dtype = self.target.dtype or self._config_dtype() or tensor.spec.dtype
        dense = tensor.dequantize(dtype)
        return dense.t().contiguous() if self._outline.is_transposed(module) else dense

    def _dense(self, tensor: Tensor) -> Tensor:
        is_plain_float = tensor.dtype in dtypes.FLOATS.values()
        return tensor.to(self.target.dtype) if self.target.dtype and is_plain_float else tensor

    def _config_dtype(self) -> torch.dtype | None:
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return dtypes.FLOATS.get(named) if isinstance(named, str) else None

    def _write_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.config)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part.pop("quantization_config", None)
                part.pop("compression_config", None)
        if self.target.wire is not None:
            config["quantization_config"] = self.target.wire.config(self.settings)
        elif self.target.dtype is not None:
            config["dtype"] = dtypes.name_of(self.target.dtype)
            config.pop("torch_dtype", None)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


_OTHERWISE: Final = "; --requantize rounds such weights anew, and --to dense keeps every bit"


def _config_of(source: Checkpoint) -> dict[str, Any]:
    """What ``config.json`` says; of a GGUF file, what it would."""
    if isinstance(source.files, GgufCheckpointFiles):
        return dict(source.files.config)
    return read_json(source.files.folder / "config.json")


class _Same:
    """Settings as a key, by what they say: not all are hashable."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


def copy_companions(source: Path, folder: Path) -> None:
    """Everything in `source` that is neither weights nor configuration: tokenizer, chat template, licence, code."""
    for file in sorted(source.iterdir()):
        other = any(file.match(pattern) for pattern in (*_WEIGHT_FILES, *_OF_FORMATS))
        if file.is_file() and not other and not file.name.startswith(".") and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
