"""Fused experts and checkpoints: what files call the matrices, of which they have one per expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lowbit.core import Kept, QuantSpec
from lowbit.errors import FormatError
from lowbit.nn.experts import Projection, find_projections, stack_name

# Other names in use for the parts of an expert.
_ALIASES: Final = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_LISTED: Final = 4


@dataclass(frozen=True)
class ExpertStack:
    """The same matrix of all experts of a layer.

    Attributes:
        module: the experts.
        part: the matrix, as :class:`lowbit.nn.experts.QuantExperts` calls it.
        leaf: what files call it: expert 3 has ``<module>.3.<leaf>``.
        projection: the parameter of the dense module that holds it.
        fused: files keep all experts in one, under the parameter's own name.
    """

    module: str
    part: str
    leaf: str
    projection: Projection
    fused: bool = False

    @property
    def name(self) -> str:
        """Of the module that holds it in memory."""
        return f"{self.module}.{stack_name(self.part)}"

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.projection.name}"

    @property
    def written(self) -> list[str]:
        """The modules that readers look for, before Transformers undoes the renamings of loading."""
        if self.fused:
            return [self.parameter]
        return [f"{self.module}.{number}.{self.leaf}" for number in range(self.projection.experts)]


class ExpertNames:
    """The fused experts of a model on the meta device, and how files spell them.

    Where Transformers merges tensors of single experts into a parameter, its conversion mapping has their names. Models
    whose checkpoints are fused have none; theirs are ``<experts>.<number>.gate_proj``, ``up_proj`` and ``down_proj``,
    as quantizing libraries call them that take the experts apart.

    Args:
        fused: whether the format keeps experts fused that the dense checkpoint has fused and transposed.

    Attributes:
        apart: by parameter, its parts in order, each of which files hold one expert at a time.
        fused: by parameter, what files hold in one.
        merged: parameters of which dense files, too, hold one expert at a time.
        refused: parameters that can't be spelled one expert at a time, each with the reason.
    """

    def __init__(self, model: nn.Module, mapping: Sequence[Any], *, fused: bool = False) -> None:
        self._fused = fused
        self.apart: dict[str, list[ExpertStack]] = {}
        self.fused: dict[str, ExpertStack] = {}
        self.refused: dict[str, str] = {}
        self.merged: set[str] = set()
        self._slots: dict[tuple[str, str], ExpertStack] = {}
        mergers = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        for module, experts in model.named_modules():
            for projection in find_projections(experts).values():
                biased = hasattr(experts, f"{projection.name}_bias")
                self._add(module, projection, mergers, biased=biased)

    def stacks(self, parameter: str) -> list[ExpertStack]:
        """The stacks of a parameter in the layout that is written; none for anything else."""
        return [self.fused[parameter]] if parameter in self.fused else self.apart.get(parameter, [])

    def locate(self, name: str) -> tuple[ExpertStack, int] | None:
        """The stack and the expert that a matrix in a file belongs to, given its name after Transformers' renamings."""
        parts = name.split(".")
        for position, part in enumerate(parts):
            stack = self._slots.get((".".join(parts[:position]), ".".join(parts[position + 1 :])))
            if stack is not None and part.isascii() and part.isdigit():
                return stack, int(part)
        return None

    def as_stored(self) -> dict[str, StoredStack]:
        """All stacks by name, as if they had been read from files."""
        stacks = [stack for parameter in self.apart for stack in self.stacks(parameter)]
        return {stack.name: StoredStack(stack, dict(enumerate(stack.written))) for stack in stacks}

    def _add(
        self, module: str, projection: Projection, mergers: list[WeightConverter], *, biased: bool = False
    ) -> None:
        parameter = f"{module}.{projection.name}"
        merger = next((entry for entry in mergers if merges_into(entry, parameter)), None)
        leaves = list(projection.parts) if merger is None else _leaves(merger, module, projection)
        if leaves is None:
            self.refused[parameter] = "files spread its experts in a way that lowbit can't write packed"
            return
        if self._fused and merger is None and projection.transposed and not (projection.interleaved or biased):
            whole = replace(projection, parts=(projection.name,))
            self.fused[parameter] = ExpertStack(module, projection.name, projection.name, whole, fused=True)
        if merger is not None:
            self.merged.add(parameter)
        self.apart[parameter] = []
        for part, leaf in zip(projection.parts, leaves, strict=True):
            self.apart[parameter].append(ExpertStack(module, part, leaf, projection))
            for other in (leaf, part, _ALIASES[part]):
                self._slots.setdefault((module, other), ExpertStack(module, part, other, projection))


