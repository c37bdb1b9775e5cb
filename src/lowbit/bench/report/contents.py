"""What a report says, gathered from a quantized checkpoint: one weight at a time, and of each a strip of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.bench.report.places import Place, places
from lowbit.bench.report.record import BlockRecord, LayerRecord, Record, read_record
from lowbit.core import QuantTensor
from lowbit.core.rows import can_select_rows, dequantize_rows
from lowbit.errors import PlanError
from lowbit.integrations.checkpoint import open_checkpoint
from lowbit.integrations.transformers.outline import Outline, outline
from lowbit.wire import Checkpoint, CheckpointFiles
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles
from lowbit.wire.store import dtype_bits, quantization_config, read_json

Advance = Callable[[int], object]

_STRIP: Final = 1 << 18  # weights that are dense at a time: 1 MiB in fp32, which a core's own cache holds
# Methods that move scales into the norms (AWQ) or rotate change them by far more than another dtype rounds them.
_MOVED: Final = 0.02
_DENSE_BYTES: Final = 2  # of a weight before it was quantized, where no reference says otherwise


@dataclass(frozen=True)
class Layer:
    """One quantized weight.

    Attributes:
        shape: logical ``(out, in)``.
        stored_bytes: of all its tensors in the files.
        weight_error: ``|dW|^2 / |W|^2``, from the reference or the run's record.
        max_over_rms, kurtosis: of the reference's weight, or without one of the quantized weight; a normal
            distribution's kurtosis is 3.
        record: what the run has written down; None where it has not.
    """

    name: str
    place: Place
    shape: tuple[int, int]
    spec: str
    stored_bytes: float
    weight_error: float | None
    max_over_rms: float
    kurtosis: float
    record: LayerRecord | None = None

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits(self) -> float:
        """Stored bits per weight: scales, zeros, codebooks and whatever else the files hold of it."""
        return 8 * self.stored_bytes / self.count


@dataclass(frozen=True)
class Kept:
    """A tensor that is stored as it was."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def stored_bytes(self) -> float:
        return math.prod(self.shape) * dtype_bits(self.dtype) / 8


@dataclass(frozen=True)
class Measured:
    """What running the model has given.

    Attributes:
        text: the name of the file that was measured on.
        windows, seq_len: how much of it.
        perplexity: of the quantized model.
        reference: of the dense model.
        kl: mean KL divergence ``KL(reference || model)`` in nats per token, with its standard error `kl_error`.
        agreement: the share of tokens for which both find the same one most likely.
    """

    text: str
    windows: int
    seq_len: int
    perplexity: float
    reference: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None

    @property
    def growth(self) -> float | None:
        """By how much the perplexity has grown, in percent."""
        return None if self.reference is None else 100 * (self.perplexity / self.reference - 1)


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        name: of the folder or file.
        model: what the configuration says of the model, ready to be read.
        file_bytes: of the files that hold weights.
        dense_bytes: of the reference's files, or None; see :attr:`before`.
        reference: the reference's name; empty without one.
        comparable: whether the reference's weights are those that were quantized; not after AWQ or a rotation.
        missing: weights that the reference lacks.
    """

    name: str
    format: str
    model: Mapping[str, str]
    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    file_bytes: int
    dense_bytes: int | None = None
    reference: str = ""
    comparable: bool = True
    missing: tuple[str, ...] = ()
    record: Record | None = None
    measured: Measured | None = None
    blocks: tuple[BlockRecord, ...] = field(default=())

    @property
    def before(self) -> int:
        """Bytes of the dense model: the reference's, or all weights in 16 bits."""
        if self.dense_bytes is not None:
            return self.dense_bytes
        return int(sum(layer.count for layer in self.layers) * _DENSE_BYTES + sum(k.stored_bytes for k in self.kept))

    @property
    def parameters(self) -> int:
        return sum(layer.count for layer in self.layers) + sum(math.prod(kept.shape) for kept in self.kept)


