"""Quantized Hugging Face Transformers models in every format that people use, from one package.

Every name is loaded when it is first used; importing lowbit changes nothing anywhere.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.core import IntCode, Kept, Plan, QuantSpec, QuantTensor
    from lowbit.errors import FormatError, KernelUnavailable, LowbitError, PlanError, SpecError
    from lowbit.integrations.checkpoint import open_checkpoint
    from lowbit.integrations.transformers import (
        AqlmConfig,
        AutoConfig,
        AutoTokenizer,
        AwqConfig,
        BitsAndBytesConfig,
        CompressedTensorsConfig,
        EetqConfig,
        FbgemmFp8Config,
        GgufConfig,
        GPTQConfig,
        HqqConfig,
        QuantoConfig,
        TorchAoConfig,
        register,
        unregister,
    )
    from lowbit.wire import Checkpoint

__version__ = "0.1.0"

_HOMES = {
    "lowbit.core": ("IntCode", "Kept", "Plan", "QuantSpec", "QuantTensor"),
    "lowbit.errors": ("FormatError", "KernelUnavailable", "LowbitError", "PlanError", "SpecError"),
    "lowbit.integrations.transformers": (
        "AqlmConfig",
        "AutoConfig",
        "AutoTokenizer",
        "AwqConfig",
        "BitsAndBytesConfig",
        "CompressedTensorsConfig",
        "EetqConfig",
        "FbgemmFp8Config",
        "GPTQConfig",
        "GgufConfig",
        "HqqConfig",
        "QuantoConfig",
        "TorchAoConfig",
        "register",
        "unregister",
    ),
    "lowbit.integrations.checkpoint": ("open_checkpoint",),
    "lowbit.wire": ("Checkpoint",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AqlmConfig",
    "AutoConfig",
    "AutoTokenizer",
    "AwqConfig",
    "BitsAndBytesConfig",
    "Checkpoint",
    "CompressedTensorsConfig",
    "EetqConfig",
    "FbgemmFp8Config",
    "FormatError",
    "GPTQConfig",
    "GgufConfig",
    "HqqConfig",
    "IntCode",
    "Kept",
    "KernelUnavailable",
    "LowbitError",
    "Plan",
    "PlanError",
    "QuantSpec",
    "QuantTensor",
    "QuantoConfig",
    "SpecError",
    "TorchAoConfig",
    "open_checkpoint",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name.startswith("AutoModel"):
        from lowbit.integrations.transformers import auto_class

        return auto_class(name)
    raise AttributeError(f"module 'lowbit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"])
