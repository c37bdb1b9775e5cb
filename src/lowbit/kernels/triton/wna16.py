"""4-bit weights with integer zero points, on GPUs through Triton.

A few rows of inputs run through one fused program that unpacks the weight on its way to the tensor cores; for more, a
program writes the dense weight and torch multiplies. The programs are in :mod:`lowbit.kernels.triton.wna16_jit`; the
layout, the count of bytes behind it and the measurements are in ``docs/kernels/wna16.md``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.core import QuantSpec, QuantTensor
from lowbit.core.packing import pack, unpack
from lowbit.core.spec import IntCode, TensorLayout, Zero
from lowbit.kernels.registry import Kernel, Problem

BLOCK_ROWS, TILE_COLUMNS, TILE_WORDS = 16, 64, 256  # a tile is 16 rows of 64 columns in 256 words of 4 codes
_DEQUANTIZE_TILES, _GATHERED = 4, 1024  # tiles and columns per program
_FUSED = (torch.float16, torch.bfloat16)
_DENSE = (torch.float16, torch.bfloat16, torch.float32)
_TABLES, _DEFAULT_TABLE = Path(__file__).parent.parent / "tables", "wna16_nvidia_h200.json"
_MOST_ROWS = 32  # of inputs per program
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Config(NamedTuple):
    """How the fused program is cut.

    Attributes:
        slices: of the input axis, and
        bands: of output rows; each pair of them is a warp.
        fragments: blocks of 16 output rows per band.
        steps: tiles that a warp reads per turn of its loop, an even number.
        prefetch: whether the words of a turn are read during the turn before.
        registers: per thread at most. Without a limit the assembler reads every word just before its use.
    """

    slices: int
    bands: int
    fragments: int
    steps: int
    prefetch: bool
    registers: int


class Geometry(NamedTuple):
    """What the programs must know of a weight: its tiles, and how its groups lie on them."""

    blocks: int
    tiles: int
    groups: int
    group: int  # columns per group, 0 for all
    pairs: int  # runs of 32 columns that surely share a group, at most 4; 0 if not even 32 columns do


class Wna16Kernel(Kernel):
    """Unsigned 4-bit codes, integer zeros, one level of scales, per channel or in groups, act-order included."""

    name: ClassVar[str] = "triton-wna16"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def refusal(self, problem: Problem) -> str | None:
        spec, grouping, zero = problem.spec, problem.spec.grouping, problem.spec.zero
        grouped = 0 < grouping.cols < problem.shape[1]
        checks = (
            (spec.code == IntCode(4), f"runs unsigned 4-bit integers, not {spec.code}"),
            (_is_nibble(zero), f"wants a 4-bit integer zero, not {zero or 'none'}"),
            (spec.scale.second is None, "runs one level of scales"),
            (spec.scale.multiplier == 1.0, "runs scales without a multiplier"),
            (spec.scale.dtype in _DENSE, f"runs 16- and 32-bit scales, not {spec.scale.dtype}"),
            (grouping.rows == 1 and not grouping.linear, f"runs groups along one row, not {grouping}"),
            (not grouped or grouping.cols % 8 == 0, f"runs groups of a multiple of 8, not {grouping.cols}"),
            (spec.activation.kind == "none", f"leaves activations alone; this wants {spec.activation}"),
            (spec.rounding == "once", "rounds once, at the end"),
            (problem.dtype in _DENSE, f"runs 16- and 32-bit activations, not {problem.dtype}"),
        )
        return next((reason for fits, reason in checks if not fits), None) or _machine_refusal()

    def layout(self, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        """`columns` has a second row, each column's group, where the groups of a permuted weight are uneven."""
        geometry = _geometry(shape, spec.grouping.cols)
        per_group = (geometry.blocks, geometry.groups, BLOCK_ROWS)
        layout: TensorLayout = {
            "codes": ((geometry.blocks, geometry.tiles, TILE_WORDS), torch.int16),
            "scales": (per_group, spec.scale.dtype),
            "zeros": (per_group, torch.uint8),
        }
        return layout | ({"columns": ((1, shape[1]), torch.int32)} if spec.grouping.permuted else {})

    def prepare(self, tensor: QuantTensor) -> dict[str, Tensor]:
        geometry = _geometry(tensor.shape, tensor.spec.grouping.cols)
        codes = unpack(tensor.tensors["codes"], 4, tensor.shape[1])
        zeros = unpack(tensor.tensors["zeros"], 4, geometry.groups)
        prepared = {}
        if tensor.spec.grouping.permuted:
            columns = _sorted_columns(tensor.tensors["group_index"], geometry)
            codes = codes.index_select(1, columns[0])
            prepared["columns"] = columns
        tiled = _pad(codes, geometry.blocks * BLOCK_ROWS, geometry.tiles * TILE_COLUMNS)
        return {
            "codes": _to_words(tiled, geometry),
            "scales": _to_blocks(tensor.tensors["scales"], geometry),
            "zeros": _to_blocks(zeros, geometry),
        } | prepared

    def restore(self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantTensor:
        geometry = _geometry(shape, spec.grouping.cols)
        codes = _from_words(tensors["codes"], geometry)[: shape[0], : shape[1]]
        restored = {}
        if spec.grouping.permuted:
            columns = tensors["columns"]
            codes = torch.empty_like(codes).index_copy_(1, columns[0].long(), codes)
            groups = columns[1] if len(columns) > 1 else _even_groups(shape[1], geometry, columns.device)
            restored["group_index"] = torch.empty_like(groups).index_copy_(0, columns[0].long(), groups)
        zeros = _from_blocks(tensors["zeros"], shape[0])
        whole = {"codes": pack(codes, 4), "scales": _from_blocks(tensors["scales"], shape[0]), "zeros": pack(zeros, 4)}
        return QuantTensor(spec, whole | restored, shape)

    def apply(
        self,
        inputs: Tensor,
        spec: QuantSpec,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        columns = tensors.get("columns")
        if columns is not None and len(columns) > 1:
            return functional.linear(inputs, self.dequantize(spec, shape, tensors, inputs.dtype), bias)
        if columns is not None:
            inputs = _gather(inputs, columns)
        rows = inputs.numel() // shape[1]
        if 0 < rows <= _fused_rows(inputs.device) and inputs.dtype in _FUSED:
            return _fused_linear(inputs, rows, shape, spec.grouping.cols, tensors, bias)
        return functional.linear(inputs, _sorted_dense(shape, spec.grouping.cols, tensors, inputs.dtype), bias)

    def dequantize(
        self, spec: QuantSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        columns = tensors.get("columns")
        if columns is not None and len(columns) > 1:
            return self.restore(spec, shape, tensors).dequantize(dtype)
        dense = _sorted_dense(shape, spec.grouping.cols, tensors, dtype)
        return dense if columns is None else torch.empty_like(dense).index_copy_(1, columns[0].long(), dense)


def _is_nibble(zero: Zero | None) -> bool:
    return zero is not None and zero.kind == "integer" and zero.bits == 4


@functools.lru_cache(maxsize=4096)
def _geometry(shape: tuple[int, int], group: int) -> Geometry:
    out_features, in_features = shape
    group = 0 if group >= in_features else group
    pairs = next((pairs for pairs in (4, 2, 1) if group % (32 * pairs) == 0), 0)
    tiles, groups = -(-in_features // TILE_COLUMNS), -(-in_features // (group or in_features))
    return Geometry(-(-out_features // BLOCK_ROWS), tiles, groups, group, pairs)


def _to_words(codes: Tensor, geometry: Geometry) -> Tensor:
    """``uint8 [16 * blocks, 64 * tiles]`` to ``int16 [blocks, tiles, 256]``."""
    parts = codes.view(geometry.blocks, 2, 8, geometry.tiles, 2, 4, 2, 4)  # block, h, r, tile, place, t, place, i
    words = pack(parts.permute(0, 3, 2, 5, 1, 7, 4, 6).flatten(-2), 4)
    return words.view(torch.int16).reshape(geometry.blocks, geometry.tiles, TILE_WORDS)


def _from_words(words: Tensor, geometry: Geometry) -> Tensor:
    codes = unpack(words.unsqueeze(-1).view(torch.uint8), 4, 4).view(geometry.blocks, geometry.tiles, 8, 4, 2, 4, 2, 2)
    return codes.permute(0, 4, 2, 1, 6, 3, 7, 5).reshape(geometry.blocks * BLOCK_ROWS, geometry.tiles * TILE_COLUMNS)


def _to_blocks(values: Tensor, geometry: Geometry) -> Tensor:
    """``[out, groups]`` to ``[blocks, groups, 16]``, rows 0, 8, 1, 9, ... so that a thread reads its two at once."""
    padded = _pad(values, geometry.blocks * BLOCK_ROWS, values.shape[1])
    return padded.view(geometry.blocks, 2, 8, -1).permute(0, 3, 2, 1).flatten(-2).contiguous()


def _from_blocks(values: Tensor, out_features: int) -> Tensor:
    blocks, groups = values.shape[:2]
    rows = values.view(blocks, groups, 8, 2).permute(0, 3, 2, 1).reshape(blocks * BLOCK_ROWS, groups)
    return rows[:out_features].contiguous()


def _pad(values: Tensor, rows: int, columns: int) -> Tensor:
    return functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0])).contiguous()


def _even_groups(in_features: int, geometry: Geometry, device: torch.device) -> Tensor:
    return torch.arange(in_features, dtype=torch.int32, device=device) // (geometry.group or in_features)


def _sorted_columns(group_index: Tensor, geometry: Geometry) -> Tensor:
    """``int32 [1, in]``, the columns in the order of their groups; where groups are uneven, ``[2, in]`` with them."""
    groups, columns = torch.sort(group_index, stable=True)
    if torch.equal(groups, _even_groups(len(groups), geometry, groups.device)):
        return columns.to(torch.int32).unsqueeze(0)
    return torch.stack([columns.to(torch.int32), groups])


# --- choosing and launching -------------------------------------------------------------------------------------------


@functools.cache
def _machine_refusal() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    return None


@functools.cache
def _programs() -> Any:
    from lowbit.kernels.triton import wna16_jit

    return wna16_jit


@functools.cache
def _table(device: torch.device) -> dict[str, Any]:
    """The measured choices for a device, by its name, or else those of the default device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = _TABLES / f"wna16_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    table: dict[str, Any] = json.loads((path if path.exists() else _TABLES / _DEFAULT_TABLE).read_text())
    return table


@functools.cache
def _fused_rows(device: torch.device) -> int:
    rows: int = _table(device)["fused_rows"]
    return rows


@functools.lru_cache(maxsize=4096)
def _configure(device: torch.device, padded_rows: int, shape: tuple[int, int]) -> Config:
    """The first line of the table that covers the problem; a missing bound covers everything."""
    problem = {"rows": padded_rows, "out": shape[0], "in": shape[1]}
    lines = _table(device)["lines"]
    covering = (line for line in lines if all(problem[axis] <= line.get(axis, problem[axis]) for axis in problem))
    return Config(**next(covering, lines[-1])["config"])


def _sorted_dense(shape: tuple[int, int], group: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dense weight, its columns in the order in which they are stored."""
    geometry, codes, scales, zeros = _geometry(shape, group), tensors["codes"], tensors["scales"], tensors["zeros"]
    direct = dtype if dtype in _DENSE and not _INTERPRETED else torch.float32  # which the interpreter truncates to bf16
    dense = torch.empty(shape, dtype=direct, device=codes.device)
    constants = (*shape, geometry.tiles, geometry.groups, geometry.group, _DEQUANTIZE_TILES)
    launch = _launch("dequantize", codes.device, (codes, scales, zeros, dense), constants, {"num_warps": 4})
    launch((geometry.blocks, -(-geometry.tiles // _DEQUANTIZE_TILES), 1), codes, scales, zeros, dense)
    return dense.to(dtype)


def _gather(inputs: Tensor, columns: Tensor) -> Tensor:
    """``inputs[..., columns[0]]``, in a third of the time that torch takes for it."""
    inputs, in_features = inputs.contiguous(), inputs.shape[-1]
    outputs = torch.empty_like(inputs)
    dependent = _is_dependent(inputs.device)
    options = {"num_warps": 4, "launch_pdl": True} if dependent else {"num_warps": 4}
    pointers = (inputs, columns, outputs)
    launch = _launch("gather", inputs.device, pointers, (in_features, dependent, _GATHERED), options)
    if inputs.numel():
        launch((inputs.numel() // in_features, -(-in_features // _GATHERED), 1), *pointers)
    return outputs


def _fused_linear(
    inputs: Tensor, rows: int, shape: tuple[int, int], group: int, tensors: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor:
    inputs = inputs.contiguous()
    device, dtype = inputs.device, inputs.dtype
    direct = torch.float32 if _INTERPRETED else dtype
    outputs = torch.empty((*inputs.shape[:-1], shape[0]), dtype=direct, device=device)
    pointers = (
        inputs, tensors["codes"], tensors["scales"], tensors["zeros"], inputs if bias is None else bias, outputs,
    )  # fmt: skip
    padded_rows = 8 if rows <= 8 else 16 if rows <= 16 else _MOST_ROWS
    cut = _cut(device, padded_rows, shape, group, bias is not None)
    launch = _launch("fused_linear", device, pointers, cut.constants, cut.options)
    launch((cut.programs, -(-rows // padded_rows), 1), *pointers, rows)
    return outputs.to(dtype) if _INTERPRETED else outputs


class _Cut(NamedTuple):
    """A configuration applied to a weight."""

    programs: int
    constants: tuple[Any, ...]
    options: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _cut(device: torch.device, padded_rows: int, shape: tuple[int, int], group: int, bias: bool) -> _Cut:
    config, geometry = _configure(device, padded_rows, shape), _geometry(shape, group)
    per_turn = config.slices * config.steps
    turns, even = -(-geometry.tiles // per_turn), shape[1] % (TILE_COLUMNS * per_turn) == 0
    dependent = _is_dependent(device)
    constants = (
        *shape, geometry.tiles, geometry.groups,
        geometry.group, geometry.pairs, bias, dependent, even, turns, padded_rows, *config[:5],
    )  # fmt: skip
    options: dict[str, Any] = {"num_warps": config.slices * config.bands, "num_stages": 1}
    if device.type == "cuda" and torch.version.cuda is not None:
        options |= {"maxnreg": config.registers, "launch_pdl": dependent}
    return _Cut(-(-geometry.blocks // (config.bands * config.fragments)), constants, options)


@functools.cache
def _is_dependent(device: torch.device) -> bool:
    """Whether a program can be launched while the one before it still runs, and wait for it by itself."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


class _Launch:
    """A program for arguments that are alike, but for their addresses and one number.

    Triton looks at every argument of every call to find the program that was compiled for such arguments. Here they are
    known to be alike, so from the second call on the compiled program is called itself.
    """

    def __init__(self, program: Any, device: torch.device, constants: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.program, self.device, self.constants, self.options = program, device, constants, options
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *arguments: Tensor | int) -> None:
        with _on(self.device):
            if self.compiled is None:
                # In the interpreter it stays None.
                self.compiled = self.program[grid](*arguments, *self.constants, **self.options)
            else:
                self.compiled[grid](*arguments, *self.constants)


_launches: dict[tuple[object, ...], _Launch] = {}


def _launch(
    name: str, device: torch.device, pointers: tuple[Tensor, ...], constants: tuple[Any, ...], options: dict[str, Any]
) -> _Launch:
    addresses = 0
    for pointer in pointers:
        addresses |= pointer.data_ptr()
    key = (name, device, addresses % 16 == 0, constants, *(pointer.dtype for pointer in pointers))
    found = _launches.get(key)
    if found is None:
        found = _launches[key] = _Launch(getattr(_programs(), name), device, constants, options)
    return found


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which may be another."""
    return contextlib.nullcontext() if _devices() < 2 else torch.cuda.device(device)


@functools.cache
def _devices() -> int:
    return torch.cuda.device_count()
