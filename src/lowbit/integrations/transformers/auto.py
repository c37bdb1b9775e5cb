"""`lowbit.AutoModelForCausalLM` and all its sisters: Transformers' classes, with lowbit's quantizers for one call.

Nothing of Transformers is replaced. A call passes its quantization config under a method name of our own (``lowbit``),
so other threads and other calls keep what they had.
"""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.quantizers import auto as hf_auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import FormatError, LowbitError, PlanError
from lowbit.integrations.transformers.gguf import loading as gguf
from lowbit.integrations.transformers.methods import method_of
from lowbit.integrations.transformers.methods.bitsandbytes import BitsAndBytesConfig
from lowbit.integrations.transformers.quantizer import LowbitQuantizer
from lowbit.integrations.transformers.recipe import Method
from lowbit.wire.store import FORMER_KEY, read_json, sidecar_config

_METHOD = "lowbit"
_log = logging.getLogger(__name__)


class _Carried(QuantizationConfigMixin):
    """A quantization config on its way through Transformers to our quantizer."""

    def __init__(self, inner: Any, pre_quantized: bool) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.inner, self.pre_quantized = inner, pre_quantized
        self.errors: list[LowbitError] = []

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = self.inner.to_dict()
        return data


class _CarriedQuantizer(LowbitQuantizer):
    def __init__(self, quantization_config: _Carried, **kwargs: Any) -> None:
        kwargs["pre_quantized"] = quantization_config.pre_quantized
        super().__init__(quantization_config.inner, **kwargs)
        self.errors = quantization_config.errors


