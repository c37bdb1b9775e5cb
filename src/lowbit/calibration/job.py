"""A quantization run as durable state: what is finished survives any end of the process, and nothing else counts.

A folder holds ``manifest.json``, which says what the job is of, and per finished block a safetensors file and, written
after it, a JSON file with its checksum. Every file is written under another name, brought to the disk, and renamed. On
the next start every whole block is taken over; what is missing or damaged is done again, which gives the same bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit.core import QuantSpec, QuantTensor
from lowbit.errors import FormatError, PlanError

MANIFEST: Final = "manifest.json"
_LOCK: Final = "lock"
_UNIT: Final = "unit:"
_DENSE: Final = "dense:"
_SEPARATOR: Final = "::"
_VERSION: Final = 1


@dataclass
class BlockResult:
    """What became of a block.

    Attributes:
        units: the quantized weights, by name.
        dense: parameters that changed and stay dense (norms, biases), by full name.
        report: of the units and the block; JSON data.
    """

    units: dict[str, QuantTensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class Job:
    """The state of one run; one process at a time.

    Args:
        folder: made if it doesn't exist.
        identity: what the results depend on: model, data, settings, versions. A folder of another job is refused. None
            where :meth:`identify` will tell.
        writes: whether this process files results; of several that share the work, one does.

    Raises:
        PlanError: the folder is another job's, holds something else, or another process works in it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None, *, writes: bool = True) -> None:
        self.folder, self.writes, self._lock = folder, writes, -1
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            if identity is not None:
                self.identify(identity)
        except BaseException:
            self.close()
            raise

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say what the job is of, once it is known.

        Raises:
            PlanError: the folder is another job's, or holds something else.
        """
        if self.writes:
            self._check(json.loads(json.dumps({"version": _VERSION, **identity})))

    def close(self) -> None:
        """Let others in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> int:
        handle = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise PlanError(f"another process works on the job in '{self.folder}'; wait for it or stop it") from error
        return handle

    def _check(self, identity: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            others = [file.name for file in self.folder.iterdir() if file.name != _LOCK and not _is_partial(file)]
            if others:
                raise PlanError(f"'{self.folder}' is no job's folder: it has no {MANIFEST}, but {sorted(others)[:3]}")
            _write(path, json.dumps(identity, indent=1).encode())
            return
        try:
            stored = json.loads(path.read_bytes())
        except ValueError as error:
            raise PlanError(f"'{path}' is damaged: {error}; remove the folder to start anew") from error
        differing = _differences(stored, identity) if isinstance(stored, dict) else ["everything"]
        if differing:
            raise PlanError(
                f"'{self.folder}' holds a job that differs in {', '.join(differing[:4])}; "
                "give the same model, data, settings and versions, or remove the folder to start anew"
            )

    # ------------------------------------------------------------------------------------------------------- blocks

    def save(self, number: int, result: BlockResult, section: str = "blocks") -> None:
        """File a finished block.

        Raises:
            OSError: the disk is full or can't be written; what was there before is whole.
        """
        if not self.writes:
            return
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, unit in result.units.items():
            described[name] = {"spec": unit.spec.to_json(), "shape": list(unit.shape)}
            for part, tensor in unit.tensors.items():
                tensors[f"{_UNIT}{name}{_SEPARATOR}{part}"] = tensor.detach().to("cpu").contiguous().clone()
        tensors |= {f"{_DENSE}{name}": value.detach().to("cpu").contiguous() for name, value in result.dense.items()}
        path = self._path(section, number)
        path.parent.mkdir(exist_ok=True)
        partial = _partial(path)
        try:
            save_file(tensors, partial, metadata={"units": json.dumps(described)})
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path} can't be written: {error}") from error
        _settle(partial, path)
        record = {"sha256": _checksum(path), "report": result.report, "report_sha256": _sum_of(result.report)}
        _write(path.with_suffix(".json"), json.dumps(record).encode())

    def load(self, number: int, section: str = "blocks", *, check: bool = True) -> BlockResult | None:
        """A finished block, its tensors mapped from the file; None where it isn't there or is damaged.

        Args:
            number: of the block.
            section: of the job.
            check: whether the file is read through for its checksum; needn't be where that was done before.
        """
        path = self._path(section, number)
        try:
            record = json.loads(path.with_suffix(".json").read_bytes())
            if record["report_sha256"] != _sum_of(record["report"]):
                return None
            if check and record["sha256"] != _checksum(path):
                return None
            return BlockResult(*_read(path), record["report"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, FormatError):
            return None

    def report(self, number: int, section: str = "blocks") -> dict[str, Any]:
        """What was said of a finished block."""
        record = json.loads(self._path(section, number).with_suffix(".json").read_bytes())
        return dict(record["report"])

    def finished(self, count: int, section: str = "blocks") -> int:
        """How many of the first `count` blocks are there without a gap, each of them whole."""
        for number in range(count):
            if self.load(number, section) is None:
                return number
        return count

    def _path(self, section: str, number: int) -> Path:
        return self.folder / section / f"{number:05d}.safetensors"

    # -------------------------------------------------------------------------------------------- decisions and states

    def decide(self, name: str, make: Any) -> Any:
        """JSON data that a job settles once: made by calling `make` the first time, read ever after."""
        path = self.folder / f"{name}.json"
        if path.exists():
            try:
                return json.loads(path.read_bytes())
            except ValueError:
                path.unlink()
        value = make()
        _write(path, json.dumps(value).encode())
        return json.loads(json.dumps(value))

    def save_state(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the state of unfinished work; takes the place of the one before."""
        if not self.writes:
            return
        path = self.folder / f"{name}.safetensors"
        partial = _partial(path)
        try:
            plain = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
            save_file(plain, partial, metadata={"facts": json.dumps(dict(facts))})
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path} can't be written: {error}") from error
        _settle(partial, path)
        _write(path.with_suffix(".sum"), _checksum(path).encode())

    def load_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save_state` kept; None where there is none or it is damaged."""
        path = self.folder / f"{name}.safetensors"
        try:
            if path.with_suffix(".sum").read_text() != _checksum(path):
                return None
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError):
            return None


def _read(path: Path) -> tuple[dict[str, QuantTensor], dict[str, Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        described: dict[str, Any] = json.loads((file.metadata() or {})["units"])
        names = list(file.keys())
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in described}
        dense: dict[str, Tensor] = {}
        for name in names:
            if name.startswith(_DENSE):
                dense[name.removeprefix(_DENSE)] = file.get_tensor(name)
            else:
                unit, _, part = name.removeprefix(_UNIT).rpartition(_SEPARATOR)
                parts[unit][part] = file.get_tensor(name)
    units = {}
    for name, entry in described.items():
        rows, cols = entry["shape"]
        units[name] = QuantTensor(QuantSpec.from_json(entry["spec"]), parts[name], (rows, cols)).validate()
    return units, dense


def _differences(stored: Any, given: Any, path: str = "") -> list[str]:
    """The paths of JSON data that differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = sorted({*stored, *given})
        nested = [_differences(stored.get(key), given.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
        return [entry for entries in nested for entry in entries]
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        found = [
            _differences(old, new, f"{path}.{number}")
            for number, (old, new) in enumerate(zip(stored, given, strict=True))
        ]
        return [entry for entries in found for entry in entries]
    return [] if stored == given else [path or "everything"]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _write(path: Path, data: bytes) -> None:
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _sum_of(report: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(report).encode()).hexdigest()


def _digest(file: Any) -> str:
    found = hashlib.sha256()
    while chunk := file.read(1 << 20):
        found.update(chunk)
    return found.hexdigest()
