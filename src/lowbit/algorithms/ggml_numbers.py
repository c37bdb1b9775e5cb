"""A weight of one of ggml's types while it is being chosen: levels, and the numbers that scales are made of.

Columns come first, ``[in, rows]``. A weight is ``level * scale + zero``; a scale is an integer (plus a half, in the
types with grids) times a super-scale, a zero likewise; types with one level of scales have integers that stay 1.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lowbit.algorithms.ggml_parts import Parts, packed_codes
from lowbit.algorithms.lattice_choice import choice_for
from lowbit.algorithms.lattices import LATTICES, search_lattice
from lowbit.algorithms.ternary import search_ternary
from lowbit.core import BlockCode, QuantSpec, unpack
from lowbit.core.block_encoding import BlockFields, encode_blocks
from lowbit.core.blocks import FORMATS
from lowbit.core.packing import sign_extend

# What the integer of a group's scale is multiplied with, in the types with grids; it has a half added before.
_STEPS: Final = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), 0.25),
    "IQ3_XXS": 0.5,
    **dict.fromkeys(("IQ3_S", "IQ1_S", "IQ1_M"), 2.0),
}


@dataclass
class Factors:
    """One number per group of `size` columns: ``step * (integer + offset) * super``.

    Attributes:
        integers: ``fp32 [groups, rows]``.
        supers: ``fp32 [in / span, rows]``, what fp16 can hold.
        size: columns of a group.
        span: columns that share a super-scale.
        low, high: what the integers may be; equal where they aren't stored.
    """

    integers: Tensor
    supers: Tensor
    size: int
    span: int
    low: int
    high: int
    step: float = 1.0
    offset: float = 0.0

    def of(self, group: int) -> Tensor:
        """``[rows]``."""
        return self.step * (self.integers[group] + self.offset) * self.supers[group * self.size // self.span]

    def units(self, group: int, columns: int) -> Tensor:
        """What a super-scale is multiplied with in each column from the first of a group on, ``[columns, rows]``."""
        groups = self.integers[group : group + columns // self.size]
        return (self.step * (groups + self.offset)).repeat_interleave(self.size, dim=0)

    def nearest(self, group: int, wanted: Tensor) -> Tensor:
        """The integers that come nearest to ``[rows]``; as they were where the super-scale is 0."""
        step = self.step * self.supers[group * self.size // self.span]
        integers = (wanted / step - self.offset).round().clamp(self.low, self.high)
        return torch.where(step == 0, self.integers[group], integers)


class Numbers(abc.ABC):
    """A weight being chosen.

    Attributes:
        levels: ``fp32 [in, rows]``.
        scales: of all groups.
        zeros: where the type has them.
        unit: how many columns are chosen at once.
    """

    levels: Tensor
    scales: Factors
    zeros: Factors | None
    unit: int

    @abc.abstractmethod
    def choose(self, column: int, wanted: Tensor, metric: Tensor) -> Tensor:
        """Choose the levels of the `unit` columns from `column` on and keep them.

        Args:
            wanted: what they should stand for, ``fp32 [unit, rows]``.
            metric: how errors count, ``fp32 [unit, unit]``.

        Returns:
            What they stand for, ``fp32 [unit, rows]``.
        """

    @abc.abstractmethod
    def begin(self, column: int, found: Parts | BlockFields) -> None:
        """Take over the scales of a block of columns."""

    @abc.abstractmethod
    def tensors(self) -> Parts:
        """The tensors of the type's spec."""