class LowbitAutoModel:
    """Base of the Auto classes; see :func:`auto_class`."""

    _target: type[Any]

    @classmethod
    def from_pretrained(cls, path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model: dense, quantized by any known format, or quantized now.

        Takes everything that Transformers' own method takes (of GGUF files also the path itself), and besides
        ``load_in_4bit``, ``load_in_8bit``, ``torch_dtype``, ``use_flash_attention_2``, and a `quantization_config` as
        an object or a dict.

        Raises:
            FormatError: the checkpoint's tensors or configuration don't fit together.
            PlanError: the request can't be carried out on this model, or contradicts the stored configuration.
        """
        path = str(path)
        _translate_old_arguments(kwargs)
        requested = _requested_config(kwargs)
        file = gguf.find_file(path, kwargs)
        if file is not None:
            return cls._from_gguf(file, requested, model_args, kwargs)
        config, kwargs = _load_config(path, kwargs)
        stored = _take_stored_config(config, path)
        carried = _combine(stored, requested)
        if carried is None:
            return cls._target.from_pretrained(path, *model_args, config=config, **kwargs)
        _default_dtype(carried, kwargs)
        return cls._carry(carried, path, *model_args, config=config, **kwargs)

    @classmethod
    def _from_gguf(cls, file: Path, requested: Any, model_args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load a GGUF file: its tensors reach Transformers' loader under Transformers' names, blocks as they are."""
        config = kwargs.pop("config", None) or gguf.load_config(file)
        kwargs = gguf.split_arguments(config, kwargs)
        kwargs.setdefault("dtype", "float32")  # which llama.cpp and Transformers' own loader compute in
        carried = _Carried(gguf.stored_config(file, requested), pre_quantized=True)
        return cls._carry(carried, str(file.parent), *model_args, config=config, gguf_file=str(file), **kwargs)

    @classmethod
    def _carry(cls, carried: _Carried, *args: Any, **kwargs: Any) -> Any:
        hf_auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _CarriedQuantizer
        try:
            return cls._target.from_pretrained(*args, quantization_config=carried, **kwargs)
        except RuntimeError as error:
            # The loader reports errors of single weights as text; ours say it better.
            if carried.errors:
                raise carried.errors[0] from error
            raise

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' own."""
        return cls._target.from_config(*args, **kwargs)


@functools.cache
def auto_class(name: str) -> type[LowbitAutoModel]:
    """The counterpart of Transformers' Auto class `name`.

    Raises:
        AttributeError: Transformers has no such class.
    """
    target = getattr(transformers, name)
    return type(
        name, (LowbitAutoModel,), {"_target": target, "__doc__": f"`transformers.{name}`, loading with lowbit."}
    )


def _translate_old_arguments(kwargs: dict[str, Any]) -> None:
    """Arguments that Transformers has renamed or dropped."""
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    if kwargs.pop("use_flash_attention_2", False):
        if kwargs.get("attn_implementation", "flash_attention_2") != "flash_attention_2":
            raise PlanError(f"use_flash_attention_2 contradicts attn_implementation={kwargs['attn_implementation']!r}")
        kwargs["attn_implementation"] = "flash_attention_2"


def _requested_config(kwargs: dict[str, Any]) -> Any:
    """The caller's quantization config as an object, or None."""
    flags = {name: kwargs.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in kwargs}
    config = kwargs.pop("quantization_config", None)
    if any(flags.values()):
        if config is not None:
            raise PlanError(f"give {' or '.join(flags)} or a quantization_config, not both")
        return BitsAndBytesConfig(**flags)
    return _as_object(config) if isinstance(config, dict) else config


def _as_object(data: dict[str, Any]) -> Any:
    """A config object from a dict, as it stands in config.json."""
    method = method_of(data)
    try:
        config = method.config_class.from_dict({**data, "quant_method": method.name})
    except (TypeError, ValueError) as error:
        raise FormatError(f"quantization_config is not valid: {error}", found=repr(data)[:200]) from error
    if unknown := sorted(set(map(str, data)) - _known_keys(method, config)):
        _log.warning("quantization_config (%s) has keys that mean nothing to lowbit: %.200s", method.name, unknown)
    return config


def _known_keys(method: Method, config: Any) -> set[str]:
    arguments: set[str] = set()
    for base in type(config).__mro__:
        if "__init__" in vars(base):
            arguments |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return {"quant_method", *_defaults(config), *arguments, *method.known}


def _load_config(path: str, kwargs: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    config = kwargs.pop("config", None)
    if config is not None:
        return config, kwargs
    if (Path(path) / "config.json").is_file():
        read_json(Path(path) / "config.json")  # of bounded size and depth; Transformers takes any
    # For the model alone: the config's own loader would swallow these, and take "auto" for a dtype.
    shared = {name: kwargs.pop(name) for name in ("dtype", "attn_implementation") if name in kwargs}
    config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    return config, {**rest, **hub, **shared}


_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def _take_stored_config(config: PretrainedConfig, path: str) -> Any:
    """Remove the stored quantization config from a model's config and return it as an object, or None."""
    for holder in (config, config.get_text_config(decoder=True)):
        for key in ("quantization_config", FORMER_KEY):
            data = getattr(holder, key, None)
            if data is not None:
                delattr(holder, key)
                return _as_object(data) if isinstance(data, dict) else data
    sidecar = sidecar_config(Path(path)) if Path(path).is_dir() else None
    if sidecar is None:
        return None
    _name_weights_file(config, Path(path))
    return _as_object(sidecar)


def _name_weights_file(config: PretrainedConfig, folder: Path) -> None:
    """AutoGPTQ named weights after their quantization; tell Transformers which file it is."""
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(found) == 1 and found != ["model.safetensors"]:
        config.transformers_weights = found[0]


def _combine(stored: Any, requested: Any) -> _Carried | None:
    if stored is None:
        return None if requested is None else _Carried(requested, pre_quantized=False)
    if requested is not None:
        _check_same(stored, requested)
        if hasattr(requested, "use_exllama"):
            stored.use_exllama = requested.use_exllama
        default = _defaults(requested)
        for name in method_of(stored).loading:
            if getattr(requested, name) != default.get(name):
                setattr(stored, name, getattr(requested, name))
    return _Carried(stored, pre_quantized=True)


def _check_same(stored: Any, requested: Any) -> None:
    """A config passed at run time may repeat the stored one or leave things at their defaults, nothing else.

    Raises:
        PlanError: names the first difference.
    """
    if str(stored.quant_method) != str(requested.quant_method):
        raise PlanError(
            f"the checkpoint is quantized with {stored.quant_method}, and {requested.quant_method} is asked for"
        )
    given, have = requested.to_dict(), stored.to_dict()
    method = method_of(stored)
    default, not_stored = _defaults(requested), method.not_stored | method.loading
    for name, value in given.items():
        left_alone = name in default and value == default[name]
        if name in not_stored or name not in have or value == have[name] or left_alone:
            continue
        raise PlanError(f"the checkpoint is stored with {name}={have[name]!r}, and {name}={value!r} is asked for")


def _defaults(config: Any) -> dict[str, Any]:
    """What the config would hold if the caller had given nothing but what has to be given."""
    required = {name: getattr(config, name) for name in ("bits", "quant_type") if hasattr(config, name)}
    data: dict[str, Any] = type(config)(**required).to_dict()
    return {name: value for name, value in data.items() if name not in required}


def _default_dtype(carried: _Carried, kwargs: dict[str, Any]) -> None:
    """Some methods have always brought the other weights to a dtype of their own unless told otherwise."""
    default = method_of(carried.inner).default_dtype(carried.pre_quantized)
    if default is not None:
        kwargs.setdefault("dtype", default)
