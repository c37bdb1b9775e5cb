"""GGUF files through the Auto classes: where the file is, its configuration, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import transformers
from torch import Tensor, nn
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.utils.hub import cached_file

from lowbit.errors import FormatError, PlanError
from lowbit.integrations.transformers.gguf.tokenizer import tokenizer_of
from lowbit.integrations.transformers.methods.gguf import GgufConfig
from lowbit.wire.gguf.architectures import ARCHITECTURES
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles, is_gguf
from lowbit.wire.gguf.config import config_of
from lowbit.wire.gguf.container import TensorInfo, open_gguf
from lowbit.wire.gguf.names import ROPE_TENSORS
from lowbit.wire.gguf.types import GgmlType

_TOKENS: Final = "tokenizer.ggml.tokens"
_HUB: Final = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def find_file(path: str, kwargs: dict[str, Any]) -> Path | None:
    """The GGUF file that a call names, as ``gguf_file=`` in a folder or on the hub or as the path itself; else None.

    Takes ``gguf_file`` out of the arguments.

    Raises:
        PlanError: there is no such file.
    """
    name = kwargs.pop("gguf_file", None)
    if name is None:
        return Path(path) if is_gguf(path) and Path(path).is_file() else None
    for candidate in (Path(path) / name, Path(name)):
        if candidate.is_file():
            return candidate
    if Path(path).exists():
        raise PlanError(f"'{path}' holds no file '{name}'")
    try:
        found = cached_file(path, str(name), **{key: kwargs[key] for key in _HUB if key in kwargs})
    except OSError as error:
        raise PlanError(f"there is no file '{name}' in '{path}': {error}") from error
    if found is None:
        raise PlanError(f"there is no file '{name}' in '{path}'")
    return Path(found)


def load_config(file: Path, **changes: Any) -> transformers.PretrainedConfig:
    """Transformers' configuration of a GGUF file.

    Args:
        changes: attributes to set otherwise than the file says.

    Raises:
        FormatError: the file is damaged or of an unknown architecture.
    """
    opened = open_gguf(file)
    data = config_of(opened)
    config: transformers.PretrainedConfig = transformers.AutoConfig.for_model(**{**data, **changes})
    return config


def load_tokenizer(file: Path) -> Any:
    """The tokenizer in a GGUF file.

    Raises:
        FormatError: the file is damaged, or its tokenizer is of a kind that lowbit doesn't know.
    """
    return tokenizer_of(open_gguf(file).metadata)


def split_arguments(config: transformers.PretrainedConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Set what are attributes of the configuration; returns the other arguments, without those of the hub."""
    rest = {}
    for name, value in kwargs.items():
        if hasattr(config, name) and name not in ("dtype", "attn_implementation"):
            setattr(config, name, value)
        elif name not in _HUB and name != "trust_remote_code":
            rest[name] = value
    return rest


def stored_config(file: Path, requested: Any) -> GgufConfig:
    """The quantization config of a file; one that holds plain numbers only gives a dense model.

    Raises:
        PlanError: the caller asks for something else than what the file holds.
    """
    if requested is not None and str(getattr(requested, "quant_method", "")) != "gguf":
        raise PlanError(f"'{file}' is quantized already; {requested.quant_method} is asked for")
    if getattr(requested, "type", None) is not None:
        raise PlanError(f"'{file}' says the type of each weight itself; type={requested.type!r} is asked for")
    packed = bool(GgufCheckpointFiles(file).types)
    return GgufConfig(gguf_file=str(file), dequantize=not packed or bool(getattr(requested, "dequantize", False)))


class AutoConfig(transformers.AutoConfig):
    """`transformers.AutoConfig`, which also reads GGUF files, by ``gguf_file=`` or as the path."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Transformers' own."""
        file = find_file(str(path), kwargs)
        if file is None:
            return transformers.AutoConfig.from_pretrained(path, **kwargs)
        unused = kwargs.pop("return_unused_kwargs", False)
        config = load_config(file)
        rest = split_arguments(config, kwargs)
        return (config, rest) if unused else config


class AutoTokenizer(transformers.AutoTokenizer):
    """`transformers.AutoTokenizer`, which also reads GGUF files, by ``gguf_file=`` or as the path."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Transformers' own."""
        file = find_file(str(path), kwargs)
        if file is None:
            return transformers.AutoTokenizer.from_pretrained(path, *args, **kwargs)
        return load_tokenizer(file)


class _Outside:
    """What Transformers' own reader knows of a file: no shapes, no tensors, and arrays of text as their lengths."""

    def __init__(self, metadata: dict[str, Any], names: tuple[str, ...]) -> None:
        self.metadata = {key: value for key, value in metadata.items() if key != _TOKENS}
        architecture = metadata.get("general.architecture")
        rows = metadata.get(_TOKENS) or metadata.get(f"{architecture}.vocab_size") or 0
        # Where positions are scaled by tensors the quantizer refuses what can't be told from here.
        self.tensors = {name: TensorInfo(name, (), GgmlType.F32, 0, 0) for name in names if name not in ROPE_TENSORS}
        self.tensors["token_embd.weight"] = TensorInfo("token_embd.weight", (rows, 0), GgmlType.F32, 0, 0)

    def dense(self, name: str) -> Tensor:
        raise FormatError("the tensor can't be read from here", tensor=name)


def _from_metadata(metadata: dict[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    return config_of(_Outside(metadata, tensor_names))


def register() -> None:
    """Let plain Transformers read the configurations of GGUF files as lowbit does; its own architectures stay."""
    for row in ARCHITECTURES:
        GGUF_CONFIG_ARCHS.setdefault(row.name, _from_metadata)


def unregister() -> None:
    """Take the architectures back."""
    for row in ARCHITECTURES:
        if GGUF_CONFIG_ARCHS.get(row.name) is _from_metadata:
            del GGUF_CONFIG_ARCHS[row.name]


def check_positions(files: GgufCheckpointFiles, config: Any) -> None:
    """Refuse a model whose configuration was read without the tensors that scale its positions.

    Raises:
        PlanError: says how to load it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = any(name in files.file.tensors for name in ROPE_TENSORS)
    if scaled and rope.get("rope_type") not in ("llama3", "longrope"):
        raise PlanError(
            f"'{files.path}' scales rotary positions by tensors, which Transformers' own configuration doesn't read; "
            "load it with lowbit.AutoModelForCausalLM, or pass config=lowbit.AutoConfig.from_pretrained(...)"
        )


def check_shapes(files: GgufCheckpointFiles, model: nn.Module) -> None:
    """Compare the plain tensors with the model's; those in blocks are compared when they are read.

    Raises:
        FormatError: names the first that differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in files.names():
        if not name.endswith(".gguf") and name in expected and files.layout(name)[0] != expected[name]:
            raise FormatError(
                "the tensor is not the model's",
                file=str(files.path),
                tensor=name,
                found=list(files.layout(name)[0]),
                expected=list(expected[name]),
            )
