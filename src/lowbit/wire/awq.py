"""AWQ as AutoAWQ and llm-awq write it: 4 bits, groups along the input axis, in three layouts.

``gemm``: ``qweight int32 [in, out/8]``, ``qzeros int32 [groups, out/8]``, ``scales fp16 [groups, out]``; the nibbles of
a word hold output columns 0 2 4 6 1 3 5 7.

``gemv``: ``qweight int32 [out, in/8]`` in natural order, ``qzeros int32 [out, w]``, ``scales fp16 [out, 8 w]``, both
padded to a multiple that depends on the group size.

``gemv_fast`` (llm-awq): ``qweight int16 [out/4, in]``, four rows interleaved in runs of 64 columns whose nibbles are
permuted twice; ``scales fp16 [8 w, out]`` and ``qzeros`` (llm-awq: ``scaled_zeros``) fp16 of the same shape, which hold
``-zero * scale``.

``W = (q - z) * s``, for gemv_fast ``W = q * s + scaled_zero``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.core import Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero, pack, unpack
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import (
    Json,
    Wire,
    as_bytes,
    as_words,
    bits_for,
    field,
    group_size_for,
    group_size_of,
    names_in,
    require_layout,
    require_tensor,
    require_tensors,
    scale_dtype_for,
)

BITS = 4
PER_WORD = 8
LAYOUTS = ("gemm", "gemv", "gemv_fast")
# exllama, marlin and ipex were names of kernels: their checkpoints are gemm. llm-awq writes gemv_fast.
_VERSIONS = {name: name for name in LAYOUTS} | {
    "llm-awq": "gemv_fast",
    "exllama": "gemm",
    "marlin": "gemm",
    "ipex": "gemm",
}
_STRIP = 1 << 20  # weights that are unpacked at a time
_NIBBLE_TO_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)
_COLUMN_TO_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqSettings:
    """What ``config.json`` says.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        version: how the file spells it (``llm-awq`` is the layout gemv_fast), kept for writing.
        skip: ``modules_to_not_convert``, which other readers need; here the files decide.
    """

    layout: str = "gemm"
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    skip: tuple[str, ...] = ()


class AwqWire(Wire[AwqSettings]):
    """All three layouts of AWQ."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "scaled_zeros")
    marker: ClassVar[str] = "qweight"
    activation_scales: ClassVar[tuple[str, ...]] = (
        ".act.scales",
        ".gelu_impl.scales",
        ".act_fn.scales",
        ".activation_fn.scales",
    )

    def parse(self, config: Json) -> AwqSettings:
        bits_name = "w_bit" if "w_bit" in config and "bits" not in config else "bits"
        field(config, bits_name, int, BITS, allowed=(BITS,))
        spelled = config.get("version") or config.get("format") or "gemm"
        version = spelled.lower() if isinstance(spelled, str) else ""
        if version not in _VERSIONS:
            raise FormatError("unknown AWQ version", found=repr(spelled)[:80], expected=sorted(_VERSIONS))
        return AwqSettings(
            layout=_VERSIONS[version],
            group_size=group_size_of(config, "group_size", "q_group_size"),
            zero_point=field(config, "zero_point", bool, True),
            version=version,
            skip=names_in(config, "modules_to_not_convert"),
        )

    def config(self, settings: AwqSettings) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": settings.group_size,
            "zero_point": settings.zero_point,
            "version": settings.version,
            **({"modules_to_not_convert": list(settings.skip)} if settings.skip else {}),
        }

    def settings_for(self, spec: QuantSpec) -> AwqSettings:
        bits_for(spec, (BITS,))
        layout = "gemv_fast" if spec.zero is not None and spec.zero.kind == "additive" else "gemm"
        return AwqSettings(layout, group_size_for(spec), zero_point=spec.zero is not None, version=layout)

    def vary(self, settings: AwqSettings, variant: str) -> AwqSettings:
        if variant not in (*LAYOUTS, "llm-awq"):
            raise FormatError("unknown variant of AWQ", found=variant, expected=[*LAYOUTS, "llm-awq"])
        return replace(settings, layout=_VERSIONS[variant], version=variant)

    def spelling(self, settings: AwqSettings, spec: QuantSpec) -> QuantSpec:
        return _spec(settings, scale_dtype_for(spec))

    def join(self, settings: Mapping[str, AwqSettings], kept: Collection[str]) -> AwqSettings:
        # The head and what is tied to it are left out by every reader, whatever else is.
        return replace(super().join(settings, kept), skip=tuple(name for name in kept if "." in name))

    def spec(self, settings: AwqSettings) -> QuantSpec:
        return _spec(settings, torch.float16)

    def expected(self, settings: AwqSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        out_features, in_features = shape
        groups = spec.grouping.counts(shape)[1]
        if settings.layout == "gemm":
            return {
                "qweight": ((in_features, out_features // PER_WORD), torch.int32),
                "qzeros": ((groups, out_features // PER_WORD), torch.int32),
                "scales": ((groups, out_features), spec.scale.dtype),
            }
        words = _padded_words(groups, settings.group_size)
        if settings.layout == "gemv":
            return {
                "qweight": ((out_features, in_features // PER_WORD), torch.int32),
                "qzeros": ((out_features, words), torch.int32),
                "scales": ((out_features, words * PER_WORD), spec.scale.dtype),
            }
        return {
            "qweight": ((out_features // 4, in_features), torch.int16),
            "qzeros": ((words * PER_WORD, out_features), spec.scale.dtype),
            "scales": ((words * PER_WORD, out_features), spec.scale.dtype),
        }

    def read(self, settings: AwqSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        if "scaled_zeros" in tensors and "qzeros" not in tensors:
            tensors = {**tensors, "qzeros": tensors["scaled_zeros"]}
        require_tensors(tensors, ("qweight", "qzeros", "scales"))
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        require_tensor("scales", scales, dtypes=(torch.float16, torch.bfloat16, torch.float32), dims=2)
        shape = _shape(settings, qweight)
        spec = _spec(settings, scales.dtype)
        require_layout(tensors, self.expected(settings, spec, shape))
        if reason := self.refusal(settings, spec, shape):
            raise FormatError(f"no AWQ weight has this shape: {reason}", tensor="qweight", found=list(qweight.shape))
        groups = spec.grouping.counts(shape)[1]
        reader = {"gemm": _read_gemm, "gemv": _read_gemv, "gemv_fast": _read_gemv_fast}[settings.layout]
        return QuantTensor(spec, reader(qweight, qzeros, scales, groups), shape).validate()

    def write(self, settings: AwqSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"AWQ can't spell this weight: {reason}", found=tensor.spec)
        if settings.layout == "gemm":
            return _write_gemm(tensor)
        words = _padded_words(tensor.spec.grouping.counts(tensor.shape)[1], settings.group_size)
        if settings.layout == "gemv":
            return _write_gemv(tensor, words)
        written = _write_gemv_fast(tensor, words)
        if settings.version == "llm-awq":
            written["scaled_zeros"] = written.pop("qzeros")
        return written

    def refusal(self, settings: AwqSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        out_features, in_features = shape
        wanted = _spec(settings, spec.scale.dtype)
        if spec != wanted:
            return f"the checkpoint holds '{wanted}'"
        if settings.group_size > 0 and in_features % settings.group_size:
            return f"groups of {settings.group_size} don't divide {in_features} inputs"
        if settings.layout == "gemm" and out_features % PER_WORD:
            return f"{out_features} outputs are not a multiple of {PER_WORD}"
        if settings.layout == "gemv" and in_features % PER_WORD:
            return f"{in_features} inputs are not a multiple of {PER_WORD}"
        if settings.layout == "gemv_fast" and (out_features % 4 or in_features % 64):
            return f"{out_features} x {in_features} is not a multiple of 4 x 64"
        if settings.layout != "gemm" and settings.group_size not in (-1, 32, 64) and settings.group_size < 128:
            return f"the gemv layouts have groups of 32, 64, or from 128, not {settings.group_size}"
        return None


def _spec(settings: AwqSettings, scale_dtype: torch.dtype) -> QuantSpec:
    size = settings.group_size
    additive = settings.layout == "gemv_fast"
    return QuantSpec(
        code=IntCode(BITS),
        scale=Scale(scale_dtype),
        grouping=Grouping.per_channel() if size == -1 else Grouping.groups(size),
        zero=Zero("additive", dtype=scale_dtype) if additive else Zero("integer", BITS),
        dtype=scale_dtype,
    )


def _shape(settings: AwqSettings, qweight: Tensor) -> tuple[int, int]:
    dtype = torch.int16 if settings.layout == "gemv_fast" else torch.int32
    require_tensor("qweight", qweight, dtypes=(dtype,), dims=2)
    rows, cols = qweight.shape
    return {"gemm": (cols * PER_WORD, rows), "gemv": (rows, cols * PER_WORD), "gemv_fast": (rows * 4, cols)}[
        settings.layout
    ]


def _padded_words(groups: int, group_size: int) -> int:
    """Words per row of packed zeros, padded as the gemv kernels want it."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = -(-groups // PER_WORD)
    return -(-words // multiple) * multiple


def _permute_columns(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorder the last axis within each run of 8."""
    index = torch.tensor(order, device=values.device)
    return values.unflatten(-1, (-1, PER_WORD)).index_select(-1, index).flatten(-2)


def _read_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: int) -> dict[str, Tensor]:
    # In strips, so that loading a model needs no more memory than its packed weights and one strip.
    words = max(1, _STRIP // (qweight.shape[0] * PER_WORD))
    codes = torch.cat([_read_gemm_words(strip) for strip in qweight.split(words, dim=1)])
    return {"codes": codes, "zeros": _read_gemm_words(qzeros), "scales": scales.t().contiguous()}


def _read_gemm_words(words: Tensor) -> Tensor:
    """``int32 [rows, out/8]`` to packed ``uint8 [out, rows/2]``."""
    values = unpack(as_bytes(words), BITS, words.shape[1] * PER_WORD)
    return pack(_permute_columns(values, _COLUMN_TO_NIBBLE).t(), BITS)


def _write_gemm(tensor: QuantTensor) -> dict[str, Tensor]:
    in_features, groups = tensor.shape[1], tensor.spec.grouping.counts(tensor.shape)[1]
    codes = unpack(tensor.tensors["codes"], BITS, in_features).t()
    zeros = unpack(tensor.tensors["zeros"], BITS, groups).t()
    return {
        "qweight": as_words(pack(_permute_columns(codes, _NIBBLE_TO_COLUMN), BITS)),
        "qzeros": as_words(pack(_permute_columns(zeros, _NIBBLE_TO_COLUMN), BITS)),
        "scales": tensor.tensors["scales"].t().contiguous(),
    }


def _read_gemv(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: int) -> dict[str, Tensor]:
    zeros = unpack(as_bytes(qzeros), BITS, qzeros.shape[1] * PER_WORD)[:, :groups]
    return {"codes": as_bytes(qweight), "zeros": pack(zeros, BITS), "scales": scales[:, :groups].contiguous()}


def _write_gemv(tensor: QuantTensor, words: int) -> dict[str, Tensor]:
    groups = tensor.spec.grouping.counts(tensor.shape)[1]
    padding = (0, words * PER_WORD - groups)
    zeros = functional.pad(unpack(tensor.tensors["zeros"], BITS, groups), padding)
    return {
        "qweight": as_words(tensor.tensors["codes"]),
        "qzeros": as_words(pack(zeros, BITS)),
        "scales": functional.pad(tensor.tensors["scales"], padding),
    }


def _read_gemv_fast(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: int) -> dict[str, Tensor]:
    return {
        "codes": pack(_deinterleave(qweight), BITS),
        "zeros": qzeros[:groups].t().contiguous(),
        "scales": scales[:groups].t().contiguous(),
    }


def _write_gemv_fast(tensor: QuantTensor, words: int) -> dict[str, Tensor]:
    groups = tensor.spec.grouping.counts(tensor.shape)[1]
    padding = (0, 0, 0, words * PER_WORD - groups)
    return {
        "qweight": _interleave(unpack(tensor.tensors["codes"], BITS, tensor.shape[1])),
        "qzeros": functional.pad(tensor.tensors["zeros"].t(), padding).contiguous(),
        "scales": functional.pad(tensor.tensors["scales"].t(), padding).contiguous(),
    }


def _interleave(codes: Tensor) -> Tensor:
    """Natural codes ``uint8 [out, in]`` to ``int16 [out/4, in]``.

    Within 32 columns: pairs of columns from each quarter of 8 follow one another; then within 8 the even columns come
    before the odd ones; then 4 rows alternate in runs of 64 columns, and 4 nibbles make a word.
    """
    out_features, in_features = codes.shape
    quarters = codes.view(out_features, -1, 4, 4, 2).transpose(2, 3)
    evens_first = quarters.reshape(out_features, -1, 4, 2).transpose(2, 3)
    rows = evens_first.reshape(out_features // 4, 4, in_features // 64, 64).transpose(1, 2)
    return as_words(pack(rows.reshape(out_features // 4, 4 * in_features), BITS), torch.int16)


def _deinterleave(words: Tensor) -> Tensor:
    """The inverse of :func:`_interleave`."""
    out_features, in_features = words.shape[0] * 4, words.shape[1]
    nibbles = unpack(as_bytes(words), BITS, 4 * in_features)
    rows = nibbles.view(out_features // 4, in_features // 64, 4, 64).transpose(1, 2)
    quarters = rows.reshape(out_features, -1, 2, 4).transpose(2, 3)
    natural = quarters.reshape(out_features, -1, 4, 4, 2).transpose(2, 3)
    return natural.reshape(out_features, in_features)
