"""Files that a format keeps beside the weights, written where `save_pretrained` writes."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


class SavePretrained:
    """Stands in for a model's own `save_pretrained` and tells the quantizer which folder is being written.

    Transformers asks a quantizer for tensors and metadata, but never says where they go. The model is held weakly, so
    that it is freed as soon as its last user is gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any) -> Any:
        """See `PreTrainedModel.save_pretrained`."""
        model: Any = self._model()
        if model is None:
            raise ReferenceError("the model that was to be saved is gone")
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and is_main_process and not getattr(model, "_hf_peft_config_loaded", False):
            quantizer.folder = Path(save_directory)
        try:
            return type(model).save_pretrained(model, save_directory, is_main_process, **kwargs)
        finally:
            if quantizer is not None:
                quantizer.folder = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        model = self._model()
        if model is None:
            raise ReferenceError("the model that was to be saved is gone")
        return SavePretrained(copy.deepcopy(model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self._model(),)


def write_side_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write JSON files, each under a temporary name that is then changed."""
    for name, data in files.items():
        path = folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=4), encoding="utf-8")
        temporary.replace(path)
