"""The one `HfQuantizer` for every format: Transformers loads, places and saves; lowbit packs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging import version
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer

from lowbit.core import Kept, Plan, QuantSpec, dtypes
from lowbit.errors import LowbitError, PlanError
from lowbit.integrations.accelerate import hand_over_hooks, is_offloaded, on_host
from lowbit.integrations.transformers.experts.loading import (
    dequantize_experts,
    expert_converters,
    fate_of_experts,
    hold_packed,
    write_experts,
)
from lowbit.integrations.transformers.experts.names import ExpertNames, ExpertStack, StoredStack
from lowbit.integrations.transformers.gguf.loading import check_positions, check_shapes
from lowbit.integrations.transformers.inventory import Inventory
from lowbit.integrations.transformers.loading import QuantizeDense, read_converters
from lowbit.integrations.transformers.methods import make_recipe, method_of
from lowbit.integrations.transformers.outside import outside as _outside  # noqa: F401  # while nothing is patched
from lowbit.integrations.transformers.saving import (
    dense_names_in_files,
    names_in_files,
    tell_folder,
    write_side_files,
)
from lowbit.integrations.transformers.tables import dequantize_tables, put_table
from lowbit.nn import QuantExperts, QuantLinear, QuantStack, plan_model
from lowbit.nn.activation import fold_activations
from lowbit.nn.embedding import QuantEmbedding, TiedHead, is_embedding
from lowbit.nn.planning import default_keep
from lowbit.nn.swap import dense_linear
from lowbit.wire import Wire
from lowbit.wire.gguf.checkpoint import GgufCheckpointFiles, LazyTensor

if TYPE_CHECKING:
    from lowbit.integrations.transformers.on_load import CalibratedOnLoad

TESTED = ("5.17", "6")


class LowbitQuantizer(HfQuantizer):
    """Loads quantized checkpoints, quantizes on the fly, saves in the checkpoint's own format."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        self.gguf_file: str | None = getattr(quantization_config, "gguf_file", None)
        if self.gguf_file is not None:
            kwargs["pre_quantized"] = True
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            method_of(quantization_config).prepare(quantization_config)
        self.recipe = make_recipe(quantization_config)
        self.plan: Plan | None = None
        self.folder: Path | None = None  # where the model is being saved
        self.original_names = True  # whether it is saved under the names that it was loaded from
        self.errors: list[LowbitError] = []
        self._converters: list[Any] = []
        self._expert_converters: list[Any] = []
        self._stored: dict[str, str] = {}
        self._kept: dict[str, Tensor] = {}
        self.stacks: dict[str, StoredStack] = {}
        self._expert_names: ExpertNames | None = None
        self.calibrated: CalibratedOnLoad | None = None

    # ---------------------------------------------------------------- before the weights

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not version.parse(TESTED[0]) <= version.parse(transformers_version) < version.parse(TESTED[1]):
            raise PlanError(
                f"lowbit works with Transformers {TESTED[0]} up to {TESTED[1]}, and this is {transformers_version}"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """bitsandbytes models have always gone to the GPU when nothing else was said."""
        if device_map is None and self.recipe.wire.quant_method == "bitsandbytes":
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def read_header(self, gguf_file: str) -> None:
        """Called by Transformers where a GGUF file is loaded."""
        self.gguf_file = gguf_file

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The blocks of a GGUF file have no dtype that a model could take over: nothing is found, and None given."""
        return dtype or torch.get_default_dtype()

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, LazyTensor]:
        """The tensors of a GGUF file under Transformers' names, none of them read yet."""
        return GgufCheckpointFiles(checkpoint_file).loadable()

    def make_layer(
        self, spec: QuantSpec, shape: tuple[int, int], bias: nn.Parameter | None, dtype: torch.dtype
    ) -> QuantLinear:
        return QuantLinear(spec, shape, bias=bias, compute_dtype=self.recipe.compute_dtype, dtype=dtype)

    def stored_name(self, module: str) -> str:
        """What the checkpoint's files call a module of the model."""
        return self._stored.get(module, module)

    def planned(self, module: str, dtype: torch.dtype) -> QuantSpec:
        """The spec that the plan gives to a module that is quantized on the fly, for a weight of `dtype`."""
        if self.plan is None:
            raise PlanError("the model has no plan yet")
        spec = self._fate(module, self._shape(module), dtype)
        return spec if isinstance(spec, QuantSpec) else self.plan.quantized[module]

    def expert_stacks(self, name: str) -> list[ExpertStack]:
        """The matrices in a fused parameter of a dense model's experts; none for anything else."""
        return [] if self._expert_names is None else self._expert_names.stacks(name)

    def _fate(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec | Kept:
        recipe = self.recipe
        if not (experts := self.expert_stacks(name)):
            return recipe.spec_for(name, shape, dtype)
        return fate_of_experts(experts, lambda own: recipe.spec_for(own, shape, dtype), recipe.skip)

    def _refusal(self, name: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        names = [own for stack in self.expert_stacks(name) for own in stack.written] or [name]
        return next((reason for own in names if (reason := self.recipe.refusal(own, spec, shape))), None)

    def _shape(self, module: str) -> tuple[int, int]:
        """Of the matrices that are quantized one at a time."""
        if experts := self.expert_stacks(module):
            return experts[0].projection.part_shape
        if self.plan is None:
            raise PlanError("the model has no plan yet")
        rows, cols = self.plan.shapes[module]
        return rows, cols

    def note(self, error: LowbitError) -> LowbitError:
        """Remember an error that the loader will wrap into its own report."""
        self.errors.append(error)
        if self.calibrated is not None:
            self.calibrated.close()
        return error

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Experts stay as they are; Transformers would take some apart into linear layers."""

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, dtype: Any = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if getattr(model, "quantization_method", None) == "hqq":
            # Under this name Transformers' own `to` and `cuda` import hqq.
            model.quantization_method = "lowbit"
        if self.pre_quantized:
            self._plan_packed(model, dtype or torch.get_default_dtype(), checkpoint_files)
        else:
            self._calibrate(model, device_map, checkpoint_files)
            self._plan_dense(model, device_map, dtype or torch.get_default_dtype(), self.calibrated is not None)

    def _calibrate(self, model: Any, device_map: Any, checkpoint_files: list[str] | None) -> None:
        """Quantize the checkpoint's weights with the config's data, before any is loaded."""
        from lowbit.integrations.transformers.on_load import CalibratedOnLoad, wants_data

        config = self.quantization_config
        if not wants_data(config) or not checkpoint_files:
            method_of(config).without_data(config)
            return
        self.calibrated = CalibratedOnLoad(config, Path(checkpoint_files[0]).parent, device_map)
        self.recipe = replace(self.recipe, algorithms=self.calibrated.algorithm_of)

    def _plan_packed(self, model: Any, dtype: torch.dtype, checkpoint_files: list[str] | None) -> None:
        """Make a packed layer of every module whose weight is packed in the files; check that nothing is missing."""
        if self.gguf_file is not None:
            checkpoint_files = [self.gguf_file]
            files = GgufCheckpointFiles(self.gguf_file)
            check_positions(files, model.config)
            check_shapes(files, model)
            if not files.types:
                return
        inventory = Inventory(model, self.recipe.wire, checkpoint_files)
        inventory.check_complete()
        recipe = self.recipe
        settings = recipe.wire.bind(recipe.settings, inventory.metadata)
        self.recipe = replace(recipe, settings=recipe.wire.with_shapes(settings, inventory.shapes()))
        self._stored = inventory.stored
        self._keep_beside(model, inventory.kept)
        for name in inventory.packed:
            dense = model.get_submodule(name)
            spec = self.recipe.spec_of(inventory.stored[name])
            if is_embedding(dense):
                put_table(model, name, spec, dtype)
                continue
            bias = dense.bias if isinstance(dense.bias, nn.Parameter) else None
            layer = self.make_layer(spec, inventory.shape(name), bias, dtype)
            model.set_submodule(name, layer)
        self.stacks = inventory.experts.stacks
        hold_packed(self, model, inventory.experts, dtype)
        prefix = getattr(model, "base_model_prefix", "")
        self._converters = read_converters(self, self.recipe.wire.suffixes, inventory.packed, prefix)
        self._expert_converters = expert_converters(self, inventory.experts, prefix)

    def _keep_beside(self, model: Any, tensors: dict[str, Tensor]) -> None:
        """Remember what no module holds, and tell the loader not to wonder about it."""
        self._kept = tensors
        if tensors:
            ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), *(re.escape(name) for name in tensors)}
            model._keys_to_ignore_on_load_unexpected = ignored

    def _plan_dense(self, model: Any, device_map: Any, dtype: torch.dtype, calibrated: bool) -> None:
        if self.recipe.choose_for is not None:
            self.recipe = replace(self.recipe, choose=self.recipe.choose_for(model, calibrated))
        recipe = self.recipe
        keep = default_keep(model)
        if recipe.only_blocks:
            keep |= _outside_blocks(model)
        if recipe.dense_on_cpu:
            keep |= _dense_on_cpu(model, device_map)
        mapping = get_model_conversion_mapping(model)
        self._expert_names = ExpertNames(model, mapping, fused=bool(recipe.wire.fused_suffixes))
        self.stacks = self._expert_names.as_stored()
        self.plan = plan_model(
            model,
            lambda name, shape: self._fate(name, shape, dtype),
            skip=recipe.skip,
            keep=keep | self._expert_names.refused,
            refusal=self._refusal,
        )

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, parameter = param_name.rpartition(".")[::2]
        if not self.pre_quantized:
            name = param_name if self.expert_stacks(param_name) else module if parameter == "weight" else ""
            return self.plan is not None and name in self.plan.quantized
        # What is read decides a packed tensor's shape, not what the config alone let us expect.
        holders = (QuantLinear, QuantEmbedding, QuantStack)
        return parameter != "bias" and isinstance(model.get_submodule(module), holders)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element once loaded, so that automatic placement counts packed weights as they will be."""
        if not self.pre_quantized and self.plan is not None and self.param_needs_quantization(model, param_name):
            experts = self.expert_stacks(param_name)
            name = param_name if experts else param_name.rpartition(".")[0]
            layout = self.plan.quantized[name].tensors(self._shape(name)).values()
            count = sum(stack.projection.experts for stack in experts) or 1
            size = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in layout)
            return float(count * size) / param.numel()
        return param.element_size()

    def get_quantize_ops(self) -> QuantizeDense:
        return QuantizeDense(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        # Before the model's own, which would merge the experts' tensors.
        return [*self._expert_converters, *weight_conversions, *self._converters]

    # ---------------------------------------------------------------- after the weights

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.errors:
            raise self.errors[0]
        self._forget_converters(model)
        # PEFT switches gradient checkpointing on, and leaves scales as they are, for methods that it knows by name and
        # for what carries this flag.
        model.hqq_quantized = True
        for layer in _quant_layers(model):
            layer.select_kernel(self.recipe.kernel)
        if self.plan is None:
            self.plan = plan_of(model)
        if self.calibrated is not None:
            self.calibrated.apply_dense(model)
            self.calibrated.close()
            self.calibrated = None
            self.recipe = replace(self.recipe, algorithms=None)
        if self.pre_quantized and getattr(self.quantization_config, "dequantize", False):
            return self._dequantize(model)
        self._describe_in_config()
        wire = self.recipe.wire
        if wire.side_files(self.recipe.settings, {}) or type(wire).metadata is not Wire.metadata:
            # Beside the tensors this format names modules, and needs to know where and under which names they go.
            tell_folder(model)
        return model

    def _forget_converters(self, model: Any) -> None:
        """Saving reverts the conversions of loading; ours are undone by :meth:`get_state_dict_and_metadata`."""
        ours = {id(converter) for converter in (*self._converters, *self._expert_converters)}
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [entry for entry in conversions if id(entry) not in ours]

    def _describe_in_config(self) -> None:
        """Name every linear that stayed dense where its readers look for it, and drop what can't be stored."""
        config: Any = self.quantization_config
        plan = self.plan
        if not isinstance(getattr(config, "tokenizer", None), str | None):
            config.tokenizer = None
        if isinstance(getattr(config, "dataset", None), list):
            config.dataset = None
        if self.pre_quantized or plan is None:
            return
        if hasattr(config, "leave_out"):
            config.leave_out(plan)
            return
        chosen = [name for name, kept in plan.kept.items() if not _default_reason(kept)]
        if not chosen:
            return
        everything = sorted(name for name, kept in plan.kept.items() if kept.reason != "embedding")
        if hasattr(config, "llm_int8_skip_modules"):
            config.llm_int8_skip_modules = everything
        elif hasattr(config, "modules_to_not_convert"):
            config.modules_to_not_convert = everything if method_of(config).names_defaults else sorted(chosen)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict as the format's own library would write it."""
        packed = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, QuantLinear | QuantEmbedding) and not isinstance(layer, TiedHead)
        }
        owned = {f"{name}.{part}" for name, layer in packed.items() for part in layer.packed_names}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in owned}
        recipe, specs = self.recipe, {name: (layer.spec, layer.shape) for name, layer in packed.items()}
        written: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantExperts):
                specs |= write_experts(self, name, module, state, written)
        others = list(state)
        if self.original_names:
            others, names = dense_names_in_files(model, state), names_in_files(model, specs)
            specs = {names[name]: value for name, value in specs.items()}
        for name, layer in packed.items():
            with on_host(layer):
                tensors = recipe.wire.write(recipe.settings_of(self.stored_name(name)), layer.quant_tensor())
            written |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        if self.folder is not None:
            write_side_files(self.folder, recipe.wire.side_files(recipe.settings, specs))
        return state | written | self._kept, recipe.wire.metadata(recipe.settings, specs, others)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Saving a model turns its config's dtype, the default here, into a string.
        wanted = None if dtype is None else dtypes.parse(dtype)
        dequantize_tables(model, wanted)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                offloaded = is_offloaded(layer)
                with on_host(layer):
                    dense = dense_linear(layer, wanted)
                hand_over_hooks(layer, dense, offloaded=offloaded)
                model.set_submodule(name, dense)
            elif isinstance(layer, QuantExperts):
                dequantize_experts(model, name, layer, wanted)
        fold_activations(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def plan_of(model: nn.Module) -> Plan:
    """What has become of every weight of a loaded model."""
    entries: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TiedHead):
            entries[name], shapes[name] = Kept("tied to the embedding, whose table it shares"), module.shape
            continue
        if isinstance(module, QuantLinear | QuantEmbedding):
            entries[name], shapes[name] = module.spec, module.shape
            continue
        if isinstance(module, QuantStack):
            continue  # a part of its experts
        if isinstance(module, QuantExperts):
            for part, (spec, shape) in module.packed_specs().items():
                entries[f"{name}.{part}"], shapes[f"{name}.{part}"] = spec, shape
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                key = name if parameter_name == "weight" else f"{name}.{parameter_name}"
                entries[key], shapes[key] = Kept(f"stored dense ({parameter.dtype})"), tuple(parameter.shape)
    return Plan(entries, shapes)


