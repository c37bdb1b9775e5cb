"""`QuantSpec`: the whole meaning of a stored weight, as frozen, hashable, validated data.

A weight ``W [out, in]`` is described by five choices: how one number is *coded*, how it is *scaled*, what its *zero*
is, which weights share these (*grouping*), and what happens to *activations* when the weight is used. The arithmetic
is in :mod:`lowbit.core.reference`, the layout of the tensors in :meth:`QuantSpec.tensors`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from lowbit.core import blocks, dtypes
from lowbit.core.packing import packed_bytes
from lowbit.errors import FormatError, SpecError

TensorLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class IntCode:
    """A `bits`-bit integer: ``0 .. 2**bits - 1``, or ``-2**(bits-1) .. 2**(bits-1) - 1`` where `signed`."""

    bits: int
    signed: bool = False

    def __post_init__(self) -> None:
        _require(type(self.bits) is int and 1 <= self.bits <= 8, "an integer code has 1 to 8 bits", self.bits)

    @property
    def low(self) -> int:
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << self.bits - self.signed) - 1

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


@dataclass(frozen=True)
class TableCode:
    """A `bits`-bit index into a table of ``2**bits`` fp32 values that is stored with the weight.

    `name` is how the wire calls the table (``nf4``, ``fp4``); the stored values decide.
    """

    name: str
    bits: int = 4

    def __post_init__(self) -> None:
        _require(type(self.bits) is int and 1 <= self.bits <= 8, "a table code has 1 to 8 bits", self.bits)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FloatCode:
    """The number itself in a small floating-point dtype: ``float8_e4m3fn`` or ``float8_e5m2``; or, where nothing but
    the storage is compressed, ``float16``, ``bfloat16`` or ``float32``.
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        _require(self.dtype.is_floating_point, "a float code has a floating-point dtype", self.dtype)

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    def __str__(self) -> str:
        return dtypes.name_of(self.dtype)


@dataclass(frozen=True)
class VectorCode:
    """A tile of `out_group` x `in_group` weights as the sum of one vector from each of several codebooks (AQLM).

    Attributes:
        codebooks: how many vectors are summed.
        bits: width of an index; each codebook holds ``2**bits`` vectors.
    """

    codebooks: int
    bits: int
    out_group: int
    in_group: int

    def __post_init__(self) -> None:
        sides = (self.codebooks, self.out_group, self.in_group)
        _require(all(type(side) is int and side > 0 for side in sides), "a vector code's sides are positive", sides)
        _require(type(self.bits) is int and 1 <= self.bits <= 24, "an index has 1 to 24 bits", self.bits)

    @property
    def index_dtype(self) -> torch.dtype:
        """Of stored indices: the smallest signed integer of `bits` bits; read them modulo ``2**bits``."""
        return torch.int8 if self.bits <= 8 else torch.int16 if self.bits <= 16 else torch.int32

    def __str__(self) -> str:
        return f"{self.codebooks} x {self.bits}-bit vectors of {self.out_group} x {self.in_group}"


@dataclass(frozen=True)
class BlockCode:
    """Weights in blocks of bytes that hold codes, signs and scales together (GGUF's IQ1 to IQ3, TQ); kept as stored.

    `name` is one of :data:`lowbit.core.blocks.FORMATS`, which decodes them. There are no scales beside the blocks.
    """

    name: str

    def __post_init__(self) -> None:
        _require(self.name in blocks.FORMATS, f"a block code is one of {sorted(blocks.FORMATS)}", self.name)

    @property
    def elements(self) -> int:
        """Weights in a block."""
        return blocks.FORMATS[self.name].elements

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return blocks.FORMATS[self.name].nbytes

    @property
    def bits(self) -> int:
        """Per weight, scales included, rounded down."""
        return 8 * self.nbytes // self.elements

    def __str__(self) -> str:
        return self.name


Code = IntCode | TableCode | FloatCode | VectorCode | BlockCode
_CODES: dict[str, type[Any]] = {
    "integer": IntCode,
    "table": TableCode,
    "float": FloatCode,
    "vector": VectorCode,
    "block": BlockCode,
}
_KINDS = {code: kind for kind, code in _CODES.items()}