def _plain(pattern: str) -> str:
    return pattern.replace("\\.", ".")


def merges_into(merger: WeightConverter, parameter: str) -> bool:
    """Whether tensors of single experts become this parameter."""
    ends = any(f".{parameter}".endswith(f".{_plain(target).lstrip('.')}") for target in merger.target_patterns)
    scope = getattr(merger, "scope_prefix", None)
    inside = not scope or f".{scope}." in f".{parameter}"
    return ends and inside and any("*" in source for source in merger.source_patterns)


def _leaves(merger: WeightConverter, module: str, projection: Projection) -> list[str] | None:
    """The names of the parts behind an expert's number; None where more happens than stacking and joining."""
    stacks = [type(step) for step in merger.operations]
    wanted = [MergeModulelist] if len(projection.parts) == 1 else [MergeModulelist, Concatenate]
    axes = [getattr(step, "dim", None) for step in merger.operations]
    if stacks != wanted or axes != [0, 1][: len(axes)] or len(merger.target_patterns) != 1:
        return None
    if projection.transposed or projection.interleaved or len(merger.source_patterns) != len(projection.parts):
        return None
    leaves = []
    for source in map(_plain, merger.source_patterns):
        before, _, leaf = source.partition("*.")
        if not f".{module}.".endswith(f".{before.lstrip('.')}") or not leaf.endswith(".weight"):
            return None
        leaves.append(leaf.removesuffix(".weight"))
    return leaves


@dataclass
class StoredStack:
    """What a checkpoint's files hold of a stack.

    Attributes:
        names: by expert, the module as the files call it.
        suffixes: by expert, the tensors there are.
    """

    stack: ExpertStack
    names: dict[int, str] = field(default_factory=dict)
    suffixes: dict[int, frozenset[str]] = field(default_factory=dict)


