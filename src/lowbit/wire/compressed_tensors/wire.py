"""compressed-tensors: one wire for all of its formats; a module's scheme says how its tensors are read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import FloatCode, Grouping, IntCode, QuantSpec, QuantTensor, Scale, TableCode
from lowbit.core.packing import packed_bytes
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, require_tensor, require_tensors
from lowbit.wire.compressed_tensors import packing
from lowbit.wire.compressed_tensors.schemes import (
    PRESETS,
    QUANTIZED,
    UNSPECIFIC,
    Args,
    Scheme,
    Sparsity,
    names_of,
    parse_args,
    parse_scheme,
    parse_sparsity,
    preset,
)
from lowbit.wire.compressed_tensors.sparse import SUFFIXES as SPARSE_SUFFIXES
from lowbit.wire.compressed_tensors.sparse import is_sparse, read_sparse, write_sparse
from lowbit.wire.compressed_tensors.specs import SCALE_DTYPES, TABLES, scheme_of, spec_of
from lowbit.wire.compressed_tensors.targets import first_match, is_ignored

METHOD: Final = "compressed-tensors"
# Scales and zero points of what attention computes and caches; they belong to no weight.
KV_SUFFIXES: Final = tuple(f"{part}_{kind}" for part in "qkv" for kind in ("scale", "zero_point", "global_scale"))
_PACKED_ZEROS: Final = ("group", "channel")  # the strategies under which pack-quantized packs zero points
_STORED: Final = {  # what the codes are stored as, by format
    "pack-quantized": ("weight_packed", torch.int32),
    "nvfp4-pack-quantized": ("weight_packed", torch.uint8),
    "mxfp4-pack-quantized": ("weight_packed", torch.uint8),
    "mxfp6-pack-quantized": ("weight_packed", torch.uint8),
}


@dataclass(frozen=True)
class CompressedTensorsSettings:
    """What ``config.json`` says.

    Attributes:
        schemes: of the whole checkpoint; of one module none or one.
        ignore: targets that have no scheme.
        format: of the whole checkpoint; schemes may name their own.
        kv_cache: how attention's cache was meant to be quantized. lowbit keeps the scales and caches in full precision.
        sparsity: which weights are stored without their zeros; of one module whether it is.
    """

    schemes: tuple[Scheme, ...] = ()
    ignore: tuple[str, ...] = ()
    format: str = "dense"
    kv_cache: Args | None = None
    sparsity: Sparsity | None = None

    @property
    def scheme(self) -> Scheme:
        """The one scheme of a module's settings."""
        if len(self.schemes) != 1 or self.schemes[0].weights is None:
            raise FormatError("no config group quantizes this module", found=f"{len(self.schemes)} groups")
        return self.schemes[0]

    @property
    def weights(self) -> Args:
        """How the weight of a module is quantized."""
        return self.scheme.weights or Args()

    @property
    def module_format(self) -> str:
        """The format of a module: its scheme's, the checkpoint's, or the one that the scheme implies."""
        for spelled in (self.scheme.format, self.format):
            if spelled in QUANTIZED:
                return str(spelled)
        return self.scheme.inferred_format


