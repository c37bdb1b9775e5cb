"""GPTQ, and the hints that older versions of its config give to kernels."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers

from lowbit.algorithms import Algorithm, RoundToNearest
from lowbit.core import Kept, QuantSpec
from lowbit.errors import FormatError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wire_named
from lowbit.wire.gptq import GptqSettings

_EXLLAMA_VERSIONS = (1, 2)
_MODULE_NAME = re.compile(r"[\w.\-]+")


class GPTQConfig(transformers.GPTQConfig):
    """`transformers.GPTQConfig` with kernel hints, and with modules that stay dense.

    ``use_exllama=False`` (or ``disable_exllama=True``) asks for the plain torch kernel; ``True``, the default, leaves
    the choice to lowbit. The version in `exllama_config` is checked and has no further meaning. None of them is stored.

    `modules_to_not_convert` takes the patterns of :func:`lowbit.nn.planning.matches`. The modules that were left out
    are stored as AWQ does, and besides as GPTQModel and vLLM read it: ``dynamic``, with ``-:`` and a regular expression
    each. `dynamic` may also give modules other `bits`, `group_size`, `sym` and `desc_act`. `static_groups` is for a
    `dataset`: scales are chosen before any column is rounded, so that with `desc_act` no group index is stored.

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
        modules_in_block_to_quantize: list[list[str]] | None = None,
        dynamic: dict[str, Any] | None = None,
        is_marlin_format: bool = False,
        static_groups: bool = False,
        **kwargs: Any,
    ) -> None:
        if use_exllama is not None and disable_exllama is not None:
            raise ValueError("give use_exllama or disable_exllama, not both")
        if disable_exllama is not None:
            use_exllama = not disable_exllama
        check_exllama(exllama_config)
        _check_left_out(modules_to_not_convert, dynamic)
        if is_marlin_format:
            kwargs |= {"checkpoint_format": "marlin"}
        super().__init__(bits, *args, **kwargs)
        # Given to Transformers' own class it would ask for a package that lowbit doesn't need.
        self.modules_in_block_to_quantize = modules_in_block_to_quantize or self.modules_in_block_to_quantize
        self.use_exllama = use_exllama
        self.modules_to_not_convert = modules_to_not_convert
        self.dynamic = dynamic
        self.static_groups = static_groups

    def get_loading_attributes(self) -> dict[str, Any]:
        return {**super().get_loading_attributes(), "use_exllama": self.use_exllama}

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()
        data.pop("use_exllama", None)
        names = [name for name in data["modules_to_not_convert"] or () if _MODULE_NAME.fullmatch(name)]
        data["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in names} | (data["dynamic"] or {})
        for name in ("modules_to_not_convert", "dynamic", "static_groups"):
            if not data[name]:
                del data[name]
        if self.format == "marlin":
            data["is_marlin_format"] = True  # what AutoGPTQ looks for
        return data


def check_exllama(config: dict[str, Any] | None) -> None:
    """Raise a ValueError for an `exllama_config` of no known version."""
    if config is not None and config.get("version") not in _EXLLAMA_VERSIONS:
        raise ValueError(f"exllama_config needs a 'version' of 1 or 2, not {config!r}")


def _check_left_out(modules: Any, dynamic: Any) -> None:
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        raise FormatError("modules_to_not_convert is a list of names", found=repr(modules)[:80])
    if dynamic is not None and not (
        isinstance(dynamic, dict) and all(isinstance(changes, dict) for changes in dynamic.values())
    ):
        raise FormatError("dynamic maps patterns to objects", found=repr(dynamic)[:80])


def recipe(config: Any, data: Mapping[str, Any]) -> Recipe:
    """A GPTQ config, understood."""
    wire = wire_named("gptq")
    settings = wire.parse(data)
    return Recipe(
        wire=wire,
        settings=settings,
        algorithm=RoundToNearest(symmetric=settings.symmetric),
        skip=tuple(data.get("modules_to_not_convert") or ()),
        kernel="torch" if getattr(config, "use_exllama", None) is False else None,
        only_blocks=True,
        choose=partial(
            _choose,
            settings,
            _suffixes(data.get("modules_in_block_to_quantize")),
            data.get("block_name_to_quantize"),
        ),
        algorithms=partial(_algorithm, settings) if settings.rules else None,
    )


def _choose(
    settings: GptqSettings,
    suffixes: tuple[str, ...],
    blocks: str | None,
    module: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> QuantSpec | Kept:
    """The spec of a module that is quantized on the fly, as the config's selections and ``dynamic`` have it."""
    wire, rule = wire_named("gptq"), settings.rule_of(module)
    if rule and rule[1] is None:
        return Kept(f"skipped by dynamic '{rule[0]}'")
    if suffixes and not f".{module}".endswith(suffixes):
        return Kept("skipped: not among modules_in_block_to_quantize")
    if blocks and not module.startswith(f"{blocks}."):
        return Kept(f"skipped: not in block_name_to_quantize '{blocks}'")
    spec: QuantSpec = wire.spec(wire.of(settings, module))
    return spec


def _algorithm(settings: GptqSettings, module: str) -> Algorithm:
    return RoundToNearest(symmetric=wire_named("gptq").of(settings, module).symmetric)


def _suffixes(groups: Any) -> tuple[str, ...]:
    """The modules of a block that are quantized, from the lists in which they are calibrated together; () for all.

    Raises:
        FormatError: not a list of lists of names.
    """
    lists = [] if groups is None else groups
    if not isinstance(lists, list) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists
    ):
        raise FormatError("modules_in_block_to_quantize is a list of lists of names", found=repr(groups)[:80])
    return tuple(f".{name}" for names in lists for name in names)


def prepare(config: Any) -> None:
    """Name lowbit as the writer of a new GPTQ checkpoint: readers tell the dialect of its zero points by that."""
    if getattr(config, "meta", None) is None:
        config.meta = {"quantizer": [f"lowbit:{_version('lowbit')}"]}


def without_data(config: Any) -> None:
    """Warn where a dataset was given and can't be used: the model isn't loaded from a folder by our Auto classes."""
    if getattr(config, "dataset", None) is not None:
        warnings.warn(
            "the weights are rounded to nearest and the dataset is not used: to calibrate, load the dense model from a "
            "folder with lowbit.AutoModelForCausalLM.from_pretrained, or use `lowbit quantize --method gptq`",
            stacklevel=2,
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


METHOD = Method(
    "gptq",
    GPTQConfig,
    recipe,
    # What AutoGPTQ and GPTQModel write besides.
    known=frozenset(
        (
            "checkpoint_format",
            "desc_act",
            "is_marlin_format",
            "lm_head",
            "model_file_base_name",
            "model_name_or_path",
            "mse",
            "offload_to_disk",
            "pack_dtype",
            "pack_impl",
            "rotation",
            "static_groups",
            "uri",
            "v2",
        )
    ),
    prepare=prepare,
    without_data=without_data,
    not_stored=frozenset({"backend", "max_input_length", "use_exllama", "tokenizer", "dataset", "meta"}),
)
