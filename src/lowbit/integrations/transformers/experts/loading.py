"""Fused experts on their way through Transformers' loader and back into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from lowbit.core import Kept, QuantSpec
from lowbit.errors import FormatError, LowbitError
from lowbit.integrations.accelerate import hand_over_hooks, is_offloaded, on_host
from lowbit.integrations.transformers.experts.names import (
    ExpertStack,
    StoredStack,
    common_fate,
    merges_into,
    stack_patterns,
)
from lowbit.nn.experts import Projection, QuantExperts, QuantStack, quantize_projection, stack_name
from lowbit.nn.planning import matches

if TYPE_CHECKING:
    from lowbit.integrations.transformers.experts.names import StoredExperts
    from lowbit.integrations.transformers.quantizer import LowbitQuantizer

_ANCHOR = "codes"  # the parameter under which the loader collects a stack's tensors


def fate_of_experts(
    stacks: list[ExpertStack], choose: Callable[[str], QuantSpec | Kept], skip: tuple[str, ...]
) -> QuantSpec | Kept:
    """What happens to a projection, given what would happen to each of its experts' matrices by its own name."""
    fates: dict[str, QuantSpec | Kept] = {}
    for stack in stacks:
        for name in stack.written:
            pattern = matches(name, skip)
            fates[name] = Kept(f"skipped by '{pattern}'") if pattern else choose(name)
    return common_fate(fates)


def hold_packed(quantizer: LowbitQuantizer, model: nn.Module, experts: StoredExperts, dtype: torch.dtype) -> None:
    """Make room in a model on the meta device for the packed experts of its checkpoint."""
    for module, projections in experts.by_module():
        held = QuantExperts(model.get_submodule(module))
        for parts in projections.values():
            held.pack(
                parts[0].stack.projection, {entry.stack.part: _empty_stack(quantizer, entry, dtype) for entry in parts}
            )
        model.set_submodule(module, held)


def _empty_stack(quantizer: LowbitQuantizer, entry: StoredStack, dtype: torch.dtype) -> QuantStack:
    projection, recipe = entry.stack.projection, quantizer.recipe
    return QuantStack(
        recipe.spec_of(entry.names[0]),
        projection.part_shape,
        projection.experts,
        compute_dtype=recipe.compute_dtype,
        dtype=dtype,
    )