class StoredExperts:
    """The packed experts in a checkpoint's files.

    Attributes:
        stacks: by name.
        biases: the parameters whose rows are stored with each expert, and with which of them, by part.
    """

    def __init__(self, names: ExpertNames) -> None:
        self._names = names
        self.stacks: dict[str, StoredStack] = {}
        self.biases: dict[str, dict[str, set[int]]] = {}

    @property
    def parameters(self) -> set[str]:
        """What the dense model calls what is packed."""
        return {entry.stack.parameter for entry in self.stacks.values()}

    def take(self, renamed: str, stored: str, suffixes: Iterable[str]) -> bool:
        """Take one packed matrix in, if it is one of an expert.

        Raises:
            FormatError: there is no such expert, or it is there under two names.
        """
        found = self._names.locate(renamed)
        if found is None:
            return False
        stack, number = found
        entry = self.stacks.setdefault(stack.name, StoredStack(stack))
        if number >= stack.projection.experts:
            raise FormatError(
                "the checkpoint has a packed weight for an expert that the model doesn't have",
                tensor=stored,
                found=number,
                expected=f"0..{stack.projection.experts - 1}",
            )
        if number in entry.names or entry.stack.leaf != stack.leaf:
            other = next(iter(entry.names.values()))
            raise FormatError("the experts of a layer go by different names", tensor=stored, found=other)
        entry.names[number] = stored
        entry.suffixes[number] = frozenset(suffixes)
        return True

    def take_fused(self, renamed: str, stored: str, suffixes: Iterable[str]) -> bool:
        """Take a parameter in that the files hold fused, if it is one."""
        if (stack := self._names.fused.get(renamed)) is None:
            return False
        self.stacks[stack.name] = StoredStack(stack, {0: stored}, {0: frozenset(suffixes)})
        return True

    def take_bias(self, renamed: str) -> str | None:
        """The parameter to which a bias of one expert belongs, or None where it is none."""
        found = self._names.locate(renamed.removesuffix(".bias")) if renamed.endswith(".bias") else None
        if found is None:
            return None
        stack, parameter = found[0], f"{found[0].parameter}_bias"
        self.biases.setdefault(parameter, {}).setdefault(stack.part, set()).add(found[1])
        return parameter

    def check(self) -> None:
        """Every expert of a layer has to be packed, or none.

        Raises:
            FormatError: names what is missing.
        """
        for parameter in sorted(self.parameters):
            stacks = [] if self._is_fused(parameter) else self._names.apart[parameter]
            missing = [name for stack in stacks for name in self._missing(stack)]
            if missing:
                total = len(stacks) * stacks[0].projection.experts
                raise FormatError(
                    "experts with one missing: some of a layer's are packed and some are not there",
                    tensor=parameter,
                    found=f"{total - len(missing)} of {total}",
                    expected=f"also {', '.join(missing[:_LISTED])}{' ...' if len(missing) > _LISTED else ''}",
                )
        for parameter, experts in self.biases.items():
            counts = {part: len(numbers) for part, numbers in experts.items()}
            stacks = self._names.apart[parameter.removesuffix("_bias")]
            wanted = {stack.part: stack.projection.experts for stack in stacks}
            if counts != wanted:
                raise FormatError("biases of experts are missing", tensor=parameter, found=counts, expected=wanted)

    def _is_fused(self, parameter: str) -> bool:
        fused = self._names.fused.get(parameter)
        return fused is not None and fused.name in self.stacks

    def _missing(self, stack: ExpertStack) -> list[str]:
        """The matrices that are not there, as the files would call them."""
        if stack.name not in self.stacks:
            return stack.written
        names = self.stacks[stack.name].names
        number, example = next(iter(names.items()))
        before = example.removesuffix(f".{number}.{self.stacks[stack.name].stack.leaf}")
        leaf = self.stacks[stack.name].stack.leaf
        return [f"{before}.{other}.{leaf}" for other in range(stack.projection.experts) if other not in names]

    def by_module(self) -> Iterator[tuple[str, dict[str, list[StoredStack]]]]:
        """Each experts module with its packed projections: the parts of each in order."""
        modules: dict[str, dict[str, list[StoredStack]]] = {}
        for parameter in sorted(self.parameters):
            fused = self._is_fused(parameter)
            stacks = [self._names.fused[parameter]] if fused else self._names.apart[parameter]
            parts = [self.stacks[stack.name] for stack in stacks]
            first = parts[0].stack
            modules.setdefault(first.module, {})[first.projection.name] = parts
        yield from modules.items()


def common_fate(fates: Mapping[str, QuantSpec | Kept]) -> QuantSpec | Kept:
    """What happens to a stack, given what its experts' names alone would call for."""
    first, *others = fates.values()
    if all(fate == first for fate in others):
        return first
    name = next(name for name, fate in fates.items() if fate != first)
    return Kept(f"skipped: {name.rpartition('.')[0]} would be quantized in another way than its neighbours")


def stack_patterns(stacks: Sequence[ExpertStack], suffixes: Iterable[str], base_prefix: str) -> dict[str, str]:
    """Expressions that match the tensors of any expert in stacks of one leaf, each with its suffix.

    The lookbehinds have a fixed width; digits are wildcards, as in :func:`loading.module_lookbehind`.
    """
    shapes = sorted({re.sub(r"\d", "0", stack.module.removeprefix(f"{base_prefix}.")) for stack in stacks})
    escaped = [re.escape(shape).replace("0", r"\d") for shape in shapes]
    behind = "|".join(rf"(?<=^{shape})|(?<=\.{shape})" for shape in escaped)
    leaf = re.escape(stacks[0].leaf)
    before = rf"(?:{behind})\.{leaf}" if stacks[0].fused else rf"(?:{behind})\.\d+\.{leaf}\."
    return {rf"{before}{re.escape(suffix)}$": suffix for suffix in suffixes}