class Scalars(Numbers):
    """Numbers of their own: the plain, K and IQ4 types."""

    unit = 1

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> None:
        self._spec, self._rows = spec, shape[0]
        second, size = spec.scale.second, spec.grouping.cols
        self._bits = second.bits if second else 0
        span = size * (second.size or 1) if second else size
        signed = second is not None and second.signed
        low, high = (-(1 << self._bits - 1), (1 << self._bits - 1) - 1) if signed else (0, (1 << self._bits) - 1)
        low, high = (low, high) if second else (1, 1)
        self.levels = torch.zeros(shape[1], shape[0], device=device)

        def factors() -> Factors:
            integers = torch.ones(shape[1] // size, shape[0], device=device)
            return Factors(integers, torch.zeros(shape[1] // span, shape[0], device=device), size, span, low, high)

        self.scales, self.zeros = factors(), factors() if spec.zero else None
        self._table: Tensor | None = None

    def begin(self, column: int, found: Parts | BlockFields) -> None:
        if isinstance(found, BlockFields):
            return
        for name, factors in (("scales", self.scales), ("zeros", self.zeros)):
            if factors is None:
                continue
            supers = found[f"super_{name}" if self._bits else name].view(self._rows, -1).t().float()
            factors.supers[column // factors.span :][: len(supers)] = supers
            if self._bits:
                integers = self._integers(found[name], len(supers) * factors.span // factors.size)
                factors.integers[column // factors.size :][: len(integers)] = integers
        self._table = found.get("table")

    def _integers(self, stored: Tensor, count: int) -> Tensor:
        stored = stored.view(self._rows, -1)
        if self._bits < 8:
            stored = unpack(stored, self._bits, count)
            if self.scales.low < 0:
                stored = sign_extend(stored, self._bits)
        return stored.t().float()

    def choose(self, column: int, wanted: Tensor, metric: Tensor) -> Tensor:
        group = column // self.scales.size
        scale = self.scales.of(group)
        zero = 0 if self.zeros is None else self.zeros.of(group)
        position = torch.where(scale == 0, 0, (wanted[0] - zero) / scale)
        if self._table is not None:
            levels = self._table[torch.bucketize(position, (self._table[1:] + self._table[:-1]) / 2)]
        else:
            levels = position.round_().clamp_(*self._range())
        self.levels[column] = levels
        return (levels * scale + zero).unsqueeze(0)

    def _range(self) -> tuple[int, int]:
        bits, half = self._spec.bits, 1 << self._spec.bits - 1
        return (-half, half - 1) if getattr(self._spec.code, "signed", False) else (0, (1 << bits) - 1)

    def tensors(self) -> Parts:
        levels = self.levels.t()
        if self._table is not None:
            levels = torch.bucketize(levels.contiguous(), self._table)
        parts: Parts = {"codes": packed_codes(levels, self._rows, self._spec.bits)}
        if self._table is not None:
            parts["table"] = self._table
        for name, factors in (("scales", self.scales), ("zeros", self.zeros)):
            if factors is None:
                continue
            supers = factors.supers.t().contiguous().half()
            if not self._bits:
                parts[name] = supers
                continue
            stored = packed_codes(factors.integers.t(), self._rows, self._bits)
            parts |= {f"super_{name}": supers.view(-1), name: stored.view(torch.int8) if self._bits == 8 else stored}
        return parts


class Vectors(Numbers):
    """Eight at a time from a grid: IQ1, IQ2, IQ3."""

    unit = 8

    def __init__(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        self._name, self._rows = name, shape[0]
        size = LATTICES[name].group if name in LATTICES else 32 if name == "IQ1_S" else 16
        high = 7 if name.startswith("IQ1") else 15
        span = FORMATS[name.lower()].elements
        self._choice = choice_for(name, device)
        self.zeros = None
        self.levels = torch.zeros(shape[1], shape[0], device=device)
        self.scales = Factors(
            torch.zeros(shape[1] // size, shape[0], device=device),
            torch.zeros(shape[1] // span, shape[0], device=device),
            size, span, 0, high, _STEPS[name], 0.5,
        )  # fmt: skip
        eights = shape[1] // 8
        self._vectors = torch.zeros(eights * self._choice.halves, shape[0], dtype=torch.int64, device=device)
        self._signs = torch.zeros(eights, shape[0], dtype=torch.int64, device=device)
        self._shifts: Tensor | None = None
        if name == "IQ1_S":
            self._shifts = torch.zeros(shape[1] // size, shape[0], dtype=torch.int64, device=device)

    def begin(self, column: int, found: Parts | BlockFields) -> None:
        if not isinstance(found, BlockFields):
            return
        block = column // self.scales.span
        groups = self.scales.span // self.scales.size
        self.scales.supers[block] = found.super_scale.float()
        self.scales.integers[block * groups : (block + 1) * groups] = found.scales.t().float()
        if self._shifts is not None:
            self._shifts[block * groups : (block + 1) * groups] = found.signs.t().to(torch.int64)

    def choose(self, column: int, wanted: Tensor, metric: Tensor) -> Tensor:
        group = column // self.scales.size
        scale = self.scales.of(group)
        shift = None if self._shifts is None else self._shifts[group]
        chosen = self._choice.choose(wanted, scale, metric, shift)
        eight, halves = column // 8, self._choice.halves
        self._vectors[eight * halves : (eight + 1) * halves] = chosen.vectors
        self._signs[eight] = chosen.signs
        self.levels[column : column + 8] = chosen.values
        return chosen.values * scale

    def tensors(self) -> Parts:
        blocks = len(self.scales.supers)
        signs = self._signs if self._shifts is None else self._shifts

        def by_block(numbers: Tensor) -> Tensor:
            return numbers.t().reshape(self._rows * blocks, -1)

        fields = BlockFields(
            by_block(self._vectors),
            by_block(signs),
            by_block(self.scales.integers).to(torch.uint8),
            self.scales.supers.t().reshape(-1).half(),
        )
        return {"codes": encode_blocks(self._name.lower(), fields).view(self._rows, blocks, -1)}


def numbers_for(name: str, spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> Numbers:
    """An empty weight of a type."""
    return Vectors(name, shape, device) if isinstance(spec.code, BlockCode) else Scalars(spec, shape, device)


def search_fields(name: str, rows: Tensor, importance: Tensor) -> BlockFields:
    """What :class:`Vectors` begins with, in one of the types with grids."""
    return search_lattice(name, rows, importance) if name in LATTICES else search_ternary(name, rows, importance)