class ReadExperts(ConversionOps):
    """All stored tensors of the same matrix of every expert -> the parameters of a `QuantStack`."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: LowbitQuantizer, suffixes: dict[str, str]) -> None:
        # The loader casts tensors to the model's dtype unless an op carries this attribute.
        self.hf_quantizer = hf_quantizer
        self.suffixes = suffixes

    def __deepcopy__(self, memo: Any) -> ReadExperts:
        return self  # as ReadPacked

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        name = full_layer_name.removesuffix(f".{_ANCHOR}")
        stack, stored = model.get_submodule(name), self.hf_quantizer.stacks[name]
        if not isinstance(stack, QuantStack):
            raise FormatError("the checkpoint has packed experts where the model has none", tensor=name)
        if stored.stack.fused:
            values = {self.suffixes[pattern]: found[0] for pattern, found in input_dict.items()}
            return self._read_fused(stack, stored, values, missing_keys)
        wire, recipe = self.hf_quantizer.recipe.wire, self.hf_quantizer.recipe
        # The loader collects the tensors of one suffix in the order of the experts that have it.
        collected = {self.suffixes[pattern]: iter(values) for pattern, values in input_dict.items()}
        weights = []
        try:
            for expert in range(stack.experts):
                own = {suffix: next(collected[suffix]) for suffix in wire.suffixes if suffix in stored.suffixes[expert]}
                try:
                    weights.append(wire.read(recipe.settings_of(stored.names[expert]), own))
                except FormatError as error:
                    raise error.inside(stored.names[expert]) from error
            tensors = stack.fill(weights)
        except FormatError as error:
            every = f"{stored.stack.module}.*.{stored.stack.leaf}"
            raise self.hf_quantizer.note(error if error.tensor else error.inside(every)) from error
        return _place(stack, name, tensors, missing_keys)

    def _read_fused(
        self, stack: QuantStack, stored: StoredStack, values: dict[str, Tensor], missing_keys: Any
    ) -> dict[str, Tensor]:
        recipe, name = self.hf_quantizer.recipe, stored.stack.name
        try:
            weights = recipe.wire.read_fused(recipe.settings_of(stored.names[0]), stored.stack.part, values)
            tensors = stack.fill(weights)
        except FormatError as error:
            raise self.hf_quantizer.note(error.inside(stored.stack.module)) from error
        return _place(stack, name, tensors, missing_keys)


class JoinBiases(ConversionOps):
    """The biases of every expert, by part -> one parameter ``[E, out]``."""

    def __init__(self, projection: Projection, parts: dict[str, str]) -> None:
        self.projection, self.parts = projection, parts

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        biases = {self.parts[pattern]: torch.stack(values) for pattern, values in input_dict.items()}
        return {full_layer_name: self.projection.join_bias(biases)}


def expert_converters(quantizer: LowbitQuantizer, experts: StoredExperts, base_prefix: str) -> list[WeightConverter]:
    """The loader's instructions to collect the tensors of all experts of a layer and read them together."""
    alike: dict[tuple[str, str], list[ExpertStack]] = {}
    for entry in experts.stacks.values():
        alike.setdefault((entry.stack.part, entry.stack.leaf), []).append(entry.stack)
    converters = []
    biased: dict[str, dict[str, str]] = {}
    for (part, _), stacks in alike.items():
        wire = quantizer.recipe.wire
        suffixes = wire.fused_suffixes if stacks[0].fused else wire.suffixes
        patterns = stack_patterns(stacks, suffixes, base_prefix)
        operation = ReadExperts(quantizer, patterns)
        converters.append(WeightConverter(list(patterns), f".{stack_name(part)}.{_ANCHOR}", [operation]))
        with_bias = [stack for stack in stacks if f"{stack.parameter}_bias" in experts.biases]
        if with_bias:
            name = with_bias[0].projection.name
            biased.setdefault(name, {}).update(dict.fromkeys(stack_patterns(with_bias, ["bias"], base_prefix), part))
    for name, parts in biased.items():
        projection = next(
            entry.stack.projection for entry in experts.stacks.values() if entry.stack.projection.name == name
        )
        converters.append(WeightConverter(list(parts), f".{name}_bias", [JoinBiases(projection, parts)]))
    return converters


def quantize_experts(
    quantizer: LowbitQuantizer, model: nn.Module, name: str, weight: Tensor, missing_keys: Any
) -> dict[str, Tensor]:
    """Quantize a fused parameter as it arrives, each expert's matrix for itself, and put stacks in its place."""
    module = name.rpartition(".")[0]
    experts = model.get_submodule(module)
    if not isinstance(experts, QuantExperts):
        experts = QuantExperts(experts)
        model.set_submodule(module, experts)
    parts = quantizer.expert_stacks(name)
    recipe, projection, calibrated = quantizer.recipe, parts[0].projection, quantizer.calibrated
    try:
        spec = quantizer.planned(name, weight.dtype)
        algorithm = calibrated.algorithm_of(name) if calibrated else recipe.algorithm_of(parts[0].written[0])
        made = quantize_projection(
            projection, weight, lambda matrix: algorithm.quantize(matrix, spec), recipe.compute_dtype
        )
    except LowbitError as error:
        raise quantizer.note(type(error)(f"{name}: {error}")) from error
    experts.pack(projection, {part: stack for part, (stack, _) in made.items()})
    experts._is_hf_initialized = True  # type: ignore[assignment]
    if missing_keys is not None:
        missing_keys.discard(name)
    placed: dict[str, Tensor] = {}
    for part, (stack, tensors) in made.items():
        placed |= _place(stack, f"{module}.{stack_name(part)}", tensors, missing_keys)
    return placed


