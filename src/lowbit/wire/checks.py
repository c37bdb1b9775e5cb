"""Checks of numbers, where bytes enter: a scale that is no number makes a whole row of weights none."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.base import Json


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise a FormatError where a tensor holds NaN or infinity; FP8 codes among them."""
    if tensor.is_meta:
        return
    # Not every operation knows FP8, and e4m3 has no infinity.
    finite = torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float16))
    if not bool(finite.all()):
        found = f"{int((~finite).sum())} of {tensor.numel()} that are not"
        raise FormatError("holds values that are no numbers", tensor=name, found=found, expected="finite values")


def require_positive(name: str, tensor: Tensor) -> None:
    """Raise a FormatError unless all values of a tensor are finite and larger than 0."""
    require_finite(name, tensor)
    if not tensor.is_meta and bool((tensor <= 0).any()):
        raise FormatError(
            "scales are positive", tensor=name, found=f"down to {float(tensor.min()):g}", expected="more than 0"
        )


def names_of(config: Json, key: str) -> tuple[str, ...] | None:
    """A list of module names in a configuration, None where there is none.

    Raises:
        FormatError: not a list of texts.
    """
    names = config.get(key)
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"quantization_config.{key} is a list of names", found=repr(names)[:80])
    return tuple(names)