def _quant_layers(model: nn.Module) -> Iterator[QuantLinear | QuantStack]:
    return (module for module in model.modules() if isinstance(module, QuantLinear | QuantStack))


def _default_reason(kept: Kept) -> bool:
    """Whether any reader leaves this weight dense without being told."""
    defaults = (
        "embedding",
        "tied to",
        "output head",
        "last module",
        "outside",
        "the model keeps",
        "fused",
        "a parameter of",
    )
    return kept.reason.startswith(defaults) or kept.reason.endswith("is not a linear layer")


def _outside_blocks(model: nn.Module) -> dict[str, str]:
    """Modules that are not inside a list of repeated blocks."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = re.compile("|".join(rf"{re.escape(name)}\.\d+\." for name in lists) or r"(?!)")
    return {
        name: "outside the repeated blocks, where readers of this format look for packed weights"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not inside.match(name)
    }


def _dense_on_cpu(model: nn.Module, device_map: Any) -> dict[str, str]:
    """Keep what a device map sends to the CPU or the disk in fp32, with inputs cast on the way."""
    if not isinstance(device_map, dict) or set(map(str, device_map.values())) == {"cpu"}:
        return {}
    places = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
    keep: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _below(name, places):
            keep[name] = "on the CPU, where llm_int8_enable_fp32_cpu_offload keeps fp32"
            module.to(torch.float32)
            module.register_forward_pre_hook(_to_weight_dtype)
    return keep


def _below(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _to_weight_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast a linear layer's input: to fp32, or to what a tied weight has that lives elsewhere."""
    dtype = next(module.parameters()).dtype
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