def _place(stack: QuantStack, name: str, tensors: Mapping[str, Tensor], missing_keys: Any) -> dict[str, Tensor]:
    """The tensors as parameters under their full names; those that the stack was thought to have are not missing."""
    stack._is_hf_initialized = True  # type: ignore[assignment]
    if missing_keys is not None:
        for key in [key for key in missing_keys if key.rpartition(".")[0] == name]:
            missing_keys.discard(key)
    return {f"{name}.{part}": nn.Parameter(value, requires_grad=False) for part, value in tensors.items()}


def write_experts(
    quantizer: LowbitQuantizer,
    module: str,
    experts: QuantExperts,
    state: dict[str, Tensor],
    written: dict[str, Tensor],
) -> dict[str, tuple[QuantSpec, tuple[int, int]]]:
    """Move the stacks of a state dict to `written`, as files have them: each expert's matrices, with its biases.

    Returns:
        What was written: spec and shape by module.
    """
    recipe = quantizer.recipe
    specs: dict[str, tuple[QuantSpec, tuple[int, int]]] = {}
    for part, stack in experts.stacks.items():
        name = f"{module}.{stack_name(part)}"
        for key in stack.packed_names:
            state.pop(f"{name}.{key}", None)
        stored = quantizer.stacks[name]
        with on_host(stack):
            weights = [stack.quant_tensor(expert) for expert in range(stack.experts)]
            if stored.stack.fused:
                tensors = recipe.wire.write_fused(recipe.settings_of(stored.names[0]), part, weights)
                written.update({f"{module}.{part}{suffix}": tensor for suffix, tensor in tensors.items()})
                continue
            for expert, name in enumerate(stored.stack.written):
                tensors = recipe.wire.write(recipe.settings_of(stored.names[expert]), weights[expert])
                written.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
                specs[name] = stack.spec, stack.shape
    for projection in experts.projections.values():
        if experts.is_packed(projection.name) and state.pop(f"{module}.{projection.name}_bias", None) is not None:
            _write_bias(quantizer, module, experts, projection, written)
    return specs


def _write_bias(
    quantizer: LowbitQuantizer, module: str, experts: QuantExperts, projection: Projection, written: dict[str, Tensor]
) -> None:
    with on_host(experts):
        bias = experts.get_parameter(f"{projection.name}_bias").detach()
        for part, rows in projection.split_bias(bias).items():
            names = quantizer.stacks[f"{module}.{stack_name(part)}"].stack.written
            written.update({f"{name}.bias": row.clone() for name, row in zip(names, rows, strict=True)})


def dequantize_experts(model: Any, name: str, experts: QuantExperts, dtype: torch.dtype | None) -> None:
    """Put the original module with dense weights in the place of packed experts, to be saved as checkpoints have it."""
    modules = [experts, *experts.stacks.values()]
    hooked = next((module for module in modules if hasattr(module, "_hf_hook")), experts)
    offloaded = any(is_offloaded(module) for module in modules)
    with ExitStack() as brought:
        for module in modules:
            brought.enter_context(on_host(module))
        dense = experts.unpack(dtype)
    hand_over_hooks(hooked, dense, offloaded=offloaded)
    model.set_submodule(name, dense)
    used = list(getattr(model, "_weight_conversions", None) or ())
    parameters = [f"{name}.{parameter}" for parameter in experts.projections]
    for entry in get_model_conversion_mapping(model):
        new = all(entry.target_patterns != other.target_patterns for other in used)
        if new and isinstance(entry, WeightConverter) and any(merges_into(entry, own) for own in parameters):
            used.append(entry)
    model._weight_conversions = used
