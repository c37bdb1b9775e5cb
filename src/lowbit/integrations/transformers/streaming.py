"""Models whose blocks stay on the disk: Transformers loads what is around them and says where the rest is."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from lowbit.calibration.stacks import block_lists
from lowbit.errors import PlanError
from lowbit.wire.store import CheckpointFiles

_CLASSES: Final = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModel",
)
_SAMPLES: Final = 8  # places of each tensor that a fingerprint covers, from the first byte to the last
_SAMPLE: Final = 512  # bytes at each


@dataclass
class Streamed:
    """A model without its blocks.

    Attributes:
        model: blocks on the meta device, the rest in memory.
        weights: the blocks' parameters by full name, read when asked for.
        dtype: that the checkpoint has.
    """

    model: Any
    weights: Mapping[str, Tensor]
    dtype: torch.dtype


def auto_class_of(config: Any) -> Any:
    """The Auto class that makes the model that a config's ``architectures`` names.

    Raises:
        PlanError: Transformers has none for it.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    for name in _CLASSES:
        found = getattr(transformers, name, None)
        if found is None:
            continue
        try:
            with torch.device("meta"):
                model = found.from_config(config)
        except (ValueError, ImportError):
            continue
        if type(model).__name__ == named or not named:
            return found
    raise PlanError(f"Transformers has no text model for '{named or type(config).__name__}'")


def stream_model(folder: Path, offload: Path) -> Streamed:
    """Load a dense checkpoint with every list of blocks left on the disk.

    Args:
        folder: of the checkpoint.
        offload: for weights that Transformers has to bring into another layout (merged experts); made if need be.

    Raises:
        PlanError: Transformers can't load the model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        auto = auto_class_of(config)
        with torch.device("meta"):
            outline = auto.from_config(config)
        with warnings.catch_warnings():
            # Of tensors outside all modules, which a device map has to name like all others.
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            model = auto.from_pretrained(
                folder,
                dtype="auto",
                device_map=_device_map(outline),
                offload_folder=str(offload),
                experts_implementation="eager",  # one product per expert, which can be watched
            )
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"Transformers can't load '{folder}': {error}") from error
    weights = _weights_of(model)
    remove_hook_from_module(model, recurse=True)
    model.eval()
    return Streamed(model, weights, model.dtype)


def _device_map(model: nn.Module) -> dict[str, str]:
    """Blocks to the disk, everything else to the CPU; names only, since a prefix would take the blocks along."""
    places: dict[str, str] = {}
    _place(model, "", block_lists(model), places)
    return places


def _place(module: nn.Module, name: str, stacks: list[str], places: dict[str, str]) -> None:
    if name in stacks:
        places.update({f"{name}.{number}": "disk" for number, _ in module.named_children()})
        return
    if name and not any(stack.startswith(f"{name}.") for stack in stacks):
        places[name] = "cpu"
        return
    for own, child in module.named_children():
        _place(child, f"{name}.{own}".lstrip("."), stacks, places)
    for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        places[f"{name}.{own}".lstrip(".")] = "cpu"


def _weights_of(model: nn.Module) -> Mapping[str, Tensor]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for entry in getattr(hook, "hooks", (hook,)):
            found = getattr(entry, "weights_map", None)
            if found is not None:
                loader: Mapping[str, Tensor] = getattr(found, "dataset", found)
                return loader
    raise PlanError("the model has no blocks on the disk; nothing can be calibrated block by block")


def model_identity(folder: Path) -> dict[str, str]:
    """What tells a checkpoint from others: its configuration, and the names, shapes and samples of its tensors.

    A fingerprint covers some bytes of every tensor, not all: reading a large model through would take longer than
    quantizing it.
    """
    found = hashlib.blake2b(digest_size=16)
    for text in _outline_of(folder):
        found.update(text)
    config = json.loads((folder / "config.json").read_bytes())
    return {"config": _digest(json.dumps(config, sort_keys=True).encode()), "weights": found.hexdigest()}


def _outline_of(folder: Path) -> Iterator[bytes]:
    files = CheckpointFiles(folder)
    for name in sorted(files.names()):
        yield f"{name} {files.layout(name)}".encode()
        raw = files.tensor(name).reshape(-1).view(torch.uint8).numpy()
        last = max(0, raw.size - _SAMPLE)
        for start in {last * number // (_SAMPLES - 1): None for number in range(_SAMPLES)}:
            yield raw[start : start + _SAMPLE].tobytes()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
