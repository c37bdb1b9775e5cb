"""The two steps of Transformers' loader that are ours: reading packed weights, and quantizing dense ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from lowbit.core import QuantTensor
from lowbit.errors import FormatError, LowbitError
from lowbit.integrations.transformers.experts.loading import quantize_experts
from lowbit.nn import QuantLinear
from lowbit.nn.embedding import QuantEmbedding
from lowbit.nn.swap import is_conv1d

if TYPE_CHECKING:
    from lowbit.integrations.transformers.quantizer import LowbitQuantizer

_ANCHOR = "codes"  # the parameter under which the loader collects a weight's tensors


class ReadPacked(ConversionOps):
    """All stored tensors of one weight -> the parameters of its `QuantLinear`."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: LowbitQuantizer, suffixes: dict[str, str]) -> None:
        # The loader casts tensors to the model's dtype unless an op carries this attribute.
        self.hf_quantizer = hf_quantizer
        self.suffixes = suffixes

    def __deepcopy__(self, memo: Any) -> ReadPacked:
        return (
            self  # The loader copies the op once per weight, and the quantizer with it; neither holds state per weight.
        )

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        name = full_layer_name.removesuffix(f".{_ANCHOR}")
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLinear | QuantEmbedding):
            raise FormatError("the checkpoint has a packed weight for a module that is not linear", tensor=name)
        tensors = {self.suffixes[pattern]: values[0] for pattern, values in input_dict.items()}
        recipe = self.hf_quantizer.recipe
        try:
            tensor = recipe.wire.read(recipe.settings_of(self.hf_quantizer.stored_name(name)), tensors)
            if tensor.shape != layer.shape:
                raise FormatError(
                    "the weight is not the module's", found=list(tensor.shape), expected=list(layer.shape)
                )
        except FormatError as error:
            raise self.hf_quantizer.note(error.inside(name)) from error
        layer.allocate(tensor.spec)
        return _place(layer, name, tensor, missing_keys)


class QuantizeDense(ConversionOps):
    """One dense weight -> a `QuantLinear` in its module's place."""

    def __init__(self, hf_quantizer: LowbitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> QuantizeDense:
        return self

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        name = full_layer_name.removesuffix(".weight")
        value = next(iter(input_dict.values()))
        weight: Tensor = value[0] if isinstance(value, list) else value
        if self.hf_quantizer.expert_stacks(full_layer_name):
            return quantize_experts(self.hf_quantizer, model, full_layer_name, weight, missing_keys)
        quantizer, dense = self.hf_quantizer, model.get_submodule(name)
        try:
            oriented = weight.T if is_conv1d(dense) else weight
            tensor = quantizer.recipe.algorithm_of(name).quantize(oriented, quantizer.planned(name, weight.dtype))
        except LowbitError as error:
            raise self.hf_quantizer.note(type(error)(f"{name}: {error}")) from error
        bias = dense.bias if isinstance(dense.bias, nn.Parameter) else None
        layer = quantizer.make_layer(tensor.spec, tensor.shape, bias, weight.dtype)
        layer.train(dense.training)
        model.set_submodule(name, layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return _place(layer, name, tensor, missing_keys)


def _place(layer: QuantLinear | QuantEmbedding, name: str, tensor: QuantTensor, missing_keys: Any) -> dict[str, Tensor]:
    """The tensors as parameters under their full names; those that the layer was thought to have are not missing."""
    layer._is_hf_initialized = True  # else Transformers draws random numbers into a dense copy of every weight
    if missing_keys is not None:
        for key in [key for key in missing_keys if key.rpartition(".")[0] == name and not key.endswith(".bias")]:
            missing_keys.discard(key)
    return {f"{name}.{part}": nn.Parameter(value, requires_grad=False) for part, value in tensor.tensors.items()}


def read_converters(
    quantizer: LowbitQuantizer, suffixes: Sequence[str], modules: Iterable[str], base_prefix: str
) -> list[WeightConverter]:
    """The loader's instruction to collect ``X.qweight``, ``X.scales``, ... of each module X and read them together."""
    behind = module_lookbehind(modules, base_prefix)
    # The loader replaces the first occurrence of what was matched: the module's own name makes that the right one.
    patterns = {rf"([^.]+)\.{re.escape(suffix)}{_after(behind, suffix)}$": suffix for suffix in suffixes}
    operation = ReadPacked(quantizer, patterns)
    return [WeightConverter(list(patterns), rf"([^.]+)\.{_ANCHOR}", [operation])]


def module_lookbehind(modules: Iterable[str], base_prefix: str) -> list[str]:
    """Expressions of fixed width, one per shape of name, that end where a module's name ends.

    Digits are wildcards, so that the number of expressions doesn't grow with the number of layers; the base model's
    prefix is left out, since checkpoints of the base model have none.
    """
    shapes = {re.sub(r"\d", "0", name.removeprefix(f"{base_prefix}.")) for name in modules}
    return sorted(re.escape(shape).replace("0", r"\d") for shape in shapes)


def _after(behind: list[str], suffix: str) -> str:
    ending = rf"\.{re.escape(suffix)}"
    return "(?:" + "|".join(rf"(?<=^{shape}{ending})|(?<=\.{shape}{ending})" for shape in behind) + ")"
