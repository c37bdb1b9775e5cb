"""Checkpoint folders: which files there are, what is in them, and one tensor at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.core import Kept, Plan, QuantTensor
from lowbit.errors import FormatError
from lowbit.wire.base import Wire
from lowbit.wire.detect import find_wire, wires
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles, is_gguf
from lowbit.wire.quanto import QMAP

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
FORMER_KEY: Final = "compression_config"  # what compressed-tensors called it before it was in Transformers
_JSON_LIMIT: Final = 64 * 2**20  # bytes; the index of the largest models takes under 10 MB
_HEADER_LIMIT: Final = 100_000_000  # bytes; safetensors' own
_LFS: Final = b"version https://git-lfs"
# Where AutoGPTQ and AutoAWQ put what is in config.json now.
SIDECARS: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
Shapes = Callable[[Path], Mapping[str, tuple[int, int]]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        FormatError: missing, too large, not UTF-8, not JSON, not an object, or nested too deep.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise FormatError("the file is too large", file=str(path), found=path.stat().st_size, expected=_JSON_LIMIT)
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"can't be read: {error.strerror}", file=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON: {error}", file=str(path)) from error
    if not isinstance(data, dict):
        raise FormatError("is not a JSON object", file=str(path), found=type(data).__name__)
    return data


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` (also of a text tower) or a sidecar says of quantization; None for a dense checkpoint.

    Raises:
        FormatError: the configuration is there but is not an object.
    """
    config = read_json(folder / "config.json")
    found = config.get("quantization_config", config.get(FORMER_KEY))
    if found is None and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("quantization_config")
    if found is None:
        found = sidecar_config(folder)
    if found is not None and not isinstance(found, dict):
        raise FormatError(
            "quantization_config is not an object", file=str(folder / "config.json"), found=repr(found)[:80]
        )
    return found


def sidecar_config(folder: Path) -> dict[str, Any] | None:
    """The quantization config that is elsewhere than in ``config.json``, with its method named.

    AutoGPTQ, AutoAWQ and quanto leave a file beside it; hqq's own files have no config.
    """
    for name, method in SIDECARS.items():
        if (folder / name).is_file():
            return {"quant_method": method, **read_json(folder / name)}
    if (folder / QMAP).is_file():
        return {"quant_method": "quanto", "qmap": read_json(folder / QMAP)}
    return _config_from_tensors(folder)


def _config_from_tensors(folder: Path) -> dict[str, Any] | None:
    """The config of files that have none, where the tensors of their format say everything (HQQ's own saving)."""
    names: list[str] = []
    if (folder / INDEX).is_file():
        names = list(read_json(folder / INDEX).get("weight_map") or ())
    elif (folder / SINGLE).is_file():
        names = list(_open(folder / SINGLE).keys())
    wire = next((wire for wire in wires() if wire.describes_itself and wire.modules(names)), None)
    if wire is None:
        return None
    files = CheckpointFiles(folder)
    present = set(files.names())
    return wire.describe(wire.modules(names), lambda name: files.tensor(name) if name in present else None)


