"""From a finished job to a checkpoint: the source's tensors, one after the other, the quantized ones replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lowbit.calibration.job import Job
from lowbit.calibration.units import Unit
from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import FormatError
from lowbit.integrations.transformers.experts.names import ExpertNames
from lowbit.integrations.transformers.quantizer import LowbitQuantizer
from lowbit.integrations.transformers.saving import names_in_files, write_side_files
from lowbit.wire.shards import ShardWriter
from lowbit.wire.store import CheckpointFiles, read_json

SHARD_BYTES: Final = 10**9  # a file's tensors are in memory until it is written, in some versions twice
Specs = dict[str, tuple[QuantSpec, tuple[int, int]]]


class Results:
    """What a job has of each unit and each changed parameter; checked once, read when asked for."""

    def __init__(self, job: Job, blocks: int, section: str, outside: Mapping[str, Tensor] | None = None) -> None:
        self._job, self._section, self.outside = job, section, dict(outside or {})
        self._block_of: dict[str, int] = {}
        self._dense_of: dict[str, int] = {}
        self._outlines: Specs = {}
        for number in range(blocks):
            found = self._load(number, check=True)
            self._outlines |= {name: (unit.spec, unit.shape) for name, unit in found.units.items()}
            self._block_of |= dict.fromkeys(found.units, number)
            self._dense_of |= dict.fromkeys(found.dense, number)
        self._recent: tuple[int, Any] = (-1, None)

    def _load(self, number: int, *, check: bool = False) -> Any:
        found = self._job.load(number, self._section, check=check)
        if found is None:
            raise FormatError("a finished block is damaged", file=str(self._job.folder), found=number)
        return found

    def _in_memory(self, number: int) -> Any:
        if self._recent[0] != number:
            self._recent = (number, self._load(number))
        return self._recent[1]

    def outline(self, name: str) -> tuple[QuantSpec, tuple[int, int]]:
        """Spec and shape of a unit."""
        return self._outlines[name]

    def unit(self, name: str) -> QuantTensor:
        tensor: QuantTensor = self._in_memory(self._block_of[name]).units[name]
        return tensor

    def dense(self, name: str) -> Tensor | None:
        """The changed parameter of this name; None where it is as it was."""
        if name in self.outside:
            return self.outside[name]
        number = self._dense_of.get(name)
        return None if number is None else self._in_memory(number).dense[name]

    @property
    def dense_names(self) -> list[str]:
        """The names of all changed parameters."""
        return [*self._dense_of, *self.outside]


class Assembly:
    """Writes the checkpoint.

    Args:
        source: folder of the dense checkpoint.
        model: of it, on any device.
        quantizer: with the plan of the model.
        units: all of them.
        results: of the job.
        config: what changes in the model's configuration.
    """

    def __init__(
        self,
        source: Path,
        model: Any,
        quantizer: LowbitQuantizer,
        units: Sequence[Unit],
        results: Results,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = dict(config or {})
        self.files, self.model, self.quantizer, self.results = CheckpointFiles(source), model, quantizer, results
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._experts = ExpertNames(model, mapping)
        self._linear = {f"{unit.module}.weight": unit for unit in units if unit.expert is None}
        self._by_name = {unit.name: unit for unit in units}
        self._fused: dict[str, list[Unit]] = {}
        for unit in units:
            if unit.expert is not None:
                self._fused.setdefault(unit.full_parameter, []).append(unit)
        self._state = model.state_dict()

    def write(
        self, folder: Path, advance: Callable[[int], object] = lambda done: None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write weights, configuration and side files into an empty folder; one tensor is in memory at a time."""
        wire, settings = self.quantizer.recipe.wire, self.quantizer.recipe.settings
        placed = {name: self._place(name) for name in self.files.names()}
        specs: Specs = {}
        others: list[str] = []
        for source, targets in placed.items():
            if targets is None:
                others.extend(self._biases(source).values() or [source])
                continue
            for name, unit in targets:
                specs[name] = self.results.outline(unit.name)
        writer = ShardWriter(folder, wire.metadata(settings, specs, others), shard_bytes)
        for source, targets in placed.items():
            for name, tensor in self._tensors(source, targets):
                writer.add(name, tensor)
            advance(1)
        held = {self._parameter(source) for source in placed}
        for name in self.results.outside:
            if name not in held:  # of a head that was tied and is so no more
                writer.add(name, self.results.outside[name])
        files = writer.close()
        self._write_config(folder)
        write_side_files(folder, wire.side_files(settings, specs))
        for file in files:  # written for the owner alone; whoever may read the config may read these
            file.chmod((folder / "config.json").stat().st_mode)

    def _parameter(self, source: str) -> str:
        """What the model calls a tensor of the files."""
        prefix = self.model.base_model_prefix
        found: str = rename_source_key(
            source, self._renamings, [], base_model_prefix=prefix, meta_state_dict=self._state
        )[0]
        return found

    def _place(self, source: str) -> list[tuple[str, Unit]] | None:
        """The units that take the place of a tensor, each with its name in files; None for a tensor that stays."""
        parameter = self._parameter(source)
        if unit := self._linear.get(parameter):
            return [(source.removesuffix(".weight"), unit)]
        if located := self._experts.locate(parameter.removesuffix(".weight")):
            stack, number = located
            single = self._by_name.get(f"{stack.module}.{number}.{stack.part}")
            return None if single is None else [(source.removesuffix(".weight"), single)]
        if whole := self._fused.get(parameter):
            return [(self._expert_name(source, parameter, unit), unit) for unit in whole]
        return None

    def _expert_name(self, source: str, parameter: str, unit: Unit) -> str:
        """What files call a matrix that is stored apart, where the tensor `source` holds all experts."""
        leaf, apart = parameter.rpartition(".")[2], f"{unit.expert}.{unit.part}"
        if source.endswith(f".{leaf}"):
            return f"{source.removesuffix(leaf)}{apart}"
        name = f"{unit.module}.{apart}"
        return names_in_files(self.model, [name])[name]

    def _biases(self, source: str) -> dict[tuple[str, int], str]:
        """What becomes of a fused bias whose experts are written apart: by part and expert, its name in files."""
        parameter = self._parameter(source)
        units = self._fused.get(parameter.removesuffix("_bias"), []) if parameter.endswith("_bias") else []
        return {(unit.part, unit.expert or 0): f"{self._expert_name(source, parameter, unit)}.bias" for unit in units}

    def _tensors(self, source: str, targets: list[tuple[str, Unit]] | None) -> Iterator[tuple[str, Tensor]]:
        if biases := self._biases(source):
            projection = self._fused[self._parameter(source).removesuffix("_bias")][0].projection
            parts = projection.split_bias(self.files.tensor(source)) if projection else {}
            for (part, expert), name in biases.items():
                yield name, parts[part][expert].clone()
            return
        if targets is None:
            changed = self.results.dense(self._parameter(source))
            yield source, self.files.tensor(source) if changed is None else changed
            return
        recipe = self.quantizer.recipe
        for name, unit in targets:
            settings = recipe.settings_of(unit.name if unit.expert is None else name)
            for suffix, tensor in recipe.wire.write(settings, self.results.unit(unit.name)).items():
                yield f"{name}.{suffix}", tensor

    def _write_config(self, folder: Path) -> None:
        config = read_json(self.files.folder / "config.json")
        config |= self.config
        config["quantization_config"] = self.quantizer.quantization_config.to_dict()
        text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """``quantization_report.json``: what the run measured, for ``lowbit report``."""
    write_side_files(folder, {"quantization_report.json": report})
