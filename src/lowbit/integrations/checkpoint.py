"""Opening a checkpoint without a model, with what only the model's architecture knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowbit import wire
from lowbit.wire import Checkpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a quantized checkpoint, a folder or a GGUF file; reads headers and configuration only.

    Where a format doesn't store the shapes of its weights (quanto, 2 and 4 bits), they are those of the model that
    ``config.json`` describes, as Transformers makes it.

    Raises:
        FormatError: neither a folder of safetensors files nor a GGUF file, not quantized, or in a format that no wire
            reads.
    """
    return wire.open_checkpoint(path, shapes=_shapes)


def _shapes(folder: Path) -> Mapping[str, tuple[int, int]]:
    from lowbit.integrations.transformers.outline import outline

    return outline(folder).shapes
