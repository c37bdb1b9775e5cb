"""Transformers' quantization configs, with the arguments that it has dropped and the values that it no longer takes.

Each class is a subclass of Transformers' own, under the same name, so that either may be passed wherever one is wanted.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import transformers

from lowbit.errors import FormatError

_EXLLAMA_VERSIONS = (1, 2)
_AWQ_KERNEL_NAMES = ("exllama", "ipex", "marlin")
_MODULE_NAME = re.compile(r"[\w.\-]+")


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """`transformers.BitsAndBytesConfig`; an integer `llm_int8_threshold` is taken as the number that it is."""

    def __init__(self, *args: Any, llm_int8_threshold: float = 6.0, **kwargs: Any) -> None:
        if type(llm_int8_threshold) is int:
            llm_int8_threshold = float(llm_int8_threshold)
        super().__init__(*args, llm_int8_threshold=llm_int8_threshold, **kwargs)  # type: ignore[misc]


class GPTQConfig(transformers.GPTQConfig):
    """`transformers.GPTQConfig` with kernel hints, and with modules that stay dense.

    ``use_exllama=False`` (or ``disable_exllama=True``) asks for the plain torch kernel; ``True``, the default, leaves
    the choice to lowbit. The version in `exllama_config` is checked and has no further meaning. None of them is stored.

    `modules_to_not_convert` takes the patterns of :func:`lowbit.nn.planning.matches`. The modules that were left out
    are stored as AWQ does, and besides as GPTQModel and vLLM read it: ``dynamic``, with ``-:`` and a regular expression
    each.

    Raises:
        ValueError: both `use_exllama` and `disable_exllama` are given, or the version is not 1 or 2.
        FormatError: `modules_to_not_convert` is not a list of texts, or `dynamic` not a dict of dicts.
    """

    def __init__(
        self,
        bits: int,
        *args: Any,
        use_exllama: bool | None = None,
        exllama_config: dict[str, Any] | None = None,
        disable_exllama: bool | None = None,
        modules_to_not_convert: list[str] | None = None,
        dynamic: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if use_exllama is not None and disable_exllama is not None:
            raise ValueError("give use_exllama or disable_exllama, not both")
        if disable_exllama is not None:
            use_exllama = not disable_exllama
        _check_exllama(exllama_config)
        _check_left_out(modules_to_not_convert, dynamic)
        super().__init__(bits, *args, **kwargs)
        self.use_exllama = use_exllama
        self.modules_to_not_convert = modules_to_not_convert
        self.dynamic = dynamic

    def get_loading_attributes(self) -> dict[str, Any]:
        return {**super().get_loading_attributes(), "use_exllama": self.use_exllama}

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        data.pop("use_exllama", None)
        names = [name for name in data["modules_to_not_convert"] or () if _MODULE_NAME.fullmatch(name)]
        data["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in names} | (data["dynamic"] or {})
        for name in ("modules_to_not_convert", "dynamic"):
            if not data[name]:
                del data[name]
        return data


class AwqConfig(transformers.AwqConfig):
    """`transformers.AwqConfig` with the versions ``exllama``, ``marlin`` and ``ipex``: kernels for gemm files.

    The arguments of fused modules (`do_fuse`, `fuse_max_seq_len`, `modules_to_fuse`) are checked as they were; fusing
    itself is not implemented, which a warning says.

    Raises:
        ValueError: `do_fuse` without `fuse_max_seq_len`, incomplete `modules_to_fuse`, or a wrong exllama version.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_exllama(kwargs.pop("exllama_config", None))
        _check_fusing(kwargs)
        spelled = kwargs.get("version")
        self.kernel_version = spelled.lower() if isinstance(spelled, str) else None
        if self.kernel_version in _AWQ_KERNEL_NAMES:
            kwargs["version"] = "gemm"
        super().__init__(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        data.pop("kernel_version", None)
        return data


def _check_exllama(config: dict[str, Any] | None) -> None:
    if config is not None and config.get("version") not in _EXLLAMA_VERSIONS:
        raise ValueError(f"exllama_config needs a 'version' of 1 or 2, not {config!r}")


def _check_left_out(modules: Any, dynamic: Any) -> None:
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        raise FormatError("modules_to_not_convert is a list of names", found=repr(modules)[:80])
    if dynamic is not None and not (
        isinstance(dynamic, dict) and all(isinstance(changes, dict) for changes in dynamic.values())
    ):
        raise FormatError("dynamic maps patterns to objects", found=repr(dynamic)[:80])


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
