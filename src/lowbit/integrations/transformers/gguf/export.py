"""Writing a model as a GGUF file that llama.cpp runs, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from lowbit.algorithms.ggml import GgmlBlocks
from lowbit.core import QuantTensor, respell
from lowbit.core.respell import simplest
from lowbit.errors import FormatError, PlanError, SpecError
from lowbit.integrations.transformers.gguf.tokenizer import tokenizer_metadata, tokenizer_of
from lowbit.nn.planning import matches
from lowbit.wire.gguf.architectures import Architecture
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles, is_gguf
from lowbit.wire.gguf.codec import spec_of, write_blocks
from lowbit.wire.gguf.config import TOKENS, heads_of
from lowbit.wire.gguf.metadata import facts_of, metadata_of
from lowbit.wire.gguf.mixtures import Mixture, ModelFacts, is_quantized, mixture, mixture_name
from lowbit.wire.gguf.names import Rows, architecture_for, to_gguf
from lowbit.wire.gguf.types import DTYPES, GgmlType
from lowbit.wire.gguf.wire import GgufSettings, nearest_type
from lowbit.wire.gguf.writer import Entry, write_gguf
from lowbit.wire.store import Checkpoint, CheckpointFiles, open_checkpoint, quantization_config

Progress = Callable[[str, int, int], None]
Read = Callable[[], "Tensor | QuantTensor"]

# Tensors that some checkpoints hold and no model reads.
_IGNORED: Final = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".self_attention.maskedbias")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_PREFIXES: Final = ("", "transformer.", "model.")


@dataclass(frozen=True)
class Weight:
    """One tensor under Transformers' name.

    Attributes:
        shape: as in a checkpoint; of a packed weight ``(out, in)``.
        read: gives it, dense or packed.
        type: of a packed weight in a checkpoint that has GGUF's types.
    """

    shape: tuple[int, ...]
    read: Read
    packed: bool = False
    type: GgmlType | None = None


@dataclass
class Source:
    """A model on disk, whatever its format.

    Attributes:
        config: of Transformers, complete.
        tokenizer: of Transformers, or None.
        weights: by the names of a dense checkpoint.
        label: of a checkpoint that has GGUF's types, the type or mixture that it was quantized under.
        skip: patterns of modules that were to stay dense in it.
    """

    config: transformers.PretrainedConfig
    tokenizer: Any
    weights: dict[str, Weight]
    name: str = ""
    label: str | None = None
    skip: tuple[str, ...] = ()

    def made_as(self, type_name: str) -> bool:
        """Whether its types were chosen under this very name, and are dense where that was wanted."""
        return self.label is not None and mixture_name(self.label) == mixture_name(type_name)


@dataclass
class _Planned:
    """A tensor of the file to be written, and the weights it is made of: one, or one for each expert.

    Attributes:
        turned: whether dense weights are stored ``[in, out]``.
    """

    shape: tuple[int, ...]
    type: GgmlType
    turned: bool
    parts: dict[int | None, Weight] = field(default_factory=dict)


def write_gguf_model(
    source: str | Path | Checkpoint,
    path: str | Path,
    type_name: str | None = None,
    *,
    requantize: bool = False,
    progress: Progress | None = None,
    part_bytes: int | None = None,
) -> list[Path]:
    """Write a checkpoint as a GGUF file.

    Args:
        source: a folder, dense or quantized by any format, or a GGUF file.
        type_name: a type (``Q8_0``, ``F16``) or a mixture (``Q4_K_M``); None keeps the numbers of a quantized
            checkpoint, and of a dense one its dtype. Of a checkpoint that was quantized under this name what was
            quantized keeps its numbers, what was skipped its dtype, and the rest is quantized.
        requantize: whether weights that are quantized already and can't be written to the bit are quantized anew.
        progress: called with the tensor's name, how many are written and how many there are.
        part_bytes: bytes of tensors in each of several files; None for one file.

    Returns:
        The files written.

    Raises:
        FormatError: llama.cpp has nothing for this model, tokenizer or weight; says what.
        PlanError: weights can't be made without calibration data.
    """
    opened = open_source(source)
    data = opened.config.to_dict()
    row = architecture_for(data)
    # Some configurations have names of the family's beside their own, which only they resolve.
    data |= {name: getattr(opened.config, name, None) for name in row.config.values()}
    made = type_name is not None and opened.made_as(type_name)
    # Where weights have been made there was all that it took; others' types don't depend on importance.
    chosen = None if type_name is None else mixture(type_name, importance=made)
    planned = _plan(row, opened, data, _Types(row, opened, facts_of(row, data), chosen, made))
    metadata, extra = _metadata(row, opened, data, chosen)
    rows = Rows(row, *heads_of(data))
    entries = [Entry(name, tuple(tensor.shape), GgmlType.F32, partial(_give, tensor)) for name, tensor in extra.items()]
    for name, plan in planned.items():
        entries.append(Entry(name, plan.shape, plan.type, partial(_bytes_of, row, rows, name, plan, requantize)))
    if progress is not None:
        entries = [
            entry._replace(data=partial(_report, progress, entry, number, len(entries)))
            for number, entry in enumerate(entries, start=1)
        ]
    return write_gguf(path, metadata, entries, part_bytes=part_bytes)


def open_source(source: str | Path | Checkpoint) -> Source:
    """Open a folder, a GGUF file, or a checkpoint that is open already.

    Raises:
        FormatError: nothing of the kind is there.
    """
    if not isinstance(source, Checkpoint):
        path = Path(source)
        if is_gguf(path):
            files = GgufCheckpointFiles(path)
            return _from_gguf(files, open_checkpoint(path) if files.types else None)
        if quantization_config(path) is None:
            return _from_folder(CheckpointFiles(path), None)
        source = open_checkpoint(path)
    if isinstance(source.files, GgufCheckpointFiles):
        return _from_gguf(source.files, source)
    return _from_folder(source.files, source)


def _from_folder(files: CheckpointFiles, checkpoint: Checkpoint | None) -> Source:
    config = transformers.AutoConfig.from_pretrained(files.folder)
    # Without any of these Transformers makes an empty tokenizer of the model's kind.
    has_tokenizer = any((files.folder / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder) if has_tokenizer else None
    source = Source(config, tokenizer, _weights(files, checkpoint), files.folder.name)
    if checkpoint is not None and isinstance(checkpoint.settings, GgufSettings):
        source.label, source.skip = checkpoint.settings.label, checkpoint.settings.skip
    return source


def _from_gguf(files: GgufCheckpointFiles, checkpoint: Checkpoint | None) -> Source:
    metadata = files.file.metadata
    config = transformers.AutoConfig.for_model(**files.config)
    tokenizer = tokenizer_of(metadata) if "tokenizer.ggml.tokens" in metadata else None
    return Source(config, tokenizer, _weights(files, checkpoint), str(metadata.get("general.name", "")))


def _weights(files: CheckpointFiles | GgufCheckpointFiles, checkpoint: Checkpoint | None) -> dict[str, Weight]:
    if checkpoint is None:
        return {name: Weight(files.layout(name)[0], partial(files.tensor, name)) for name in files.names()}
    dense = {name: Weight(files.layout(name)[0], partial(files.tensor, name)) for name in checkpoint.dense}
    shapes = checkpoint.plan.shapes
    own = checkpoint.settings.types if isinstance(checkpoint.settings, GgufSettings) else {}
    packed = {
        f"{module}.weight": Weight(
            shapes[module], partial(checkpoint.weights.__getitem__, module), True, own.get(module)
        )
        for module in checkpoint.weights
    }
    return dense | packed


@dataclass(frozen=True)
class _Types:
    """Which type each tensor of a file gets.

    Attributes:
        chosen: the mixture; None to keep numbers as they are.
        made: whether the source was quantized under the mixture's name.
    """

    row: Architecture
    source: Source
    facts: ModelFacts
    chosen: Mixture | None
    made: bool

    def __call__(self, target: str, shape: tuple[int, ...], stacked: tuple[int, ...], weight: Weight) -> GgmlType:
        """Of one tensor, given one of the weights it is made of, and the shape of all of them together."""
        if self.chosen is None:
            return _kept_type(target, shape, weight)
        kind = self.chosen(target, stacked, self.facts)
        if not self.made or kind.dense:
            return kind
        if weight.type is not None:
            return weight.type
        return _kept_type(target, shape, weight) if self._skipped(target) else kind

    def _skipped(self, target: str) -> bool:
        """Whether a weight that is dense in the source is so because that was wanted.

        Quantizing a model leaves the embedding and the head alone in any case; all else was skipped.
        """
        names = [end for end in ("token_embd", "output") if target == f"{end}.weight"]
        if names == ["token_embd"] and self.facts.tied:
            names.append("output")
        return not names or any(matches(self.row.modules[end], self.source.skip) for end in names)


def _plan(row: Architecture, source: Source, config: Mapping[str, Any], type_of: _Types) -> dict[str, _Planned]:
    """Every tensor of the file, in the order of the source."""
    planned: dict[str, _Planned] = {}
    for name, weight in _needed(row, source, config):
        found = next((found for prefix in _PREFIXES if (found := to_gguf(row, f"{prefix}{name}"))), None)
        if found is None:
            raise FormatError(f"llama.cpp's '{row.name}' has no such tensor", tensor=name, found=list(weight.shape))
        target, expert = found
        turned = _is_transposed(row, target, name) and not weight.packed
        shape = _shape(row, target, weight.shape[::-1] if turned else weight.shape)
        if target not in planned:
            stacked = shape if expert is None else (type_of.facts.experts, *shape)
            planned[target] = _Planned(shape, type_of(target, shape, stacked, weight), turned)
        planned[target].parts[expert] = weight
    for name, plan in planned.items():
        if None not in plan.parts:
            count = len(plan.parts)
            if sorted(plan.parts) != list(range(count)):  # type: ignore[type-var]
                raise FormatError("some experts are missing", tensor=name, found=sorted(plan.parts))  # type: ignore[type-var]
            plan.shape = (count, *plan.shape)
    return planned


def _needed(row: Architecture, source: Source, config: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    tied = bool(config.get("tie_word_embeddings"))
    for name, weight in source.weights.items():
        if name.endswith(_IGNORED) or (tied and name == "lm_head.weight"):
            continue
        yield name, weight
    if tied and row.head_required:
        yield "lm_head.weight", source.weights[f"{row.modules['token_embd']}.weight"]


def _kept_type(target: str, shape: tuple[int, ...], weight: Weight) -> GgmlType:
    """The type that holds a weight as it is."""
    if not is_quantized(target, shape):
        return GgmlType.F32
    value = weight.read()
    if isinstance(value, QuantTensor):
        return nearest_type(simplest(value))
    return next((kind for kind, dtype in DTYPES.items() if dtype == value.dtype), GgmlType.F32)


def _shape(row: Architecture, target: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if _is_unsqueezed(row, target) and len(shape) == 2 else shape


def _is_transposed(row: Architecture, target: str, name: str) -> bool:
    module = name.rpartition(".")[0].rpartition(".")[2]
    return target.endswith(".weight") and module in row.transposed


def _is_unsqueezed(row: Architecture, target: str) -> bool:
    return target.rpartition(".")[0].rpartition(".")[2] in row.unsqueezed


def _metadata(
    row: Architecture, source: Source, config: Mapping[str, Any], chosen: Mixture | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    own, tensors = metadata_of(row, config)
    name = source.name or row.name
    if row.name_says and row.name_says not in name.lower():
        name = f"{row.name_says.capitalize()} {name}"
    metadata: dict[str, Any] = {
        "general.architecture": row.name,
        "general.type": "model",
        "general.name": name,
        **own,
        "general.quantization_version": 2,
    }
    if chosen is not None:
        metadata["general.file_type"] = chosen.file_type
    if source.tokenizer is None:
        return {**metadata, "tokenizer.ggml.model": "no_vocab", **_token_ids(config)}, tensors
    return {**metadata, **tokenizer_metadata(source.tokenizer, int(config["vocab_size"]))}, tensors


def _token_ids(config: Mapping[str, Any]) -> dict[str, int]:
    found = {key: config.get(name) for name, key in TOKENS.items()}
    first = {key: value[0] if isinstance(value, list) and value else value for key, value in found.items()}
    return {key: value for key, value in first.items() if type(value) is int}


def _bytes_of(row: Architecture, rows: Rows, name: str, plan: _Planned, requantize: bool) -> Tensor:
    """All bytes of one tensor, expert after expert."""
    order = sorted(plan.parts, key=lambda expert: expert or 0)
    parts = [_encode(row, rows, name, plan, plan.parts[expert], requantize) for expert in order]
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _encode(row: Architecture, rows: Rows, name: str, plan: _Planned, weight: Weight, requantize: bool) -> Tensor:
    value = weight.read()
    try:
        if isinstance(value, QuantTensor):
            if not plan.type.dense:
                return rows.apply(name, write_blocks(plan.type, _respelled(value, plan.type, requantize)))
            value = value.dequantize(torch.float32)
        elif plan.turned:
            value = value.t()
        if len(plan.shape) == 1:
            value = value.reshape(-1)
        module = name.rpartition(".")[0].rpartition(".")[2]
        if row.norm_offset and "norm" in module:
            value = value.float() + row.norm_offset
        value = rows.apply(name, value)
        if plan.type.dense:
            return value.to(DTYPES[plan.type]).contiguous()
        return write_blocks(plan.type, GgmlBlocks().quantize(value, spec_of(plan.type)))
    except (FormatError, PlanError, SpecError) as error:
        raise type(error)(f"{name}: {error}") from error


def _respelled(tensor: QuantTensor, kind: GgmlType, requantize: bool) -> QuantTensor:
    """The same numbers as a type of GGUF spells them.

    Raises:
        FormatError: it can't, and nothing allows quantizing anew.
    """
    try:
        return respell(tensor, spec_of(kind))
    except SpecError as error:
        if not requantize:
            raise FormatError(
                f"{kind.name} can't hold these numbers to the bit ({error}); requantize to round them anew",
                found=str(tensor.spec),
            ) from error
    return GgmlBlocks().quantize(tensor.dequantize(torch.float32), spec_of(kind))


def _give(tensor: Tensor) -> Tensor:
    return tensor


def _report(progress: Progress, entry: Entry, number: int, total: int) -> bytes | Tensor:
    data = entry.data()
    progress(entry.name, number, total)
    return data
