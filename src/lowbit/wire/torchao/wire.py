"""torchao's safetensors files: plain tensors, named after the parts of a tensor subclass, and a header that names it.

========================= ===================================== ==================================================
class                      ``_weight_qdata``                     ``_weight_scale``, ``_weight_zero_point``
========================= ===================================== ==================================================
Int4Tensor                 int8 [out, in/2], two signed codes    [groups, out] each, in the weight's dtype
Int8Tensor                 int8 [out, in]                        fp32, int8 [blocks]
IntxUnpackedToInt8Tensor   int8 [out, in], of 1 to 8 bits        floating point, int8 [out, groups]
Float8Tensor               e4m3 or e5m2 [out, in]                fp32 [blocks], none
========================= ===================================== ==================================================

``[blocks]`` is one number per block of the weight, in two dimensions. ``W = (q - zero_point) * scale``, but Int4Tensor
is ``W = q * scale + zero_point``. Which class a weight is of, its block size and its dtype stand in the header of the
file, without which reading would be guesswork: see :mod:`lowbit.wire.torchao.header`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import FloatCode, Grouping, IntCode, QuantSpec, QuantTensor, Scale, Zero, pack, unpack
from lowbit.core.packing import sign_extend
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, require_layout, require_tensor, require_tensors
from lowbit.wire.checks import names_of, require_finite, require_positive
from lowbit.wire.torchao.config import (
    FLOAT8,
    INT4,
    INT8,
    INTX,
    AoConfig,
    config_named,
    flag,
    old_config,
    parse_config,
    parse_object,
)
from lowbit.wire.torchao.header import Header, parse_header, write_header
from lowbit.wire.torchao.rules import FLOATS, Rules, nearest_config, parse_rules, rule_of, store_rules

_PREFIX: Final = "_weight_"
_PER_MODULE: Final = ("FqnToConfig", "ModuleFqnToConfig")
_MULTIPLE: Final = 16  # what FP8 products want of both sides


@dataclass(frozen=True)
class TorchAoSettings:
    """What ``config.json`` and the headers say.

    Attributes:
        config: of all weights, or of one module; None where it is in the rules, or for modules that stay dense.
        rules: configs by name or ``re:`` pattern of a module or of its weight (``FqnToConfig``).
        dtype: of weights before, where no header says it.
        header: of one weight.
        headers: by module.
        kept: ``modules_to_not_convert``.
        embeddings: ``include_input_output_embeddings``.
        untied: ``untie_embedding_weights``.
    """

    config: AoConfig | None = None
    rules: Rules = ()
    dtype: torch.dtype = torch.bfloat16
    header: Header | None = None
    headers: Mapping[str, Header] = field(default_factory=dict)
    kept: tuple[str, ...] | None = None
    embeddings: bool = False
    untied: bool = False

    @property
    def kind(self) -> str:
        """The class of one module's weight."""
        if self.header is not None:
            return self.header.kind
        if self.config is None:
            raise FormatError(
                "the weight is packed, but neither the configuration nor the header of its file says how",
                expected=f"an entry with _type, one of {[INT4, INT8, FLOAT8, INTX]}",
            )
        return self.config.kind


