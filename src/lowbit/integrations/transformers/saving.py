"""Files that a format keeps beside the weights, written where `save_pretrained` writes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion


def tell_folder(model: Any) -> None:
    """Let a model's `save_pretrained` tell the quantizer where and how it writes.

    Transformers asks a quantizer for tensors and metadata, but never says where they go.
    """
    model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
) -> Any:
    """See `PreTrainedModel.save_pretrained`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    if is_main_process and not getattr(model, "_hf_peft_config_loaded", False):
        quantizer.folder = Path(save_directory)
    quantizer.original_names = kwargs.get("save_original_format", True)
    try:
        return type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    finally:
        quantizer.folder, quantizer.original_names = None, True


def names_in_files(model: Any, modules: Iterable[str]) -> dict[str, str]:
    """What the files call packed modules, once Transformers has undone the renamings of loading."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    reversed_ones = [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, WeightRenaming)]
    names: dict[str, str] = {}
    for module in modules:
        # Patterns may end at a name's boundary, which is where a tensor's own name follows.
        name = f"{module}.weight"
        for renaming in reversed_ones:
            name = renaming.rename_source_key(name)[0]
        names[module] = name.removesuffix(".weight")
    return names


def dense_names_in_files(model: Any, state: Mapping[str, Tensor]) -> list[str]:
    """What the files call the tensors that stay dense; some are stored in pieces."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return list(revert_weight_conversion(model, shapes))


def write_side_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write JSON files, each under a temporary name that is then changed."""
    for name, data in files.items():
        path = folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=4), encoding="utf-8")
        temporary.replace(path)
