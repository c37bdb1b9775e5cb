"""`QuantExperts`: the experts of a mixture, whose weights are stacks of packed matrices.

Transformers holds all experts of a layer in a few parameters of three dimensions (``gate_up_proj [E, 2I, H]``,
``down_proj [E, H, I]``) and computes with them under one contract: rows go through the first projection, the module's
own gate, and the second. Which projections there are and how they lie is found from the module, not from a list of
architectures.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit.core import FloatCode, Grouping, QuantSpec, QuantTensor, Scale
from lowbit.errors import FormatError, PlanError
from lowbit.kernels import Problem, kernel_named, ops, select
from lowbit.nn.linear import CANONICAL
from lowbit.nn.packed import PackedModule, working_dtype

GATE_UP: Final = "gate_up_proj"
UP: Final = "up_proj"
DOWN: Final = "down_proj"
_SUFFIX: Final = "_stack"


@dataclass(frozen=True)
class Projection:
    """One parameter of an experts module: a matrix per expert, which may be two matrices in one.

    Attributes:
        name: of the parameter; its bias is called ``<name>_bias``.
        experts: how many there are.
        shape: ``(out, in)`` of one expert's matrix.
        parts: the names of the matrices in it, in order: gate and up, or itself.
        transposed: whether the parameter is ``[E, in, out]``.
        interleaved: whether the rows of the parts alternate instead of following one another.
    """

    name: str
    experts: int
    shape: tuple[int, int]
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    @property
    def part_shape(self) -> tuple[int, int]:
        """``(out, in)`` of one part of one expert."""
        return self.shape[0] // len(self.parts), self.shape[1]

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        out_features, in_features = self.shape
        return (self.experts, in_features, out_features) if self.transposed else (self.experts, *self.shape)

    def orient(self, weight: Tensor) -> Tensor:
        """The parameter as ``[E, out, in]``; a view."""
        return weight.transpose(1, 2) if self.transposed else weight

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of the parameter, each ``[E, out, in]``; views."""
        return dict(zip(self.parts, self._take_apart(self.orient(weight), 1), strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        weight = self._put_together([parts[name] for name in self.parts], 1)
        return (weight.transpose(1, 2) if self.transposed else weight).contiguous()

    def split_bias(self, bias: Tensor) -> dict[str, Tensor]:
        """The parts of a bias ``[E, out]``; views."""
        return dict(zip(self.parts, self._take_apart(bias, 1), strict=True))

    def join_bias(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split_bias`."""
        return self._put_together([parts[name] for name in self.parts], 1)

    def join_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """``[rows, out]`` of each part -> what the module's own gate takes."""
        return self._put_together(outputs, 1)

    def _take_apart(self, whole: Tensor, axis: int) -> list[Tensor]:
        count = len(self.parts)
        if self.interleaved:
            return [whole.unflatten(axis, (-1, count)).select(axis + 1, number) for number in range(count)]
        return list(whole.chunk(count, dim=axis))

    def _put_together(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if self.interleaved:
            return torch.stack(list(parts), axis + 1).flatten(axis, axis + 1)
        return torch.cat(list(parts), axis)


def find_projections(module: nn.Module) -> dict[str, Projection]:
    """The projections of an experts module, by parameter; empty where `module` is none that lowbit can compute.

    It has ``down_proj`` and ``gate_up_proj`` (or ``up_proj``, where nothing is gated), of three dimensions, and either
    says by flags how they lie, as Transformers' interface for experts wants it, or takes rows that are sorted by expert
    (Llama 4), in which case the shapes tell.
    """
    own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    first = next((name for name in (GATE_UP, UP) if name in own), None)
    if first is None or set(own) != {first, DOWN}:
        return {}
    transposed = _is_transposed(module, own[first], own[DOWN], gated=first == GATE_UP)
    if transposed is None or not _is_computed(module, gated=first == GATE_UP):
        return {}
    interleaved = getattr(module, "is_concatenated", True) is False
    parts = ("gate_proj", "up_proj") if first == GATE_UP else (UP,)
    return {
        first: _projection(first, own[first], parts, transposed, interleaved),
        DOWN: _projection(DOWN, own[DOWN], (DOWN,), transposed, False),
    }


def _projection(name: str, weight: Tensor, parts: tuple[str, ...], transposed: bool, interleaved: bool) -> Projection:
    count, rows, cols = weight.shape
    return Projection(name, count, (cols, rows) if transposed else (rows, cols), parts, transposed, interleaved)


def _is_transposed(module: nn.Module, first: Tensor, down: Tensor, *, gated: bool) -> bool | None:
    """Whether the matrices are ``[in, out]``; None where their shapes don't fit together."""
    (count, rows, cols), (other, down_rows, down_cols) = first.shape, down.shape
    factor = 2 if gated else 1
    plain = cols == down_rows and rows == factor * down_cols
    turned = rows == down_cols and cols == factor * down_rows
    if count != other or not (plain or turned):
        return None
    flag = getattr(module, "is_transposed", None)
    if flag is None:
        return turned if plain != turned else None
    return bool(flag) if (turned if flag else plain) else None


def _is_computed(module: nn.Module, *, gated: bool) -> bool:
    """Whether the module's forward is one that :class:`QuantExperts` knows."""
    arguments = _arguments(module)
    if not hasattr(module, "has_gate") and not hasattr(module, "_apply_gate"):
        return len(arguments) == 1 and gated and callable(getattr(module, "act_fn", None))
    activates = hasattr(module, "_apply_gate") if gated else callable(getattr(module, "act_fn", None))
    return len(arguments) == 3 and activates and getattr(module, "has_gate", gated) is gated


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def stack_name(part: str) -> str:
    """What :class:`QuantExperts` calls the stack of a part.

    Not the part itself: whoever names ``down_proj`` to adapt it means linear layers.
    """
    return f"{part}{_SUFFIX}"


class QuantStack(PackedModule):
    """The same matrix of every expert, packed: the spec's tensors with a first axis of experts.

    Args:
        spec: what each expert's weight means.
        shape: ``(out, in)`` of one expert.
        experts: how many there are.
        compute_dtype: what inputs are cast to for the product; None for the inputs' own.
        dtype: of the dense weights that this replaces.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        experts: int,
        *,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.experts = shape, experts
        self.compute_dtype, self.dense_dtype = compute_dtype, dtype or spec.dtype
        self.kernel = CANONICAL
        self.allocate(spec)

    def allocate(self, spec: QuantSpec) -> None:
        """Become empty stacks of `spec` on the meta device; tensors are placed later."""
        self.spec, self.spec_key, self.kernel = spec, spec.to_json(), CANONICAL
        layout = spec.tensors(self.shape).items()
        self._place(
            {name: torch.empty(self.experts, *part, dtype=dtype, device="meta") for name, (part, dtype) in layout}
        )

    def fill(self, tensors: Sequence[QuantTensor]) -> dict[str, Tensor]:
        """Take the spec of these weights, one per expert, and give the stacks that are to be placed.

        Raises:
            FormatError: they differ in what they mean, or are not as many as there are experts.
        """
        spec, stacked = stack_tensors(tensors)
        if tensors[0].shape != self.shape or len(tensors) != self.experts:
            found = f"{len(tensors)} of {list(tensors[0].shape)}"
            raise FormatError(
                "the weights are not the module's", found=found, expected=f"{self.experts} of {list(self.shape)}"
            )
        self.allocate(spec)
        return stacked

    def quant_tensor(self, expert: int) -> QuantTensor:
        """One expert's weight in the spec's own layout, whatever the kernel."""
        kernel = kernel_named(self.kernel)
        declared = {name: dtype for name, (_, dtype) in kernel.layout(self.spec, self.shape).items()}
        # Training set-ups cast every half-precision parameter to fp32; that loses nothing and is undone here.
        tensors = {
            name: stack.detach()[expert].to(declared[name])
            for name, stack in zip(self._names, self.packed, strict=True)
        }
        return kernel.restore(self.spec, self.shape, tensors)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weights ``[E, out, in]``."""
        return torch.stack([self.quant_tensor(expert).dequantize(dtype) for expert in range(self.experts)])

    def select_kernel(self, name: str | None = None) -> None:
        """Bring the weights into the layout of the kernel `name`, by default of the best one for their device."""
        device = self.packed[0].device
        if device.type == "meta":
            return
        if name is None:
            problem = Problem(self.spec, self.shape, device.type, self.compute_dtype or self.dense_dtype)
            name = select(problem).name
        if name != self.kernel:
            prepared = [kernel_named(name).prepare(self.quant_tensor(expert)) for expert in range(self.experts)]
            self.kernel = name
            self._place({part: torch.stack([tensors[part] for tensors in prepared]) for part in prepared[0]})

    def forward(self, inputs: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
        """``inputs [rows, in]`` times the matrix of each row's expert, plus its row of ``bias [E, out]``."""
        dtype = working_dtype(inputs)
        compute = self.compute_dtype or dtype
        bias = None if bias is None else bias.to(compute)
        outputs = ops.expert_linear(
            inputs.to(compute), experts, self.packed, bias, self.spec_key, self.kernel, self.shape[0]
        )
        return outputs.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.experts} x {self.shape[1]} -> {self.shape[0]}, {self.spec}, {self.kernel} kernel"


class QuantExperts(nn.Module):
    """Experts with packed projections, in the place of `module` and computing what it computes.

    Each matrix is a :class:`QuantStack` named after its part (``gate_proj_stack``, ``up_proj_stack``,
    ``down_proj_stack``); a projection that stays dense remains the parameter it was and gets no gradient. Everything
    else (biases, the gate, norms) is the original module's.

    Args:
        module: an experts module for which :func:`find_projections` finds any; it is taken over.

    Raises:
        PlanError: nothing is found.
    """

    original: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.projections = find_projections(module)
        if not self.projections:
            raise PlanError(f"{type(module).__name__} are not experts that lowbit can hold packed")
        self._arguments = _arguments(module)
        # The original computes its gate with what it has: both have the same parameters, buffers and children, and it
        # is no child itself, so that names stay.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self.__dict__["original"] = module
        self.train(module.training)

    @property
    def stacks(self) -> dict[str, QuantStack]:
        """The packed matrices by part."""
        return {
            name.removesuffix(_SUFFIX): module
            for name, module in self.named_children()
            if isinstance(module, QuantStack)
        }

    def is_packed(self, projection: str) -> bool:
        return self.projections[projection].parts[0] in self.stacks

    def packed_specs(self) -> dict[str, tuple[QuantSpec, tuple[int, ...]]]:
        """Spec and shape ``(experts, out, in)`` of each packed projection; of each part, where parts differ."""
        specs: dict[str, tuple[QuantSpec, tuple[int, ...]]] = {}
        for name, projection in self.projections.items():
            parts = {part: self.stacks[part].spec for part in projection.parts if part in self.stacks}
            if len(set(parts.values())) == 1:
                specs[name] = parts[projection.parts[0]], (projection.experts, *projection.shape)
            else:
                specs |= {part: (spec, (projection.experts, *projection.part_shape)) for part, spec in parts.items()}
        return specs

    def pack(self, projection: Projection, stacks: Mapping[str, QuantStack]) -> None:
        """Put stacks, one per part, in the place of a dense projection; its parts are as the caller wants them."""
        del self._parameters[projection.name]
        self.projections[projection.name] = projection
        for name in projection.parts:
            self.add_module(stack_name(name), stacks[name])

    def unpack(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module with dense projections; `dtype` as in :func:`lowbit.nn.swap.dense_linear`."""
        module: nn.Module = self.original
        parameters: dict[str, nn.Parameter | None] = {}
        for name, parameter in self._parameters.items():
            converted = parameter if dtype is None or parameter is None else parameter.detach().to(dtype)
            parameters[name] = None if converted is None else nn.Parameter(converted, requires_grad=False)
        for name, projection in self.projections.items():
            parameters[name] = nn.Parameter(self._dense(projection, dtype), requires_grad=False)
        stacks = {stack_name(part) for part in self.stacks}
        # Its own from now on: hooks may still take back what this module holds.
        module._parameters, module._buffers = parameters, dict(self._buffers)
        module._modules = {name: child for name, child in self._modules.items() if name not in stacks}
        return module.train(self.training)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As the original: ``(hidden [tokens, H], expert ids [tokens, k], weights [tokens, k]) -> [tokens, H]``, or
        rows that are sorted by expert, as many for each.
        """
        values = (*args, *(kwargs[name] for name in self._arguments[len(args) :]))
        if len(values) == 1:
            return self._sorted(values[0])
        hidden, chosen, weights = values
        rows = hidden.repeat_interleave(chosen.shape[-1], dim=0)
        outputs = self._compute(rows, chosen.reshape(-1)) * weights.reshape(-1, 1)
        return outputs.view(*chosen.shape, -1).sum(1).to(hidden.dtype)

    def _sorted(self, rows: Tensor) -> Tensor:
        count = self.projections[DOWN].experts
        flat = rows.reshape(-1, rows.shape[-1])
        experts = torch.arange(count, device=rows.device).repeat_interleave(flat.shape[0] // count)
        return self._compute(flat, experts)

    def _compute(self, rows: Tensor, experts: Tensor) -> Tensor:
        original = self.original
        if UP in self.projections:
            hidden = original.act_fn(self._project(UP, rows, experts))
        else:
            hidden = self._project(GATE_UP, rows, experts)
            if hasattr(original, "_apply_gate"):
                hidden = original._apply_gate(hidden)
            else:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = up * original.act_fn(gate)
        outputs = self._project(DOWN, hidden, experts)
        return original.post_expert_norm(outputs) if getattr(original, "has_post_expert_norm", False) else outputs

    def _project(self, name: str, rows: Tensor, experts: Tensor) -> Tensor:
        projection = self.projections[name]
        bias = self._parameters.get(f"{name}_bias")
        weight = self._parameters.get(name)
        if weight is not None:
            dense = projection.orient(weight)
            out_features = projection.shape[0]
            return ops.expert_linear(rows, experts, [dense], bias, _dense_spec(dense.dtype), CANONICAL, out_features)
        biases = {} if bias is None else projection.split_bias(bias)
        return projection.join_outputs(
            [self.get_submodule(stack_name(part))(rows, experts, biases.get(part)) for part in projection.parts]
        )

    def _dense(self, projection: Projection, dtype: torch.dtype | None) -> Tensor:
        weight = self._parameters.get(projection.name)
        if weight is not None:
            return weight.detach() if dtype is None else weight.detach().to(dtype)
        stacks = {name: self.stacks[name] for name in projection.parts}
        return projection.join({name: stack.dequantize(dtype or stack.dense_dtype) for name, stack in stacks.items()})


def quantize_projection(
    projection: Projection,
    weight: Tensor,
    quantize: Callable[[Tensor], QuantTensor],
    compute_dtype: torch.dtype | None = None,
) -> dict[str, tuple[QuantStack, dict[str, Tensor]]]:
    """Quantize a fused parameter, each expert's matrices for themselves.

    Returns:
        By part: a stack, and the tensors that are to be placed in it.
    """
    made: dict[str, tuple[QuantStack, dict[str, Tensor]]] = {}
    for part, matrices in projection.split(weight.detach()).items():
        tensors = [quantize(matrix.contiguous()) for matrix in matrices]
        stack = QuantStack(
            tensors[0].spec,
            projection.part_shape,
            projection.experts,
            compute_dtype=compute_dtype,
            dtype=weight.dtype,
        )
        made[part] = stack, stack.fill(tensors)
    return made


def quantize_experts(
    model: nn.Module,
    name: str,
    quantize: Callable[[Tensor], QuantTensor],
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Quantize the fused parameter `name` of a model's experts in place."""
    module, _, parameter = name.rpartition(".")
    experts = model.get_submodule(module)
    if not isinstance(experts, QuantExperts):
        experts = QuantExperts(experts)
        model.set_submodule(module, experts)
    weight = experts.get_parameter(parameter)
    made = quantize_projection(experts.projections[parameter], weight, quantize, compute_dtype)
    for stack, tensors in made.values():
        stack._place(tensors)
        stack.select_kernel()
    experts.pack(experts.projections[parameter], {part: stack for part, (stack, _) in made.items()})


def stack_tensors(tensors: Sequence[QuantTensor]) -> tuple[QuantSpec, dict[str, Tensor]]:
    """The spec that all of these weights have, and their tensors along a new first axis.

    Raises:
        FormatError: they differ in spec or shape.
    """
    if any(tensor.spec.grouping.permuted for tensor in tensors):
        tensors = [_permuted(tensor) for tensor in tensors]
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        if (tensor.spec, tensor.shape) != (first.spec, first.shape):
            raise FormatError(
                f"the experts of a layer differ in their layouts: expert {number} is not as the first is",
                found=_described(tensor),
                expected=_described(first),
            )
    return first.spec, {name: torch.stack([tensor.tensors[name] for tensor in tensors]) for name in first.tensors}


def _described(tensor: QuantTensor) -> str:
    return f"{list(tensor.shape)}, {tensor.spec}, scales in {tensor.spec.scale.dtype}, for {tensor.spec.dtype}"


def _permuted(tensor: QuantTensor) -> QuantTensor:
    """The same weight with its group index spelled out; files leave out one that is in order."""
    spec = tensor.spec
    if spec.grouping.permuted or spec.grouping.rows != 1 or spec.grouping.linear:
        return tensor
    columns = torch.arange(tensor.shape[1], dtype=torch.int32, device=tensor.device)
    index = columns // (spec.grouping.cols or tensor.shape[1])
    grouping = replace(spec.grouping, permuted=True)
    return QuantTensor(replace(spec, grouping=grouping), {**tensor.tensors, "group_index": index}, tensor.shape)


@functools.lru_cache(maxsize=8)
def _dense_spec(dtype: torch.dtype) -> str:
    """What :func:`lowbit.kernels.ops.expert_linear` calls a weight that is not quantized at all."""
    return QuantSpec(FloatCode(dtype), Scale(dtype, stored=False), Grouping.per_tensor(), dtype=dtype).to_json()
