"""What a quantization config asks for, in lowbit's own terms; and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.algorithms import Algorithm
from lowbit.core import Kept, QuantSpec
from lowbit.wire import Wire

Choose = Callable[[str, tuple[int, int], torch.dtype], QuantSpec | Kept]


@dataclass(frozen=True)
class Recipe:
    """A quantization config, understood.

    Attributes:
        wire: spells the checkpoint.
        settings: of the wire.
        algorithm: quantizes on the fly.
        skip: the user's patterns of modules that stay dense.
        compute_dtype: what layers cast their inputs to, None for the inputs' own dtype.
        kernel: a kernel that the user insists on, None for the best.
        only_blocks: readers of this format look for quantized layers in the repeated blocks only.
        dense_on_cpu: modules that a device map puts on the CPU or on disk stay dense, in fp32.
        choose: the spec of a module (by name, shape and dtype of its weight) that is quantized on the fly, or why it
            stays dense; None where the settings say it all.
        choose_for: makes `choose` of the model, where it takes more than a module's name to choose; told whether the
            numbers will be chosen with calibration data.
        algorithms: the algorithm of a module, where not all have the same.
    """

    wire: Wire[Any]
    settings: Any
    algorithm: Algorithm
    skip: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    kernel: str | None = None
    only_blocks: bool = False
    dense_on_cpu: bool = False
    choose: Choose | None = None
    choose_for: Callable[[Any, bool], Choose] | None = None
    algorithms: Callable[[str], Algorithm] | None = None

    def algorithm_of(self, module: str) -> Algorithm:
        """What quantizes a module on the fly."""
        return self.algorithms(module) if self.algorithms else self.algorithm

    def settings_of(self, module: str) -> Any:
        return self.wire.of(self.settings, module)

    def spec_of(self, module: str) -> QuantSpec:
        """What the settings say of a stored weight; its tensors may say more."""
        spec: QuantSpec = self.wire.spec(self.settings_of(module))
        return spec

    def spec_for(self, module: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec | Kept:
        """The spec for a weight of `dtype` that is quantized on the fly, or why it stays dense."""
        return self.choose(module, shape, dtype) if self.choose else self.spec_of(module)

    def refusal(self, module: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        """Why the weight of a module can't be stored, or None where it can."""
        reason: str | None = self.wire.refusal(self.settings_of(module), spec, shape)
        return reason


RecipeMaker = Callable[[Any, Mapping[str, Any]], Recipe]


@dataclass(frozen=True)
class Method:
    """A quantization method as Transformers knows it.

    Attributes:
        name: the config's `quant_method`.
        config_class: what users pass and what a stored config becomes.
        recipe: makes a :class:`Recipe` of a config (as an object, which may be Transformers' own, and as a dict).
        keys: Transformers' names for it; by default `name` alone.
        not_stored: arguments that say how to run or how it was made; a caller may differ from the file in these.
        loading: arguments that say how to run; a caller's take the place of the stored ones.
        names_defaults: whether a stored list of dense modules names also those that stay dense by default, since
            readers that find a list keep nothing else dense.
        known: further keys of stored configs that mean nothing to us, or that the wire reads.
        prepare: called with the config before a model is quantized, to complete it.
        without_data: called with the config before a model is quantized as it is loaded, to warn where calibration data
            would have been better, or was given and is not used.
        default_dtype: what `from_pretrained` loads in when nothing is said, given whether the checkpoint is quantized.
    """

    name: str
    config_class: type[Any]
    recipe: RecipeMaker
    keys: tuple[str, ...] = ()
    not_stored: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()
    names_defaults: bool = False
    known: frozenset[str] = frozenset()
    prepare: Callable[[Any], None] = lambda config: None
    without_data: Callable[[Any], None] = lambda config: None
    default_dtype: Callable[[bool], str | None] = lambda pre_quantized: None