class CheckpointFiles:
    """The tensors of a folder of safetensors files, by name, without reading them.

    Raises:
        FormatError: no weights, only pickled ones, a shard outside the folder, missing or damaged, or a tensor in two
            shards or in none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._readers: dict[Path, Any] = {}
        self._files = self._locate()

    def names(self) -> list[str]:
        return list(self._files)

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype name, from the header."""
        view = self._view(name)
        return tuple(view.get_shape()), view.get_dtype()

    def metadata(self) -> dict[str, str]:
        """What the files' headers say beside their tensors, merged."""
        merged: dict[str, str] = {}
        for path in dict.fromkeys(self._files.values()):
            merged |= self._reader(path).metadata() or {}
        return merged

    def file_of(self, name: str) -> Path:
        return self._files[name]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor to the host.

        Raises:
            FormatError: it has a dtype that torch doesn't have.
        """
        path = self._files[name]
        try:
            tensor: Tensor = self._reader(path).get_tensor(name)
        except SafetensorError as error:
            raise FormatError(f"can't be read: {error}", file=str(path), tensor=name) from error
        return tensor

    def _view(self, name: str) -> Any:
        return self._reader(self._files[name]).get_slice(name)

    def _locate(self) -> dict[str, Path]:
        if (self.folder / INDEX).is_file():
            return self._locate_shards(read_json(self.folder / INDEX))
        single = self._single_file()
        return dict.fromkeys(self._names_in(single), single)

    def _single_file(self) -> Path:
        if (self.folder / SINGLE).is_file():
            return self.folder / SINGLE
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(suffix))
        hint = (
            "; pickled weights are not read, since loading them can run any code: convert them to safetensors"
            if pickles
            else ""
        )
        raise FormatError(
            f"no weights{hint}", file=str(self.folder), found=[path.name for path in found] + pickles, expected=SINGLE
        )

    def _locate_shards(self, index: dict[str, Any]) -> dict[str, Path]:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise FormatError("weight_map has to map tensor names to files", file=str(self.folder / INDEX))
        holds = {shard: set(self._names_in(self._shard_path(shard))) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in holds[shard]:
                raise FormatError("the index lists a tensor that its shard lacks", file=shard, tensor=name)
        for shard, names in holds.items():
            for name in names:
                if weight_map.get(name) != shard:
                    raise FormatError(
                        "a shard holds a tensor that the index doesn't list there",
                        file=shard,
                        tensor=name,
                        found=weight_map.get(name),
                        expected=shard,
                    )
        return {name: self._shard_path(shard) for name, shard in weight_map.items()}

    def _shard_path(self, shard: str) -> Path:
        """Refuses names that leave the folder; links inside it are the user's own (hub caches are made of them)."""
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise FormatError("a shard's name leaves the folder", file=str(self.folder / INDEX), found=shard)
        return self.folder / shard

    def _names_in(self, path: Path) -> list[str]:
        return list(self._reader(path).keys())

    def _reader(self, path: Path) -> Any:
        if path not in self._readers:
            self._readers[path] = _open(path)
        return self._readers[path]


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors in one file, and what its header says beside them.

    Raises:
        FormatError: the file is pickled, or not a valid safetensors file.
    """
    if is_gguf(path):
        found = GgufCheckpointFiles(path)
        return found.names(), found.metadata()
    if path.suffix != ".safetensors":
        raise FormatError(
            "pickled weights are not read, since loading them can run any code: convert them to safetensors",
            file=str(path),
            found=path.suffix,
            expected=".safetensors",
        )
    file = _open(path)
    return list(file.keys()), file.metadata() or {}


def read_shapes(path: Path, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of some of the tensors in one file, from its header; those that it lacks are left out.

    Raises:
        FormatError: the file is not a valid safetensors file.
    """
    file = _open(path)
    present = set(file.keys())
    return {name: tuple(file.get_slice(name).get_shape()) for name in names if name in present}


def read_dtypes(path: Path, names: Collection[str]) -> dict[str, str]:
    """The safetensors dtypes of some of the tensors in one file, as :func:`read_shapes`; nothing of GGUF files."""
    if is_gguf(path):
        return {}
    file = _open(path)
    present = set(file.keys())
    return {name: file.get_slice(name).get_dtype() for name in names if name in present}


def dtype_bits(name: str) -> int:
    """Bits per number of a dtype as safetensors names it: ``BF16`` has 16, ``F8_E4M3`` 8, ``BOOL`` 8."""
    digits = name.partition("_")[0].lstrip("BFIUC")
    return int(digits) if digits.isdigit() else 8


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise FormatError("this is a git-lfs pointer, not the weights: run 'git lfs pull'", file=str(path))
            _check_names(file, path)
        return safe_open(str(path), framework="pt", device="cpu")
    except OSError as error:
        raise FormatError(f"can't be read: {error.strerror or error}", file=str(path)) from error
    except SafetensorError as error:
        raise FormatError(f"is not a valid safetensors file: {error}", file=str(path)) from error


