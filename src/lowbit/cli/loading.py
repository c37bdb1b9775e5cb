"""Finding and loading models for the commands, with errors that a user can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError, PlanError

if TYPE_CHECKING:
    import torch

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


class DType(str, Enum):
    """Dtypes in which a model can be loaded; `auto` is the checkpoint's own."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def find_folder(path: str, files: Sequence[str] = _HUB_FILES, *, gguf: bool = False) -> Path:
    """The local folder of a checkpoint, downloaded from the hub where `path` is no folder but a name like ``org/name``.

    Args:
        files: patterns of what is downloaded.
        gguf: whether a GGUF file will do instead.

    Raises:
        PlanError: there is no such folder, it has no ``config.json``, or the hub doesn't give it.
    """
    folder = Path(path)
    if not folder.exists() and _HUB_NAME.fullmatch(path) and not path.startswith("."):
        folder = _download(path, files)
    if not folder.exists():
        raise PlanError(f"there is no folder '{path}'")
    if gguf and folder.suffix == ".gguf" and folder.is_file():
        return folder
    if not folder.is_dir():
        raise PlanError(f"'{path}' is a file; give the folder of a checkpoint")
    if not (folder / "config.json").is_file():
        raise PlanError(f"'{path}' is not a checkpoint: it has no config.json")
    return folder


def load_model(folder: Path, *, dtype: DType, device: str | None, **kwargs: Any) -> Any:
    """A causal language model, ready to run.

    Raises:
        PlanError: Transformers can't load it, or there is no such device.
    """
    import lowbit

    place = device_map(device)
    try:
        return lowbit.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype.value, device_map=place, **kwargs)
    except LowbitError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"Transformers can't load '{folder}': {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises:
        PlanError: there is none that Transformers can load.
    """
    import lowbit

    try:
        return lowbit.AutoTokenizer.from_pretrained(folder)
    except LowbitError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise PlanError(f"Transformers can't load a tokenizer from '{folder}': {error}") from error


def device_map(device: str | None) -> Any:
    """What `from_pretrained` takes; None chooses the first accelerator, or else the CPU.

    Raises:
        PlanError: this machine has no such device.
    """
    import torch

    if device == "auto":
        return "auto"
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return {"": "cpu" if found is None else _indexed(found)}
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PlanError(f"there is no device '{device}' here: {error}") from error
    if place.type == "meta":
        raise PlanError("the meta device holds no weights")
    return {"": _indexed(place)}


def _indexed(place: torch.device) -> torch.device | str:
    """Hooks of placed models compare devices, so that ``cuda`` has to be ``cuda:0``."""
    import torch

    if place.type == "cpu" or place.index is not None:
        return place
    return torch.empty(0, device=place).device


def _download(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise PlanError(f"there is no folder '{name}', and the hub doesn't give such a model: {error}") from error