def collect(
    path: str | Path,
    reference: str | Path | None = None,
    *,
    measured: Measured | None = None,
    advance: Advance = lambda done: None,
) -> Report:
    """Gather everything about a quantized checkpoint.

    Args:
        path: folder of a quantized checkpoint in any format, or a GGUF file.
        reference: folder of the dense checkpoint that it was made from.
        measured: what running it has given.
        advance: called with 1 after each weight; there are ``len(open_checkpoint(path).weights)``.

    Raises:
        FormatError: the files are damaged, or the run's record is.
        PlanError: the reference is quantized, or its weights have other shapes.
    """
    checkpoint = open_checkpoint(path)
    dense = None if reference is None else Reference(Path(reference))
    folder = None if isinstance(checkpoint.files, GgufCheckpointFiles) else checkpoint.files.folder
    record = None if folder is None else read_record(folder)
    comparable = dense is None or not dense.differs_in_norms(checkpoint)
    layers = _layers(checkpoint, dense if comparable else None, record, advance)
    config = _config(checkpoint)
    return Report(
        name=Path(path).resolve().name,
        format=checkpoint.format,
        model=_describe(config),
        layers=tuple(layers),
        kept=tuple(Kept(name, *checkpoint.files.layout(name)) for name in checkpoint.dense),
        file_bytes=_file_bytes(checkpoint.files),
        dense_bytes=None if dense is None else _file_bytes(dense.files),
        reference=dense.name if dense else "",
        comparable=comparable,
        missing=tuple(dense.missing) if dense else (),
        record=record,
        measured=measured,
        blocks=record.blocks if record else (),
    )


class Reference:
    """The dense checkpoint that a quantized one was made from, read a tensor at a time.

    Attributes:
        missing: the weights that were asked for and are not there.

    Raises:
        PlanError: the folder holds a quantized checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        stored = quantization_config(folder)
        if stored is not None:
            raise PlanError(f"'{folder}' is quantized itself ({stored.get('quant_method')}); give the dense model")
        self.name = folder.resolve().name
        self.files = CheckpointFiles(folder)
        self.missing: list[str] = []
        self._outline: Outline = outline(folder)
        self._names = set(self.files.names())

    def weight(self, module: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight ``[out, in]`` of a module in its own dtype; None, and noted as missing, where there is none.

        Raises:
            PlanError: it has another shape.
        """
        name = self._find(f"{module}.weight")
        if name is None:
            self.missing.append(module)
            return None
        tensor = self.files.tensor(name)
        if self._outline.is_transposed(name.removesuffix(".weight")) and tensor.dim() == 2:
            tensor = tensor.t()
        if tuple(tensor.shape) != shape:
            raise PlanError(
                f"'{name}' is {list(tensor.shape)} in '{self.name}' and {list(shape)} in the checkpoint; "
                "--reference takes the model that it was made from"
            )
        return tensor

    def differs_in_norms(self, checkpoint: Checkpoint) -> bool:
        """Whether scales were moved into the norms, after which single weights can't be compared."""
        for name in checkpoint.dense:
            found = self._find(name)
            if found is None or "norm" not in name or len(checkpoint.files.layout(name)[0]) != 1:
                continue
            ours, theirs = checkpoint.files.tensor(name).float(), self.files.tensor(found).float()
            if ours.shape != theirs.shape or float((ours - theirs).norm()) > _MOVED * float(theirs.norm()):
                return True
        return False

    def _find(self, name: str) -> str | None:
        prefix = f"{self._outline.prefix}."
        spellings = (name, f"{prefix}{name}", name.removeprefix(prefix))
        return next((spelled for spelled in spellings if spelled in self._names), None)


def _layers(
    checkpoint: Checkpoint, dense: Reference | None, record: Record | None, advance: Advance
) -> Iterator[Layer]:
    suffixes = _stored_tensors(checkpoint)
    for name, place in places(list(checkpoint.weights)).items():
        tensor = checkpoint.weights[name]
        weight = None if dense is None else dense.weight(name, tensor.shape)
        moments = _compare(tensor, weight)
        written = record.layers.get(name) if record else None
        own_error = moments.error if weight is not None else None
        yield Layer(
            name=name,
            place=place,
            shape=tensor.shape,
            spec=str(tensor.spec),
            stored_bytes=sum(_tensor_bytes(checkpoint, stored) for stored in suffixes[name]),
            weight_error=own_error if own_error is not None else (written.weight_error if written else None),
            max_over_rms=moments.max_over_rms,
            kurtosis=moments.kurtosis,
            record=written,
        )
        advance(1)