@dataclass(frozen=True)
class SecondLevel:
    """How first-level scales (or zeros) are quantized: ``scale[j] = super[j // size] * decode(code[j]) + offset``.

    ``integer``: integers of `bits` bits times a super-scale (GGUF K-quants), packed along the last axis like codes.
    ``table``: indices into a table of ``2**bits`` values (bitsandbytes' nested quantization). ``float8``: e4m3 numbers
    (NVFP4).

    Attributes:
        size: first-level scales per super-scale, counted along the order in which they are stored; 0 for all.
        dtype: of the super-scales.
        offset: whether one fp32 number is added (bitsandbytes subtracts the mean before it nests).
        signed: whether the integers are two's complement.
        divides: whether the super-scale is divided by instead of multiplied with (NVFP4's global scale).
    """

    kind: Literal["integer", "table", "float8"]
    size: int
    dtype: torch.dtype = torch.float32
    bits: int = 8
    offset: bool = False
    signed: bool = False
    divides: bool = False

    def __post_init__(self) -> None:
        _require(self.kind in ("integer", "table", "float8"), "unknown kind of second level", self.kind)
        _require(self.size >= 0, "a second level's size is not negative", self.size)
        _require(1 <= self.bits <= 8, "a second level has 1 to 8 bits", self.bits)

    @property
    def stored_dtype(self) -> torch.dtype:
        if self.kind == "float8":
            return torch.float8_e4m3fn
        return torch.int8 if self.signed and self.bits == 8 else torch.uint8


@dataclass(frozen=True)
class Scale:
    """What codes are multiplied with.

    Attributes:
        dtype: of the scales as stored; with a second level, of the decoded scales.
        multiplier: a constant applied after the scale. LLM.int8() stores the absolute maximum of a row and multiplies
            ``code * absmax`` with 1/127; folding that into the scale would round differently.
        second: set where the scales are themselves quantized.
        stored: false where there are none: the codes are the numbers.
    """

    dtype: torch.dtype
    multiplier: float = 1.0
    second: SecondLevel | None = None
    stored: bool = True

    def __post_init__(self) -> None:
        _require(self.stored or self.second is None, "scales that aren't stored have no second level", self.second)


@dataclass(frozen=True)
class Zero:
    """The point that maps to zero.

    ``integer``: ``W = (q - z) * s`` with z of `bits` bits, packed like the codes. ``float``: the same with a real z of
    `dtype` (HQQ). ``additive``: ``W = q * s + z``, z real (llm-awq's scaled zeros, torchao, the mins of K-quants).
    """

    kind: Literal["integer", "float", "additive"]
    bits: int = 0
    dtype: torch.dtype = torch.float16
    second: SecondLevel | None = None

    def __post_init__(self) -> None:
        _require(self.kind in ("integer", "float", "additive"), "unknown kind of zero", self.kind)
        _require(self.kind != "integer" or 1 <= self.bits <= 8, "an integer zero has 1 to 8 bits", self.bits)
        _require(self.second is None or self.kind != "integer", "an integer zero has one level", self.second)

    def __str__(self) -> str:
        return {"integer": "integer zero", "float": "float zero", "additive": "additive zero"}[self.kind]