class CompressedTensorsWire(Wire[CompressedTensorsSettings]):
    """Every format of compressed-tensors but ``marlin-24``, which holds weights in the order of one GPU kernel."""

    name: ClassVar[str] = METHOD
    quant_method: ClassVar[str] = METHOD
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        *SPARSE_SUFFIXES,
    )
    marker: ClassVar[str] = "weight_scale"
    kept: ClassVar[tuple[str, ...]] = tuple(f".{suffix}" for suffix in KV_SUFFIXES)

    def detect(self, config: Json) -> bool:
        method = config.get("quant_method")
        if method is None and isinstance(nested := config.get("quantization_config"), Mapping):
            method = nested.get("quant_method", METHOD if "config_groups" in nested else None)
        return method == METHOD

    def modules(self, names: Collection[str]) -> list[str]:
        endings = (".weight_scale", ".bitmask")
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(endings)))

    def check_names(self, others: Collection[str]) -> None:
        scales = [name for name in others if name.endswith(self.kept)]
        if scales:
            warnings.warn(
                f"the checkpoint has {len(scales)} scales for a quantized cache ({scales[0]}, ...), which are kept; "
                "the cache itself stays in the model's dtype",
                stacklevel=2,
            )

    def parse(self, config: Json) -> CompressedTensorsSettings:
        config = flatten(config)
        spelled = config.get("format") or "dense"
        if spelled == "marlin-24":
            raise FormatError(
                "marlin-24 holds weights in the order of one GPU kernel, without a way back; "
                "quantize the original model again, in another format",
                found=spelled,
            )
        if spelled not in (*QUANTIZED, *UNSPECIFIC):
            raise FormatError("unknown format", found=repr(spelled)[:80], expected=[*QUANTIZED, *UNSPECIFIC])
        for key in ("transform_config", "moe_sparsity_config"):
            if config.get(key):
                raise FormatError(f"{key} changes what the model computes, and lowbit doesn't do that", found=key)
        settings = CompressedTensorsSettings(
            _parse_groups(config.get("config_groups")),
            names_of(config.get("ignore") or (), "ignore"),
            spelled,
            parse_args(config.get("kv_cache_scheme"), "kv_cache_scheme"),
            parse_sparsity(config.get("sparsity_config")),
        )
        for scheme in settings.schemes:
            if scheme.weights is not None:
                _check_format(replace(settings, schemes=(scheme,)))
        return settings

    def config(self, settings: CompressedTensorsSettings) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "config_groups": {f"group_{number}": scheme.to_dict() for number, scheme in enumerate(settings.schemes)},
            "format": settings.format,
            "quantization_status": "compressed",
            "kv_cache_scheme": settings.kv_cache.to_dict() if settings.kv_cache else None,
            "global_compression_ratio": None,
            "ignore": list(settings.ignore),
            **({"sparsity_config": settings.sparsity.to_dict()} if settings.sparsity else {}),
        }

    def of(self, settings: CompressedTensorsSettings, module: str) -> CompressedTensorsSettings:
        schemes = {target: scheme for scheme in settings.schemes for target in scheme.targets}
        found = None if is_ignored(settings.ignore, module) else first_match(schemes, module)
        chosen = schemes[found] if found is not None else None
        sparsity = settings.sparsity
        if sparsity and (
            (sparsity.targets and first_match(sparsity.targets, module) is None) or is_ignored(sparsity.ignore, module)
        ):
            sparsity = None
        own = (chosen,) if chosen and chosen.weights else ()
        return replace(settings, schemes=own, ignore=(), sparsity=sparsity)

    def settings_for(self, spec: QuantSpec) -> CompressedTensorsSettings:
        scheme = scheme_of(spec)
        return CompressedTensorsSettings((scheme,), format=scheme.inferred_format)

    def vary(self, settings: CompressedTensorsSettings, variant: str) -> CompressedTensorsSettings:
        """A preset, in any case, or a format that holds the same numbers (``int-quantized``)."""
        if variant.upper() in PRESETS:
            scheme = preset(variant, ("Linear",))
            return CompressedTensorsSettings((scheme,), format=scheme.inferred_format)
        if variant not in QUANTIZED:
            raise FormatError("unknown variant", found=variant, expected=[*QUANTIZED, *PRESETS])
        varied = replace(settings, schemes=(replace(settings.scheme, format=variant),), format=variant)
        _check_format(varied)
        return varied

    def spelling(self, settings: CompressedTensorsSettings, spec: QuantSpec) -> QuantSpec:
        dtype = spec.scale.dtype if spec.scale.dtype in SCALE_DTYPES else spec.dtype
        return spec_of(
            settings.scheme,
            dtype,
            input_scale_dtype=spec.activation.scale_dtype if spec.activation.kind == "static" else None,
            permuted=settings.weights.actorder and spec.grouping.permuted,
        )

    def join(
        self, settings: Mapping[str, CompressedTensorsSettings], kept: Collection[str]
    ) -> CompressedTensorsSettings:
        modules: dict[Scheme, list[str]] = {}
        for module, own in settings.items():
            modules.setdefault(replace(own.scheme, targets=(), format=own.module_format), []).append(module)
        formats = {str(scheme.format) for scheme in modules}
        common = max(modules, key=lambda scheme: len(modules[scheme]))
        schemes = tuple(
            replace(scheme, targets=("Linear",) if scheme == common else tuple(names))
            for scheme, names in modules.items()
        )
        spelled = formats.pop() if len(formats) == 1 else "mixed-precision"
        return CompressedTensorsSettings(schemes, tuple(sorted(kept)), spelled)

    def spec(self, settings: CompressedTensorsSettings) -> QuantSpec:
        if not settings.schemes and settings.sparsity:
            return _dense_spec(torch.bfloat16)
        return spec_of(settings.scheme)

    def expected(self, settings: CompressedTensorsSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        """As in :meth:`Wire.expected`; of sparse weights, whose size is in their numbers, the scales alone."""
        layout: TensorLayout = {}
        if settings.schemes:
            layout = _weight_layout(settings, spec, shape) | _activation_layout(spec)
        if settings.sparsity:
            layout.pop("weight", None)
            layout["bitmask"] = ((shape[0], packed_bytes(shape[1], 1)), torch.uint8)
        return layout

    def read(self, settings: CompressedTensorsSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        if is_sparse(tensors):
            weight = read_sparse(tensors)
            if "weight_scale" not in tensors and weight.dtype in SCALE_DTYPES:
                spec = _dense_spec(weight.dtype)
                return QuantTensor(spec, {"codes": weight}, (weight.shape[0], weight.shape[1])).validate()
            tensors = {**{name: tensors[name] for name in set(tensors) - set(SPARSE_SUFFIXES)}, "weight": weight}
        stored, dtype = _STORED.get(settings.module_format, ("weight", _plain_dtype(settings.weights)))
        require_tensors(tensors, (stored, "weight_scale"))
        require_tensor(stored, tensors[stored], dtypes=(dtype,), dims=2)
        shape = _shape(settings, tensors, tensors[stored])
        spec = self._spec_in(settings, tensors, shape)
        _check_shapes(tensors, self.expected(replace(settings, sparsity=None), spec, shape))
        own = {"codes": _read_codes(settings, spec, tensors[stored], shape), **_read_scales(spec, tensors, shape)}
        if spec.zero is not None:
            own["zeros"] = _read_zeros(settings, spec, tensors["weight_zero_point"], shape)
        if spec.grouping.permuted:
            own["group_index"] = tensors["weight_g_idx"].to(torch.int32)
        return QuantTensor(spec, own | _read_activations(spec, tensors), shape).validate()

    def write(self, settings: CompressedTensorsSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"compressed-tensors can't spell this weight: {reason}", found=tensor.spec)
        spec, own, shape = tensor.spec, tensor.tensors, tensor.shape
        quarters = settings.sparsity is not None and settings.sparsity.format == "sparse-24-bitmask"
        if not spec.scale.stored:
            return write_sparse(own["codes"], quarters)
        stored, _ = _STORED.get(settings.module_format, ("weight", torch.int8))
        written = {stored: _write_codes(settings, spec, own["codes"], shape), **_write_scales(settings, spec, own)}
        if settings.module_format == "pack-quantized":
            written["weight_shape"] = torch.tensor(shape, device=tensor.device)
        if spec.zero is not None:
            written["weight_zero_point"] = _write_zeros(settings, spec, own["zeros"], shape)
        if settings.weights.actorder:
            plain = torch.arange(shape[1], dtype=torch.int32, device=tensor.device) // settings.weights.group
            written["weight_g_idx"] = own.get("group_index", plain)
        if settings.sparsity and stored == "weight":
            written |= write_sparse(written.pop("weight"), quarters)
        return written | _write_activations(spec, own)

    def refusal(self, settings: CompressedTensorsSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if not spec.scale.stored:
            if settings.sparsity and spec == _dense_spec(spec.dtype):
                return None
            return "weights without scales are stored sparse, and this checkpoint isn't"
        weights, inputs = settings.weights, settings.scheme.inputs
        wanted = self.spelling(settings, spec)
        if replace(spec, dtype=wanted.dtype) != wanted:
            return f"the checkpoint holds '{wanted}'"
        if weights.group and shape[1] % weights.group:
            return f"groups of {weights.group} don't divide {shape[1]} inputs"
        if inputs and inputs.group and shape[1] % inputs.group:
            return f"groups of {inputs.group} of the activations don't divide {shape[1]} inputs"
        return None

    def _spec_in(
        self, settings: CompressedTensorsSettings, tensors: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> QuantSpec:
        scale = tensors["weight_scale"]
        inputs = tensors.get("input_scale")
        spec = spec_of(
            settings.scheme,
            scale.dtype if scale.dtype in SCALE_DTYPES else torch.bfloat16,
            input_scale_dtype=inputs.dtype if inputs is not None and inputs.dtype in SCALE_DTYPES else None,
            permuted=_is_permuted(settings, tensors.get("weight_g_idx"), shape),
        )
        if reason := self.refusal(settings, replace(spec, grouping=replace(spec.grouping, permuted=False)), shape):
            raise FormatError(f"no weight of this scheme has this shape: {reason}", found=list(shape))
        if spec.zero is None and (zeros := tensors.get("weight_zero_point")) is not None and bool(zeros.any()):
            raise FormatError("the scheme is symmetric, but there are zero points", tensor="weight_zero_point")
        return spec


def flatten(config: Json) -> Json:
    """The configuration, taken out of the ``quantization_config`` that older files put it in."""
    nested = config.get("quantization_config")
    if not isinstance(nested, Mapping):
        return config
    outer = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**outer, **nested}


def _parse_groups(groups: object) -> tuple[Scheme, ...]:
    if groups is None:
        return ()
    if not isinstance(groups, Mapping):
        raise FormatError("config_groups is not an object", found=repr(groups)[:80])
    return tuple(
        preset(name, names_of(group, f"config_groups.{name}"))
        if isinstance(group, list | tuple)
        else parse_scheme(group, f"config_groups.{name}")
        for name, group in groups.items()
    )


def _check_format(settings: CompressedTensorsSettings) -> None:
    """Raise a FormatError where format and scheme contradict each other, or the scheme has no spec."""
    weights, spelled = settings.weights, settings.module_format
    spec_of(settings.scheme)
    fits = {
        "pack-quantized": weights.kind == "int",
        "int-quantized": weights.kind == "int",
        "float-quantized": weights.kind == "float" and weights.bits == 8 and not weights.exponents,
        "naive-quantized": weights.kind == "int" or (weights.bits == 8 and not weights.exponents),
        "nvfp4-pack-quantized": weights.strategy == "tensor_group",
        "mxfp4-pack-quantized": weights.exponents and weights.bits == 4,
        "mxfp6-pack-quantized": weights.exponents and weights.bits == 6,
        "mxfp8-quantized": weights.exponents and weights.bits == 8,
    }[spelled]
    if not fits:
        raise FormatError(
            "the scheme is none of this format", found=f"{weights.bits}-bit {weights.kind}", expected=spelled
        )


def _dense_spec(dtype: torch.dtype) -> QuantSpec:
    """A weight that is stored without its zeros and else as it is."""
    return QuantSpec(FloatCode(dtype), Scale(dtype, stored=False), Grouping.per_tensor(), dtype=dtype)


def _plain_dtype(weights: Args) -> torch.dtype:
    return torch.int8 if weights.kind == "int" else torch.float8_e4m3fn


def _shape(settings: CompressedTensorsSettings, tensors: Mapping[str, Tensor], codes: Tensor) -> tuple[int, int]:
    rows, cols = codes.shape
    spelled, bits = settings.module_format, settings.weights.bits
    if spelled in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized"):
        return rows, cols * 8 // bits
    if spelled != "pack-quantized":
        return rows, cols
    require_tensors(tensors, ("weight_shape",))
    stored = tensors["weight_shape"]
    require_tensor("weight_shape", stored, shape=(2,), dtypes=(torch.int64, torch.int32))
    outputs, inputs = stored.tolist()
    widths = {packing.words_of(inputs, bits), packing.padded_words_of(inputs, bits)} if inputs > 0 else set()
    if outputs != rows or cols not in widths:
        raise FormatError("the packed weight is not of this shape", tensor="weight_shape", found=[outputs, inputs],
                          expected=f"{rows} rows and what {cols} words of {bits}-bit values hold")  # fmt: skip
    return outputs, inputs


def _weight_layout(settings: CompressedTensorsSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
    rows, cols = shape
    counts = spec.grouping.counts(shape)
    weights, spelled = settings.weights, settings.module_format
    if spelled == "pack-quantized":
        codes: TensorLayout = {
            "weight_packed": ((rows, packing.words_of(cols, spec.bits)), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
    elif spelled in _STORED:
        codes = {"weight_packed": ((rows, packed_bytes(cols, spec.bits)), torch.uint8)}
    else:
        codes = {"weight": (shape, _plain_dtype(weights))}
    scale = torch.uint8 if spec.scale.dtype == torch.float8_e8m0fnu else spec.scale.dtype
    per_group = (1,) if weights.strategy == "tensor" else counts
    codes["weight_scale"] = (per_group, torch.float8_e4m3fn if spec.scale.second else scale)
    if spec.scale.second:
        codes["weight_global_scale"] = ((1,), torch.float32)
    if spec.zero is not None and _packs_zeros(settings):
        codes["weight_zero_point"] = ((packing.words_of(rows, spec.bits), counts[1]), torch.int32)
    elif spec.zero is not None:
        codes["weight_zero_point"] = (per_group, torch.int8)
    if weights.actorder:
        codes["weight_g_idx"] = ((cols,), torch.int32)
    return codes


def _activation_layout(spec: QuantSpec) -> TensorLayout:
    names = {"input_zero": "input_zero_point"}
    return {names.get(name, name): entry for name, entry in spec.activation.tensors().items()}


def _packs_zeros(settings: CompressedTensorsSettings) -> bool:
    return settings.module_format == "pack-quantized" and settings.weights.strategy in _PACKED_ZEROS


def _check_shapes(tensors: Mapping[str, Tensor], layout: TensorLayout) -> None:
    """Raise a FormatError unless all tensors are there; words may be padded, single numbers of any form."""
    require_tensors(tensors, [name for name in layout if name != "weight_g_idx"])
    for name, (shape, dtype) in layout.items():
        if name in ("weight_shape", "weight_packed") or name not in tensors:
            continue
        found = tensors[name]
        if name == "output_scale":
            dtype = found.dtype if found.dtype in SCALE_DTYPES else dtype
        if name == "weight_g_idx" and found.dtype == torch.int64:
            dtype = torch.int64
        if shape == (1,) and found.numel() == 1 and found.dim() <= 2:
            shape = tuple(found.shape)
        if name == "weight_zero_point" and dtype == torch.int32:
            require_tensor(name, found, dtypes=(dtype,), dims=2)
            require_tensor(name, found, shape=(found.shape[0], shape[1]))
        else:
            require_tensor(name, found, shape=shape, dtypes=(dtype,))


def _is_permuted(settings: CompressedTensorsSettings, index: Tensor | None, shape: tuple[int, int]) -> bool:
    """Whether a group index says anything else than that the groups are consecutive; -1 throughout says nothing."""
    weights = settings.weights
    if index is None or not weights.group:
        return False
    require_tensor("weight_g_idx", index, shape=(shape[1],), dtypes=(torch.int32, torch.int64))
    low, high, groups = int(index.min()), int(index.max()), -(-shape[1] // weights.group)
    if low == high == -1:
        return False
    if low < 0 or high >= groups:
        raise FormatError("a column's group is out of range", tensor="weight_g_idx", found=f"{low}..{high}",
                          expected=f"0..{groups - 1}")  # fmt: skip
    plain = torch.arange(shape[1], dtype=index.dtype, device=index.device) // weights.group
    if torch.equal(index, plain):
        return False
    if not weights.actorder:
        raise FormatError("there is a group index, but the scheme has no actorder", tensor="weight_g_idx",
                          found="actorder: null", expected="actorder: group")  # fmt: skip
    return True


def _read_codes(settings: CompressedTensorsSettings, spec: QuantSpec, codes: Tensor, shape: tuple[int, int]) -> Tensor:
    if settings.module_format == "pack-quantized":
        stream = packing.to_stream("weight_packed", codes, shape[1], spec.bits)
        if spec.zero is not None:
            return stream
        stream = packing.flip_sign(stream, shape[1], spec.bits)
        return stream.view(torch.int8) if spec.bits == 8 else stream
    if isinstance(spec.code, IntCode):
        return packing.from_int8("weight", codes, spec.bits, signed=spec.code.signed)
    return codes


def _write_codes(settings: CompressedTensorsSettings, spec: QuantSpec, codes: Tensor, shape: tuple[int, int]) -> Tensor:
    if settings.module_format == "pack-quantized":
        stream = codes.view(torch.uint8)
        return packing.to_words(stream if spec.zero else packing.flip_sign(stream, shape[1], spec.bits))
    if isinstance(spec.code, IntCode):
        return packing.to_int8(codes, shape[1], spec.bits, signed=spec.code.signed)
    return codes


def _read_scales(spec: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    scales = tensors["weight_scale"].reshape(spec.grouping.counts(shape))
    own = {"scales": scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales}
    if spec.scale.second:
        own["super_scales"] = tensors["weight_global_scale"].reshape(1)
    if isinstance(spec.code, TableCode):
        own["table"] = torch.tensor(TABLES[spec.bits][1], dtype=torch.float32, device=scales.device)
    return own


def _write_scales(settings: CompressedTensorsSettings, spec: QuantSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(spec.code, TableCode):
        table = torch.tensor(TABLES[spec.bits][1], device=own["table"].device)
        if not torch.equal(own["table"], table):
            raise FormatError("the table is not that of the format", tensor="table", expected=spec.code.name)
    scales = own["scales"]
    if settings.weights.strategy == "tensor":
        scales = scales.reshape(1)
    written = {"weight_scale": scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales}
    if spec.scale.second:
        written["weight_global_scale"] = own["super_scales"]
    return written


def _read_zeros(settings: CompressedTensorsSettings, spec: QuantSpec, zeros: Tensor, shape: tuple[int, int]) -> Tensor:
    if _packs_zeros(settings):
        return packing.read_packed_zeros(zeros, shape[0], spec.bits)
    zeros = zeros.reshape(spec.grouping.counts(shape))
    return packing.from_int8("weight_zero_point", zeros, spec.bits, signed=False)


def _write_zeros(settings: CompressedTensorsSettings, spec: QuantSpec, zeros: Tensor, shape: tuple[int, int]) -> Tensor:
    groups = spec.grouping.counts(shape)[1]
    if _packs_zeros(settings):
        return packing.write_packed_zeros(zeros, groups, spec.bits)
    plain = packing.to_int8(zeros, groups, spec.bits, signed=False)
    return plain.reshape(1) if settings.weights.strategy == "tensor" else plain


def _read_activations(spec: QuantSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if spec.activation.symmetric and (zero := tensors.get("input_zero_point")) is not None and bool(zero.any()):
        raise FormatError("the scheme is symmetric, but there is a zero point", tensor="input_zero_point")
    names = {"input_zero": "input_zero_point"}
    return {
        name: tensors[names.get(name, name)].reshape(1).to(dtype)
        for name, (_, dtype) in spec.activation.tensors().items()
    }


def _write_activations(spec: QuantSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {"input_zero": "input_zero_point"}
    return {names.get(name, name): own[name] for name in spec.activation.tensors()}