def _stored_tensors(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The names of the tensors in the files, by module."""
    present = set(checkpoint.files.names())
    return {
        module: [name for suffix in checkpoint.wire.suffixes if (name := f"{module}.{suffix}") in present]
        for module in checkpoint.weights
    }


def _tensor_bytes(checkpoint: Checkpoint, name: str) -> float:
    shape, dtype = checkpoint.files.layout(name)
    return math.prod(shape) * dtype_bits(dtype) / 8


@dataclass
class _Moments:
    """Sums in double precision over the strips of a weight."""

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    largest: float = 0.0
    difference: float = 0.0

    def add(self, weight: Tensor, quantized: Tensor | None) -> None:
        """Count a strip of fp32 numbers; `quantized` is None where there is nothing to compare with."""
        self.count += weight.numel()
        square = weight.square()
        parts = (weight, square, square * weight, square.square())
        self.sums += torch.stack([_sum(part) for part in parts])
        self.largest = max(self.largest, float(weight.abs().max()))
        if quantized is not None:
            self.difference += float(_sum((quantized - weight).square()))

    @property
    def error(self) -> float | None:
        """Relative squared error; None of a weight that is zero."""
        total = float(self.sums[1])
        return self.difference / total if total > 0 else None

    @property
    def max_over_rms(self) -> float:
        square = float(self.sums[1]) / self.count
        return self.largest / math.sqrt(square) if square > 0 else 0.0

    @property
    def kurtosis(self) -> float:
        """``E[(w - mean)^4] / E[(w - mean)^2]^2``; 0 of a constant weight."""
        m1, m2, m3, m4 = (self.sums / self.count).tolist()
        variance = m2 - m1 * m1
        fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        return fourth / variance**2 if variance > 1e-12 * m2 else 0.0


def _sum(rows: Tensor) -> Tensor:
    """Rows in fp32, where torch adds in pairs and loses nothing that matters; their sums in fp64."""
    return rows.sum(-1).sum(dtype=torch.float64)


def _compare(tensor: QuantTensor, weight: Tensor | None) -> _Moments:
    moments = _Moments()
    for rows, quantized in _strips(tensor):
        if weight is None:
            moments.add(quantized, None)
        else:
            moments.add(weight[rows].float(), quantized)
    return moments


def _strips(tensor: QuantTensor) -> Iterator[tuple[slice, Tensor]]:
    """The dense weight, a few rows at a time where rows can be dequantized apart."""
    rows, cols = tensor.shape
    step = max(1, _STRIP // cols)
    if step >= rows or not can_select_rows(tensor.spec, tensor.shape):
        yield slice(0, rows), tensor.dequantize()
        return
    for first in range(0, rows, step):
        last = min(first + step, rows)
        chosen = torch.arange(first, last)
        strip = dequantize_rows(tensor.spec, tensor.tensors, tensor.shape, chosen, torch.float32)
        yield slice(first, last), strip


def _file_bytes(files: CheckpointFiles | GgufCheckpointFiles) -> int:
    return sum(file.stat().st_size for file in {files.file_of(name) for name in files.names()})


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    if isinstance(checkpoint.files, GgufCheckpointFiles):
        return checkpoint.files.config
    return read_json(checkpoint.files.folder / "config.json")


_FACTS: Final = {
    "num_hidden_layers": "blocks",
    "hidden_size": "hidden size",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "vocab_size": "vocabulary",
}


def _describe(config: Mapping[str, Any]) -> dict[str, str]:
    """The architecture and a few sizes, of the text tower where there are several."""
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else dict(config)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else config.get("model_type")
    facts = {"architecture": name} if isinstance(name, str) else {}
    for key, title in _FACTS.items():
        value = merged.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and title not in facts:
            facts[title] = f"{value:,}" if abs(value) < 10**12 else "very many"
    return facts
