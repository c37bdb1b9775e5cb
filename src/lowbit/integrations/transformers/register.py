"""Handing our quantizers to Transformers, and taking them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from transformers.quantizers import auto

from lowbit.integrations.transformers.gguf import loading as gguf
from lowbit.integrations.transformers.methods import METHODS, add_method, remove_method
from lowbit.integrations.transformers.quantizer import LowbitQuantizer
from lowbit.integrations.transformers.recipe import Method, Recipe

# Transformers' own keys.
_KEYS: Final[dict[str, type[Any]]] = {
    key: method.config_class for method in METHODS.values() for key in method.keys or (method.name,)
}
_originals: dict[str, tuple[Any, Any]] = {}


def register() -> None:
    """Make plain ``transformers.Auto*.from_pretrained`` load and quantize with lowbit; calling it twice is harmless."""
    for method, config_class in _KEYS.items():
        if method not in _originals:
            _originals[method] = (
                auto.AUTO_QUANTIZER_MAPPING.get(method),
                auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method),
            )
        auto.AUTO_QUANTIZER_MAPPING[method] = LowbitQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config_class
    gguf.register()


def unregister() -> None:
    """Give Transformers its own quantizers back. Models that are loaded already keep working."""
    gguf.unregister()
    while _originals:
        method, (quantizer, config_class) = _originals.popitem()
        _restore(auto.AUTO_QUANTIZER_MAPPING, method, quantizer)
        _restore(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, config_class)


def register_method(quant_method: str, config_class: type[Any], make_recipe: Callable[[Any], Recipe]) -> None:
    """Add a quantization method of your own to Transformers and lowbit.

    Args:
        quant_method: a new name, the config's `quant_method`.
        config_class: a `QuantizationConfigMixin`.
        make_recipe: turns a config of that class into a :class:`Recipe`.

    Raises:
        ValueError: Transformers has a method of that name.
    """
    if quant_method in auto.AUTO_QUANTIZER_MAPPING:
        raise ValueError(f"Transformers has a quantization method '{quant_method}' already")
    auto.AUTO_QUANTIZER_MAPPING[quant_method] = LowbitQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[quant_method] = config_class
    add_method(Method(quant_method, config_class, lambda config, data: make_recipe(config)))


def unregister_method(quant_method: str) -> None:
    """Take a method back that :func:`register_method` added."""
    if auto.AUTO_QUANTIZER_MAPPING.get(quant_method) is LowbitQuantizer and quant_method not in _KEYS:
        del auto.AUTO_QUANTIZER_MAPPING[quant_method]
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(quant_method, None)
        remove_method(quant_method)


def _restore(mapping: dict[str, Any], method: str, original: Any) -> None:
    if original is None:
        mapping.pop(method, None)
    else:
        mapping[method] = original