class TorchAoWire(Wire[TorchAoSettings]):
    """The four classes that are plain arrays of numbers; layouts of single kernels are refused."""

    name: ClassVar[str] = "torchao"
    quant_method: ClassVar[str] = "torchao"
    suffixes: ClassVar[tuple[str, ...]] = tuple(
        _PREFIX + part
        for part in (
            "qdata",
            "scale",
            "zero_point",
            "scale_and_zero",
            "per_tensor_scale",
            "act_pre_scale",
            "act_quant_scale",
            "act_quant_zero_point",
        )
    )
    marker: ClassVar[str] = "_weight_qdata"

    # ------------------------------------------------------------------------------------------------ configuration

    def parse(self, config: Json) -> TorchAoSettings:
        spelled = config.get("quant_type")
        base = TorchAoSettings(
            kept=names_of(config, "modules_to_not_convert"),
            embeddings=flag(config.get("include_input_output_embeddings"), "include_input_output_embeddings"),
            untied=flag(config.get("untie_embedding_weights"), "untie_embedding_weights"),
        )
        if isinstance(spelled, str):
            return replace(base, config=old_config(spelled, config.get("quant_type_kwargs") or {}))
        if isinstance(spelled, Mapping) and "_type" not in spelled:
            if set(spelled) != {"default"}:
                raise FormatError("quant_type has one entry", found=sorted(map(str, spelled))[:8], expected="default")
            spelled = spelled["default"]
        name, fields = parse_object(spelled, "quant_type")
        if name in _PER_MODULE:
            return replace(base, rules=parse_rules(fields))
        return replace(base, config=parse_config(spelled))

    def config(self, settings: TorchAoSettings) -> dict[str, Any]:
        stored = settings.config.data if settings.config else store_rules(settings.rules)
        return {
            "quant_method": "torchao",
            "quant_type": {"default": stored},
            "modules_to_not_convert": None if settings.kept is None else list(settings.kept),
            "include_input_output_embeddings": settings.embeddings,
            "untie_embedding_weights": settings.untied,
        }

    def bind(self, settings: TorchAoSettings, metadata: Mapping[str, str]) -> TorchAoSettings:
        """The settings with an entry per packed weight.

        Raises:
            FormatError: the headers name no tensors, or one of a class that is not known.
        """
        if "tensor_names" not in metadata:
            raise FormatError(
                "the headers of the files don't say of which class the tensors are; was the checkpoint saved anew "
                "without its metadata?",
                found=sorted(metadata)[:8],
                expected="tensor_names, and an entry per tensor",
            )
        headers: dict[str, Header] = {}
        for name in _tensor_names(metadata["tensor_names"]):
            try:
                entry = parse_header(metadata.get(name, ""))
            except FormatError as error:
                raise error.located(tensor=name) from error
            if entry is None:
                continue
            if not name.endswith(".weight"):
                raise FormatError("lowbit reads packed weights of linear layers", tensor=name, found=entry.kind)
            headers[name.removesuffix(".weight")] = entry
        return replace(settings, headers=headers)

    def metadata(
        self,
        settings: TorchAoSettings,
        weights: Mapping[str, tuple[QuantSpec, tuple[int, int]]],
        others: Collection[str],
    ) -> dict[str, str]:
        entries = dict.fromkeys(others, json.dumps({"_type": "Tensor"}))
        for module, (spec, shape) in weights.items():
            entries[f"{module}.weight"] = self._entry(self.of(settings, module), spec, shape)
        return {**entries, "tensor_names": json.dumps(list(entries))}

    def _entry(self, settings: TorchAoSettings, spec: QuantSpec, shape: tuple[int, int]) -> str:
        if settings.header is not None:
            return settings.header.text
        if settings.config is None:
            raise FormatError("no rule says how this weight is packed", found=spec)
        return write_header(settings.config, spec, shape)

    def of(self, settings: TorchAoSettings, module: str) -> TorchAoSettings:
        header = settings.headers.get(module)
        return replace(
            settings,
            config=rule_of(settings.rules, module) if settings.rules else settings.config,
            rules=(),
            dtype=(header and header.dtype) or settings.dtype,
            header=header,
            headers={},
        )

    # --------------------------------------------------------------------------------------------------------- specs

    def spec(self, settings: TorchAoSettings) -> QuantSpec:
        if settings.config is not None:
            block = (settings.config.rows, settings.config.cols)
            return self._spec(settings, Grouping(*block), settings.dtype, self._asymmetric(settings))
        header = settings.header
        return self._spec(settings, Grouping(*header.block) if header else Grouping(), settings.dtype, False)

    def spec_for(self, settings: TorchAoSettings, shape: tuple[int, int], dtype: torch.dtype) -> QuantSpec:
        """Of a weight ``[out, in]`` of `dtype` that is to be quantized under the settings of its module."""
        return self._spec(settings, self._grouping(settings, shape), dtype, self._asymmetric(settings))

    def _asymmetric(self, settings: TorchAoSettings) -> bool:
        return settings.config is not None and settings.config.mapping == "asymmetric"

    def _spec(
        self,
        settings: TorchAoSettings,
        grouping: Grouping,
        dtype: torch.dtype,
        asymmetric: bool,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantSpec:
        """Of a weight of `dtype`; `scale_dtype` where its scales are not as the config says."""
        config, header, kind = settings.config, settings.header, settings.kind
        activation = header.activation if header else config.activation  # type: ignore[union-attr]
        if kind == INT4:
            own = scale_dtype or dtype
            zero = Zero("additive", dtype=own)
            return QuantSpec(IntCode(4, signed=True), Scale(own), grouping, zero, activation, own)
        if kind == FLOAT8:
            number = config.code if config and config.kind == FLOAT8 else FloatCode(torch.float8_e4m3fn)
            return QuantSpec(number, Scale(torch.float32), grouping, None, activation, dtype)
        bits = header.bits if header else config.code.bits  # type: ignore[union-attr]
        by_config = torch.float32 if kind == INT8 else (config.scale_dtype if config else None) or dtype
        return QuantSpec(
            code=IntCode(bits, signed=not asymmetric),
            scale=Scale(scale_dtype or by_config),
            grouping=grouping,
            zero=Zero("integer", bits) if asymmetric else None,
            activation=activation,
            dtype=dtype,
        )

    def _block(self, settings: TorchAoSettings, shape: tuple[int, int]) -> tuple[int, int]:
        header, config = settings.header, settings.config
        rows, cols = header.block if header else (config.rows, config.cols) if config else (1, 0)
        return rows or shape[0], cols or shape[1]

    def _grouping(self, settings: TorchAoSettings, shape: tuple[int, int]) -> Grouping:
        rows, cols = self._block(settings, shape)
        return Grouping(0 if 1 < rows == shape[0] else rows, 0 if cols == shape[1] else cols)

    # -------------------------------------------------------------------------------------------- reading and writing

    def expected(self, settings: TorchAoSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        (out_features, in_features), blocks = shape, spec.grouping.counts(shape)
        scale = spec.scale.dtype
        if settings.kind == INT4:
            return {
                "_weight_qdata": ((out_features, in_features // 2), torch.int8),
                "_weight_scale": (blocks[::-1], scale),
                "_weight_zero_point": (blocks[::-1], scale),
            }
        if isinstance(spec.code, FloatCode):
            return {"_weight_qdata": (shape, spec.code.dtype), "_weight_scale": (blocks, scale)}
        return {
            "_weight_qdata": (shape, torch.int8),
            "_weight_scale": (blocks, scale),
            "_weight_zero_point": (blocks, torch.int8),
        }

    def read(self, settings: TorchAoSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        kind = settings.kind
        require_tensors(tensors, ("_weight_qdata", "_weight_scale"))
        known = {_PREFIX + part for part in ("qdata", "scale", "zero_point")}
        if unknown := sorted(set(tensors) - known):
            raise FormatError("a part that lowbit doesn't know", tensor=unknown[0], expected=sorted(known))
        qdata, scale = tensors["_weight_qdata"], tensors["_weight_scale"]
        require_tensor("_weight_qdata", qdata, dims=2)
        require_tensor("_weight_scale", scale, dims=2, dtypes=FLOATS)
        shape = (qdata.shape[0], qdata.shape[1] * (2 if kind == INT4 else 1))
        if reason := _misfit(self._block(settings, shape), shape):
            raise FormatError(reason, tensor="_weight_qdata", found=list(qdata.shape))
        if kind == INT4:
            return self._read_int4(settings, tensors, shape)
        if kind == FLOAT8:
            return self._read_float8(settings, tensors, shape)
        return self._read_integers(settings, tensors, shape)

    def _read_int4(
        self, settings: TorchAoSettings, tensors: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> QuantTensor:
        spec = self._spec(
            settings, self._grouping(settings, shape), settings.dtype, False, tensors["_weight_scale"].dtype
        )
        require_layout(tensors, self.expected(settings, spec, shape))
        for name in ("_weight_scale", "_weight_zero_point"):
            require_finite(name, tensors[name])
        own = {
            "codes": tensors["_weight_qdata"].contiguous().view(torch.uint8),
            "scales": tensors["_weight_scale"].t().contiguous(),
            "zeros": tensors["_weight_zero_point"].t().contiguous(),
        }
        return QuantTensor(spec, own, shape).validate()

    def _read_float8(
        self, settings: TorchAoSettings, tensors: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> QuantTensor:
        qdata = tensors["_weight_qdata"]
        require_tensor("_weight_qdata", qdata, dtypes=(torch.float8_e4m3fn, torch.float8_e5m2))
        spec = self._spec(settings, self._grouping(settings, shape), settings.dtype, False)
        spec = replace(spec, code=FloatCode(qdata.dtype))
        require_layout(tensors, self.expected(settings, spec, shape))
        require_positive("_weight_scale", tensors["_weight_scale"])
        require_finite("_weight_qdata", qdata)
        return QuantTensor(spec, {"codes": qdata, "scales": tensors["_weight_scale"]}, shape).validate()

    def _read_integers(
        self, settings: TorchAoSettings, tensors: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> QuantTensor:
        qdata, scale, zeros = (tensors.get(_PREFIX + part) for part in ("qdata", "scale", "zero_point"))
        if qdata is None or scale is None or (zeros is None and settings.kind == INTX):
            raise FormatError("a quantized weight lacks a tensor", tensor="_weight_zero_point", found=sorted(tensors))
        grouping = self._grouping(settings, shape)
        asymmetric = self._asymmetric(settings) or (zeros is not None and bool((zeros != 0).any()))
        stored = scale.dtype if settings.kind == INTX else None
        spec = self._spec(settings, grouping, settings.dtype, asymmetric, stored)
        layout = self.expected(settings, spec, shape)
        require_layout(tensors, {name: layout[name] for name in layout if name in tensors})
        require_finite("_weight_scale", scale)
        for name, tensor in (("_weight_qdata", qdata), ("_weight_zero_point", zeros)):
            if tensor is not None:
                _require_range(name, tensor, spec.bits)
        own = {"codes": _to_codes(qdata, spec), "scales": scale}
        if spec.zero is not None:
            own["zeros"] = pack(
                torch.zeros_like(scale) if zeros is None else zeros.to(torch.int16) + _offset(spec), spec.bits
            )
        return QuantTensor(spec, own, shape).validate()

    def write(self, settings: TorchAoSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"torchao can't spell this weight: {reason}", found=tensor.spec)
        spec, own = tensor.spec, tensor.tensors
        if settings.kind == INT4:
            return {
                "_weight_qdata": own["codes"].view(torch.int8),
                "_weight_scale": own["scales"].t().contiguous(),
                "_weight_zero_point": own["zeros"].t().contiguous(),
            }
        written = {"_weight_qdata": own["codes"], "_weight_scale": own["scales"]}
        if isinstance(spec.code, FloatCode):
            return written
        zeros = torch.zeros_like(own["scales"], dtype=torch.int8)
        if spec.zero is not None:
            stored = unpack(own["zeros"], spec.bits, spec.grouping.counts(tensor.shape)[1])
            zeros = (stored.to(torch.int16) - _offset(spec)).to(torch.int8)
        return {**written, "_weight_qdata": _from_codes(tensor), "_weight_zero_point": zeros}

    def refusal(self, settings: TorchAoSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        kind = settings.kind
        if reason := _misfit(self._block(settings, shape), shape):
            return reason
        if kind == INT4 and shape[1] % 2:
            return f"{shape[1]} inputs don't fill whole bytes"
        if kind == FLOAT8 and spec.activation.kind != "none" and (shape[0] % _MULTIPLE or shape[1] % _MULTIPLE):
            return (
                f"{shape[0]} x {shape[1]}: FP8 products want multiples of {_MULTIPLE}, and torchao leaves others dense"
            )
        asymmetric = spec.zero is not None and spec.zero.kind == "integer"
        scale_dtype = spec.scale.dtype if kind in (INT4, INTX) and spec.scale.dtype in FLOATS else None
        wanted = self._spec(settings, self._grouping(settings, shape), spec.dtype, asymmetric, scale_dtype)
        if kind == FLOAT8 and settings.header is not None:
            wanted = replace(wanted, code=spec.code if isinstance(spec.code, FloatCode) else wanted.code)
        return None if spec == wanted else f"the checkpoint holds '{wanted}' of {wanted.dtype}"

    # ----------------------------------------------------------------------------------------------------- conversion

    def settings_for(self, spec: QuantSpec) -> TorchAoSettings:
        grouping = spec.grouping
        if grouping.linear or grouping.permuted:
            raise FormatError("torchao has blocks of neighbouring rows and columns", found=spec)
        name, fields = nearest_config(spec)
        settings = TorchAoSettings(config_named(name, **fields), dtype=spec.dtype)
        if settings.config is None or settings.config.activation != spec.activation:
            raise FormatError("torchao rounds activations in other ways", found=spec.activation)
        return settings

    def spelling(self, settings: TorchAoSettings, spec: QuantSpec) -> QuantSpec:
        asymmetric = spec.zero is not None and settings.kind in (INT8, INTX)
        scale_dtype = spec.scale.dtype if settings.kind in (INT4, INTX) and spec.scale.dtype in FLOATS else None
        return self._spec(settings, spec.grouping, spec.dtype, asymmetric, scale_dtype)

    def join(self, settings: Mapping[str, TorchAoSettings], kept: Collection[str]) -> TorchAoSettings:
        first, *others = settings.values()
        skipped = tuple(sorted(kept)) or None
        if all(other.config == first.config for other in others):
            return replace(first, kept=skipped)
        rules = tuple((module, of.config) for module, of in settings.items())
        return TorchAoSettings(rules=rules, kept=skipped, dtype=first.dtype)


def _tensor_names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"tensor_names of the header is not JSON: {error}", found=text[:80]) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError("tensor_names of the header is a list of names", found=text[:80])
    return names


def _misfit(block: tuple[int, int], shape: tuple[int, int]) -> str | None:
    """Why a weight can't be divided into blocks."""
    if 0 in shape:
        return "the weight is empty"
    if shape[0] % block[0] or shape[1] % block[1]:
        return f"{shape[0]} x {shape[1]} doesn't divide into blocks of {block[0]} x {block[1]}"
    return None


def _offset(spec: QuantSpec) -> int:
    """What is added to a signed number so that it is an unsigned one."""
    return 1 << spec.bits - 1


def _require_range(name: str, tensor: Tensor, bits: int) -> None:
    if bits == 8 or tensor.is_meta or not tensor.numel():
        return
    low, high, limit = int(tensor.min()), int(tensor.max()), 1 << bits - 1
    if low < -limit or high >= limit:
        raise FormatError(
            f"codes are not of {bits} bits", tensor=name, found=f"{low}..{high}", expected=f"{-limit}..{limit - 1}"
        )


def _to_codes(qdata: Tensor, spec: QuantSpec) -> Tensor:
    if spec.zero is None:
        return qdata if spec.bits == 8 else pack(qdata, spec.bits)
    return pack(qdata.to(torch.int16) + _offset(spec), spec.bits)


def _from_codes(tensor: QuantTensor) -> Tensor:
    """Signed codes, ``int8 [out, in]``."""
    spec, codes = tensor.spec, tensor.tensors["codes"]
    if spec.bits < 8:
        codes = unpack(codes, spec.bits, tensor.shape[1])
        if spec.zero is None:
            return sign_extend(codes, spec.bits)
    return codes if spec.zero is None else (codes.to(torch.int16) - _offset(spec)).to(torch.int8)