def _check_names(file: BinaryIO, path: Path) -> None:
    """Refuse a header that names a tensor twice: readers differ in which of the two they take."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_LIMIT or length > path.stat().st_size:
        return  # safetensors says what is wrong
    try:
        json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not a valid safetensors file: {error}", file=str(path)) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in data if names.count(name) > 1)
        raise ValueError(f"the header has '{twice:.80}' twice")
    return data


class Checkpoint:
    """A quantized checkpoint, opened without a model.

    Attributes:
        format: the wire's name.
        weights: the quantized weights by module name, each read when asked for.
        config: the ``quantization_config`` as stored.
        files: the files; ``files.tensor(name)`` reads one tensor as it is stored.
        wire: that reads and writes the format.
        settings: of the wire, for the whole checkpoint.
    """

    def __init__(
        self,
        files: CheckpointFiles | GgufCheckpointFiles,
        wire: Wire[Any],
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.format, self.config, self.files, self.wire = wire.name, config, files, wire
        self._modules = quantized_modules(files.names(), wire)
        settings = wire.bind(wire.parse(config), files.metadata())
        self.settings = wire.with_shapes(settings, shapes) if shapes else settings
        self.weights: Mapping[str, QuantTensor] = _LazyWeights(files, wire, self.settings, self._modules)

    @property
    def dense(self) -> list[str]:
        """The names of the tensors that belong to no quantized weight."""
        owned = {f"{module}.{suffix}" for module in self._modules for suffix in self.wire.suffixes}
        return [name for name in self.files.names() if name not in owned]

    @functools.cached_property
    def plan(self) -> Plan:
        """What is quantized and what was kept; reads every packed weight once, since their specs are in the tensors."""
        entries: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for module, tensor in self.weights.items():
            entries[module], shapes[module] = tensor.spec, tensor.shape
        for name in self.dense:
            shape, dtype = self.files.layout(name)
            if len(shape) >= 2:
                module = name.removesuffix(".weight")
                entries[module], shapes[module] = Kept(f"stored dense ({dtype.lower()})"), shape
        return Plan(entries, shapes)


class _LazyWeights(Mapping[str, QuantTensor]):
    def __init__(
        self, files: CheckpointFiles | GgufCheckpointFiles, wire: Wire[Any], settings: Any, modules: list[str]
    ) -> None:
        self._files, self._wire, self._settings = files, wire, settings
        present = set(files.names())
        self._suffixes = {
            module: [suffix for suffix in wire.suffixes if f"{module}.{suffix}" in present] for module in modules
        }

    def __getitem__(self, module: str) -> QuantTensor:
        tensors = {suffix: self._files.tensor(f"{module}.{suffix}") for suffix in self._suffixes[module]}
        try:
            return self._wire.read(self._wire.of(self._settings, module), tensors)
        except FormatError as error:
            raise error.inside(module, str(self._files.file_of(f"{module}.{self._suffixes[module][0]}"))) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._suffixes)

    def __len__(self) -> int:
        return len(self._suffixes)


def open_checkpoint(path: str | Path, shapes: Shapes | None = None) -> Checkpoint:
    """Open a quantized checkpoint, a folder or a GGUF file; reads headers and configuration only.

    Args:
        shapes: asked for the shapes of a folder's weights, by module, where the format's tensors don't say them.

    Raises:
        FormatError: neither a folder of safetensors files nor a GGUF file, not quantized, or in a format that no wire
            reads.
    """
    folder = Path(path)
    if is_gguf(folder) and not folder.is_dir():
        return _open_gguf(folder)
    config = quantization_config(folder)
    if config is None:
        raise FormatError(
            "the checkpoint is not quantized",
            file=str(folder / "config.json"),
            found="no quantization_config",
            expected="a quantization_config in config.json, or a quantize_config.json beside it",
        )
    wire = find_wire(config)
    files = CheckpointFiles(folder)
    if not quantized_modules(files.names(), wire):
        raise FormatError(
            "config.json declares a quantized checkpoint, but no tensor is",
            file=str(folder),
            found=f"no *.{wire.marker}",
            expected=wire.name,
        )
    return Checkpoint(files, wire, config, shapes(folder) if shapes is not None and wire.needs_shapes else {})


def _open_gguf(path: Path) -> Checkpoint:
    files = GgufCheckpointFiles(path)
    if not files.types:
        raise FormatError("the checkpoint is not quantized", file=str(path), found="plain numbers only")
    return Checkpoint(files, find_wire({"quant_method": "gguf"}), {"quant_method": "gguf"})


def quantized_modules(names: list[str], wire: Wire[Any]) -> list[str]:
    """The modules whose weights are stored in `wire`, in the order of the files."""
    return wire.modules(names)
