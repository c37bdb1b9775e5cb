"""AWQ, and the kernels and fused modules that its config could name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import transformers

from lowbit.algorithms import RoundToNearest
from lowbit.integrations.transformers.methods.gptq import check_exllama
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wire_named

_AWQ_KERNEL_NAMES = ("exllama", "ipex", "marlin")


class AwqConfig(transformers.AwqConfig):
    """`transformers.AwqConfig` with the versions ``exllama``, ``marlin`` and ``ipex``: kernels for gemm files.

    `w_bit` and `q_group_size`, AutoAWQ's own names for `bits` and `group_size`, are taken too.

    The arguments of fused modules (`do_fuse`, `fuse_max_seq_len`, `modules_to_fuse`) are checked as they were; fusing
    itself is not implemented, which a warning says.

    Raises:
        ValueError: `do_fuse` without `fuse_max_seq_len`, incomplete `modules_to_fuse`, or a wrong exllama version.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_exllama(kwargs.pop("exllama_config", None))
        _check_fusing(kwargs)
        for old, name in (("w_bit", "bits"), ("q_group_size", "group_size")):
            if old in kwargs:
                kwargs.setdefault(name, kwargs.pop(old))
        spelled = kwargs.get("version")
        self.kernel_version = spelled.lower() if isinstance(spelled, str) else None
        if self.kernel_version in _AWQ_KERNEL_NAMES:
            kwargs["version"] = "gemm"
        super().__init__(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        data.pop("kernel_version", None)
        return data


def _check_fusing(kwargs: dict[str, Any]) -> None:
    modules = kwargs.pop("modules_to_fuse", None)
    length = kwargs.pop("fuse_max_seq_len", None)
    if not kwargs.pop("do_fuse", modules is not None):
        return
    if length is None:
        raise ValueError("fused modules need fuse_max_seq_len: the length of the context and of what is generated")
    required = {
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "mlp",
        "attention",
        "layernorm",
        "use_alibi",
    }
    if modules is not None and (missing := required - set(modules)):
        raise ValueError(f"modules_to_fuse lacks {sorted(missing)}")
    warnings.warn(
        "fused AWQ modules are not implemented yet: the model runs unfused, with the same results", stacklevel=4
    )


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """An AWQ config, understood."""
    wire = wire_named("awq")
    settings = wire.parse(data)
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=RoundToNearest(symmetric=not settings.zero_point),
        skip=tuple(data.get("modules_to_not_convert") or ()),
        only_blocks=True,
    )


METHOD = Method(
    "awq",
    AwqConfig,
    recipe,
    # What llm-awq, AutoAWQ and GPTQModel write besides.
    known=frozenset(
        ("checkpoint_format", "desc_act", "lm_head", "pack_dtype", "q_group_size", "sym", "uri", "version", "w_bit")
    ),
    not_stored=frozenset({"backend", "max_input_length", "kernel_version", "tokenizer", "dataset", "meta"}),
    default_dtype=lambda pre_quantized: "float16",
)
