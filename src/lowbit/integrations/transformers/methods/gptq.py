"""GPTQ, and the hints that older versions of its config give to kernels."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Mapping
from typing import Any

import transformers

from lowbit.algorithms import RoundToNearest
from lowbit.errors import FormatError
from lowbit.integrations.transformers.recipe import Method, Recipe
from lowbit.wire import wire_named

_EXLLAMA_VERSIONS = (1, 2)
_MODULE_NAME = re.compile(r"[\w.\-]+")
_LAYOUT = ("bits", "group_size", "sym", "desc_act")  # what GPTQModel's `dynamic` may change that files depend on


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
        check_exllama(exllama_config)
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
        skip=(*(data.get("modules_to_not_convert") or ()), *_excluded(data)),
        kernel="torch" if getattr(config, "use_exllama", None) is False else None,
        only_blocks=True,
    )


def _excluded(data: Mapping[str, Any]) -> list[str]:
    """The patterns of modules that GPTQModel's ``dynamic`` leaves dense.

    Raises:
        FormatError: it gives some modules another layout.
    """
    rules = data.get("dynamic") or {}
    for pattern, changes in rules.items():
        if not pattern.startswith("-:") and any(changes.get(key, data.get(key)) != data.get(key) for key in _LAYOUT):
            raise FormatError(
                "modules with settings of their own are not supported yet", found=f"dynamic: {pattern}"[:80]
            )
    # There a match may end anywhere in the name.
    return [f"(?:{pattern[2:]}).*" for pattern in rules if pattern.startswith("-:")]


def prepare(config: Any) -> None:
    """Name lowbit as the writer of a new GPTQ checkpoint: readers tell the dialect of its zero points by that.

    Warns that a dataset was given, since calibration isn't there yet.
    """
    if getattr(config, "meta", None) is None:
        config.meta = {"quantizer": [f"lowbit:{_version('lowbit')}"]}
    if getattr(config, "dataset", None) is not None:
        warnings.warn(
            "calibrated GPTQ is not implemented yet: the weights are rounded to nearest and the dataset is not used",
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
    prepare=prepare,
    not_stored=frozenset({"backend", "max_input_length", "use_exllama", "tokenizer", "dataset", "meta"}),
)
