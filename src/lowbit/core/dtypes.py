"""The dtypes that a file or a configuration may name. An allow-list: a name is never looked up on a module."""

from __future__ import annotations

from typing import Final

import torch

from lowbit.errors import FormatError

FLOATS: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
FLOAT8S: Final[dict[str, torch.dtype]] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
INTEGERS: Final[dict[str, torch.dtype]] = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
ALL: Final[dict[str, torch.dtype]] = {**FLOATS, **FLOAT8S, **INTEGERS}
NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in ALL.items()}


def parse(name: object, allowed: dict[str, torch.dtype] = FLOATS) -> torch.dtype:
    """The dtype called `name`, with or without the prefix ``torch.``.

    Raises:
        FormatError: `name` is not one of `allowed`.
    """
    if isinstance(name, torch.dtype):
        name = NAMES.get(name)
    key = name.removeprefix("torch.") if isinstance(name, str) else None
    if key not in allowed:
        raise FormatError("unknown dtype", found=repr(name)[:80], expected=f"one of {sorted(allowed)}")
    return allowed[key]


def name_of(dtype: torch.dtype) -> str:
    """The name of an allowed dtype, without the prefix ``torch.``."""
    return NAMES[dtype]