@dataclass(frozen=True)
class Grouping:
    """Which weights share a scale: tiles of `rows` x `cols`, 0 for the whole axis.

    Attributes:
        flat: groups are runs of `cols` weights in row-major order and may straddle rows (bitsandbytes).
        strided: of ``n`` groups of `cols` weights, weight i in row-major order is in group ``i % n`` (HQQ, axis 0).
        permuted: ``group_index int32 [in]`` says which group each input column belongs to (act-order).
    """

    rows: int = 1
    cols: int = 0
    flat: bool = False
    permuted: bool = False
    strided: bool = False

    def __post_init__(self) -> None:
        _require(self.rows >= 0 and self.cols >= 0, "a group's sides are not negative", (self.rows, self.cols))
        runs = self.flat or self.strided
        _require(not runs or (self.cols > 0 and self.rows == 1), "flat and strided groups have a length", self)
        _require(self.flat + self.strided + self.permuted <= 1, "groups are flat, strided or permuted", self)

    @property
    def linear(self) -> bool:
        """Whether groups are counted over the row-major order, so that there is one axis of scales."""
        return self.flat or self.strided

    @classmethod
    def per_tensor(cls) -> Grouping:
        return cls(rows=0, cols=0)

    @classmethod
    def per_channel(cls) -> Grouping:
        return cls(rows=1, cols=0)

    @classmethod
    def groups(cls, size: int, permuted: bool = False) -> Grouping:
        return cls(rows=1, cols=size, permuted=permuted)

    @classmethod
    def flat_blocks(cls, size: int) -> Grouping:
        return cls(rows=1, cols=size, flat=True)

    @classmethod
    def strided_groups(cls, size: int) -> Grouping:
        return cls(rows=1, cols=size, strided=True)

    def counts(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the scales of a weight ``[out, in]``; a last group may be shorter."""
        out_features, in_features = shape
        if self.linear:
            return (-(-out_features * in_features // self.cols),)
        rows, cols = self.rows or out_features or 1, self.cols or in_features or 1
        return -(-out_features // rows), -(-in_features // cols)

    def __str__(self) -> str:
        if self.linear:
            return f"{'strided groups' if self.strided else 'blocks'} of {self.cols}"
        if self.rows == 0 and self.cols == 0:
            return "per tensor"
        if self.rows == 1 and self.cols == 0:
            return "per channel"
        text = f"groups of {self.cols}" if self.rows == 1 else f"tiles of {self.rows} x {self.cols}"
        return f"{text}, permuted" if self.permuted else text


@dataclass(frozen=True)
class Activation:
    """What happens to the input of a linear layer.

    ``none``: nothing. ``int8``: LLM.int8(): each row (token) is quantized to int8 by its absolute maximum; columns in
    which any value reaches `threshold` stay in 16 bits; threshold 0 keeps none. ``dynamic``: the input is rounded to
    `number` by scales made from it. ``static``: by a scale that is stored with the weight.

    Attributes:
        number: ``int2`` .. ``int8``, ``float8_e4m3fn``, ``float8_e5m2`` or ``float4_e2m1``.
        per: what shares a scale: a ``token`` (row), the whole ``tensor``, or a ``group`` of `size` columns.
        symmetric: whether 0 maps to 0; else the range is from the minimum to the maximum, with an integer zero point.
        divisor: ``scale = absmax / divisor`` (``(max - min) / divisor``); 0 for the largest number there is.
        bound: absolute maxima are cut off here (FBGEMM's ``scale_ub``); 0 for nowhere.
        floor: the least scale.
        scale_dtype: of the scales: ``float32``, the stored one of static scales, ``float8_e8m0fnu`` (MX) or
            ``float8_e4m3fn`` (NVFP4, relative to a stored ``input_global_scale``).
        rounding: as in :class:`QuantSpec`: in fp32, or in the inputs' dtype; ``scale``: scales are made in the inputs'
            dtype, the rest is in fp32 (torchao).
        reciprocal: codes are ``round(x * (1 / scale)) + zero`` and zero ``low - round(least / scale)`` (torchao),
            instead of ``round(x / scale + zero)`` and ``round(low - least / scale)``.
        outputs: the layer's output is rounded likewise, by a stored ``output_scale``.
    """

    kind: Literal["none", "int8", "dynamic", "static"] = "none"
    threshold: float = 0.0
    number: str = "int8"
    per: Literal["token", "tensor", "group"] = "token"
    size: int = 0
    symmetric: bool = True
    divisor: float = 0.0
    bound: float = 0.0
    floor: float = 0.0
    scale_dtype: torch.dtype = torch.float32
    rounding: Literal["once", "each", "scale"] = "once"
    reciprocal: bool = False
    outputs: bool = False

    def __post_init__(self) -> None:
        _require(self.kind in ("none", "int8", "dynamic", "static"), "unknown activation policy", self.kind)
        _require(self.number in ACTIVATION_NUMBERS, "activations can't be rounded to this", self.number)
        _require(self.per in ("token", "tensor", "group"), "unknown granularity of activations", self.per)
        _require(self.per != "group" or self.size > 0, "groups of activations have a size", self.size)
        numbers = (self.threshold, self.divisor, self.bound, self.floor)
        _require(min(numbers) >= 0, "an activation policy's numbers are not negative", numbers)
        _require(self.rounding in ("once", "each", "scale"), "unknown rounding", self.rounding)

    def tensors(self) -> TensorLayout:
        """What is stored with a weight: ``input_scale``, ``input_zero``, ``input_global_scale``, ``output_scale``."""
        layout: TensorLayout = {}
        if self.kind == "static":
            layout["input_scale"] = ((1,), self.scale_dtype)
            if not self.symmetric:
                layout["input_zero"] = ((1,), torch.int8)
        if self.kind == "dynamic" and self.scale_dtype == torch.float8_e4m3fn:
            layout["input_global_scale"] = ((1,), torch.float32)
        if self.outputs:
            layout["output_scale"] = ((1,), self.scale_dtype)
        return layout

    def __str__(self) -> str:
        if self.kind == "int8":
            return f"int8 activations, outliers from {self.threshold:g}" if self.threshold else "int8 activations"
        per = f"groups of {self.size}" if self.per == "group" else self.per
        return f"{self.kind} {self.number} activations per {per}"


ACTIVATION_NUMBERS = (*(f"int{bits}" for bits in range(2, 9)), "float8_e4m3fn", "float8_e5m2", "float4_e2m1")


@dataclass(frozen=True)
class QuantSpec:
    """The meaning of one quantized weight.

    Attributes:
        dtype: what the weight had before and dequantizes to.
        rounding: ``once``: fp32 arithmetic, one rounding to the result's dtype at the end. ``each``: every operation
            rounds to the result's dtype (HQQ, quanto).
    """

    code: Code
    scale: Scale
    grouping: Grouping
    zero: Zero | None = None
    activation: Activation = field(default_factory=Activation)
    dtype: torch.dtype = torch.float16
    rounding: Literal["once", "each"] = "once"

    def __post_init__(self) -> None:
        _require(self.rounding in ("once", "each"), "unknown rounding", self.rounding)
        _require(self.zero is None or isinstance(self.code, IntCode), "only integer codes have a zero point", self.zero)

    @property
    def bits(self) -> int:
        return self.code.bits

    def codes_layout(self, shape: tuple[int, int]) -> tuple[tuple[int, ...], torch.dtype]:
        """Packed along the input axis, rows byte-aligned; flat groups are one stream; 8 bits are not packed at all."""
        out_features, in_features = shape
        if isinstance(self.code, VectorCode):
            return _vector_layout(self.code, shape)
        if isinstance(self.code, BlockCode):
            return (out_features, -(-in_features // self.code.elements), self.code.nbytes), torch.uint8
        if isinstance(self.code, FloatCode):
            return shape, self.code.dtype
        if self.bits == 8:
            signed = isinstance(self.code, IntCode) and self.code.signed
            return shape, torch.int8 if signed else torch.uint8
        if self.grouping.flat:
            return (packed_bytes(out_features * in_features, self.bits),), torch.uint8
        return (out_features, packed_bytes(in_features, self.bits)), torch.uint8

    def tensors(self, shape: tuple[int, int]) -> TensorLayout:
        """The tensors of a weight ``[out, in]`` by name, each with its shape and dtype.

        ``codes``; ``scales`` (first-level codes where there is a second level, with ``super_scales`` and, by kind,
        ``super_scales_table`` and ``super_scales_offset``); ``zeros`` likewise; ``table``; ``codebooks``;
        ``group_index``; and what the activation policy needs.
        """
        counts = self.grouping.counts(shape)
        layout: TensorLayout = {"codes": self.codes_layout(shape)}
        if isinstance(self.code, TableCode):
            layout["table"] = ((1 << self.bits,), torch.float32)
        if isinstance(self.code, VectorCode):
            code = self.code
            layout["codebooks"] = (
                (code.codebooks, 1 << code.bits, code.out_group, code.in_group),
                self.scale.dtype,
            )
        if self.scale.stored:
            layout |= _scale_layout("scales", self.scale.dtype, self.scale.second, counts)
        if self.zero is not None and self.zero.kind == "integer":
            layout["zeros"] = ((*counts[:-1], packed_bytes(counts[-1], self.zero.bits)), torch.uint8)
        elif self.zero is not None:
            layout |= _scale_layout("zeros", self.zero.dtype, self.zero.second, counts)
        if self.grouping.permuted:
            layout["group_index"] = ((shape[1],), torch.int32)
        return layout | self.activation.tensors()

    def to_json(self) -> str:
        """A canonical text that :meth:`from_json` reads back; the same spec always gives the same text."""
        return _to_json(self)

    @staticmethod
    def from_json(text: str) -> QuantSpec:
        """Read what :meth:`to_json` wrote.

        Raises:
            FormatError: the text is not JSON, has unknown fields, or a value of the wrong kind.
        """
        return _from_json(text)

    def __str__(self) -> str:
        parts = [str(self.code), str(self.grouping)]
        parts += [str(self.zero)] if self.zero else []
        parts += (
            ["nested scales" if self.scale.second.kind == "table" else "two-level scales"] if self.scale.second else []
        )
        parts += [str(self.activation)] if self.activation.kind != "none" else []
        return ", ".join(parts)


def _scale_layout(name: str, dtype: torch.dtype, second: SecondLevel | None, counts: tuple[int, ...]) -> TensorLayout:
    if second is None:
        return {name: (counts, dtype)}
    total = 1
    for count in counts:
        total *= count
    packed = second.kind == "integer" and second.bits < 8
    stored = (*counts[:-1], packed_bytes(counts[-1], second.bits)) if packed else counts
    layout: TensorLayout = {
        name: (stored, second.stored_dtype),
        f"super_{name}": ((-(-total // (second.size or total)),), second.dtype),
    }
    if second.kind == "table":
        layout[f"super_{name}_table"] = ((1 << second.bits,), torch.float32)
    if second.offset:
        layout[f"super_{name}_offset"] = ((1,), torch.float32)
    return layout


def _vector_layout(code: VectorCode, shape: tuple[int, int]) -> tuple[tuple[int, ...], torch.dtype]:
    return (-(-shape[0] // code.out_group), -(-shape[1] // code.in_group), code.codebooks), code.index_dtype


def _require(condition: bool, message: str, found: object) -> None:
    if not condition:
        raise SpecError(f"{message}; found {found!r}")


@functools.lru_cache(maxsize=1024)
def _to_json(spec: QuantSpec) -> str:
    data = asdict(spec)
    data["code"]["kind"] = _KINDS[type(spec.code)]
    return json.dumps(data, sort_keys=True, separators=(",", ":"), default=dtypes.name_of)


@functools.lru_cache(maxsize=1024)
def _from_json(text: str) -> QuantSpec:
    try:
        data = json.loads(text)
        code = data.pop("code")
        return _build(
            QuantSpec,
            data
            | {
                "code": _build(_CODES[code.pop("kind")], code),
                "scale": _build_level(Scale, data["scale"]),
                "zero": _build_level(Zero, data["zero"]) if data["zero"] else None,
                "grouping": _build(Grouping, data["grouping"]),
                "activation": _build(Activation, data["activation"]),
            },
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FormatError(f"not a quantization spec: {error}", found=text[:120]) from error


def _build_level(cls: type[Any], data: dict[str, Any]) -> Any:
    second = data.get("second")
    return _build(cls, data | {"second": _build(SecondLevel, second) if second else None})


def _build(cls: type[Any], data: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := set(data) - known:
        raise FormatError(f"unknown fields in {cls.__name__}", found=sorted(unknown), expected=sorted(known))
    return cls(
        **{key: dtypes.parse(value, dtypes.ALL) if key.endswith("dtype") else value for key, value in data.items()}
    )
