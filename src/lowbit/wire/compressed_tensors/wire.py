"""compressed-tensors: one wire for all of its formats; a module's scheme says how its tensors are read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lowbit.core import QuantSpec, QuantTensor
from lowbit.core.packing import packed_bytes
from lowbit.core.spec import TensorLayout
from lowbit.errors import FormatError
from lowbit.wire.base import Json, Wire, require_tensor, require_tensors
from lowbit.wire.compressed_tensors import layout as parts
from lowbit.wire.compressed_tensors.schemes import (
    PRESETS,
    QUANTIZED,
    UNSPECIFIC,
    Scheme,
    names_of,
    parse_args,
    parse_sparsity,
    preset,
)
from lowbit.wire.compressed_tensors.settings import CompressedTensorsSettings, check_format, flatten, parse_groups
from lowbit.wire.compressed_tensors.sparse import SUFFIXES as SPARSE_SUFFIXES
from lowbit.wire.compressed_tensors.sparse import is_sparse, read_sparse, write_sparse
from lowbit.wire.compressed_tensors.specs import SCALE_DTYPES, scheme_of, spec_of
from lowbit.wire.compressed_tensors.targets import first_match, is_ignored

METHOD: Final = "compressed-tensors"
# Scales and zero points of what attention computes and caches; they belong to no weight.
KV_ENDINGS: Final = tuple(f".{part}_{kind}" for part in "qkv" for kind in ("scale", "zero_point", "global_scale"))


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
    # The first versions stored the scales of a cache with the layers whose outputs it holds.
    kept: ClassVar[tuple[str, ...]] = (*KV_ENDINGS, ".k_proj.output_scale", ".v_proj.output_scale")

    def detect(self, config: Json) -> bool:
        method = config.get("quant_method")
        if method is None and isinstance(nested := config.get("quantization_config"), Mapping):
            method = nested.get("quant_method", METHOD if "config_groups" in nested else None)
        return method == METHOD

    def modules(self, names: Collection[str]) -> list[str]:
        endings = (".weight_scale", ".bitmask")
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(endings)))

    def check_names(self, others: Collection[str]) -> None:
        scales = [name for name in others if name.endswith(KV_ENDINGS)]
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
            parse_groups(config.get("config_groups")),
            names_of(config.get("ignore") or (), "ignore"),
            spelled,
            parse_args(config.get("kv_cache_scheme"), "kv_cache_scheme"),
            parse_sparsity(config.get("sparsity_config")),
        )
        for scheme in settings.schemes:
            if scheme.weights is not None:
                check_format(replace(settings, schemes=(scheme,)))
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
        check_format(varied)
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
            return parts.dense_spec(torch.bfloat16)
        return spec_of(settings.scheme)

    def expected(self, settings: CompressedTensorsSettings, spec: QuantSpec, shape: tuple[int, int]) -> TensorLayout:
        """As in :meth:`Wire.expected`; of sparse weights, whose size is in their numbers, the scales alone."""
        layout: TensorLayout = {}
        if settings.schemes:
            layout = parts.weight_layout(settings, spec, shape) | parts.activation_layout(spec)
        if settings.sparsity:
            layout.pop("weight", None)
            layout["bitmask"] = ((shape[0], packed_bytes(shape[1], 1)), torch.uint8)
        return layout

    def read(self, settings: CompressedTensorsSettings, tensors: Mapping[str, Tensor]) -> QuantTensor:
        if is_sparse(tensors):
            weight = read_sparse(tensors)
            if "weight_scale" not in tensors and weight.dtype in SCALE_DTYPES:
                spec = parts.dense_spec(weight.dtype)
                return QuantTensor(spec, {"codes": weight}, (weight.shape[0], weight.shape[1])).validate()
            tensors = {**{name: tensors[name] for name in set(tensors) - set(SPARSE_SUFFIXES)}, "weight": weight}
        stored, dtype = parts.STORED.get(settings.module_format, ("weight", parts.plain_dtype(settings.weights)))
        require_tensors(tensors, (stored, "weight_scale"))
        require_tensor(stored, tensors[stored], dtypes=(dtype,), dims=2)
        shape = parts.shape_of(settings, tensors, tensors[stored])
        spec = self._spec_in(settings, tensors, shape)
        parts.check_shapes(tensors, self.expected(replace(settings, sparsity=None), spec, shape))
        own = {
            "codes": parts.read_codes(settings, spec, tensors[stored], shape),
            **parts.read_scales(spec, tensors, shape),
        }
        if spec.zero is not None:
            own["zeros"] = parts.read_zeros(settings, spec, tensors["weight_zero_point"], shape)
        if spec.grouping.permuted:
            own["group_index"] = tensors["weight_g_idx"].to(torch.int32)
        return QuantTensor(spec, own | parts.read_activations(spec, tensors), shape).validate()

    def write(self, settings: CompressedTensorsSettings, tensor: QuantTensor) -> dict[str, Tensor]:
        if reason := self.refusal(settings, tensor.spec, tensor.shape):
            raise FormatError(f"compressed-tensors can't spell this weight: {reason}", found=tensor.spec)
        spec, own, shape = tensor.spec, tensor.tensors, tensor.shape
        quarters = settings.sparsity is not None and settings.sparsity.format == "sparse-24-bitmask"
        if not spec.scale.stored:
            return write_sparse(own["codes"], quarters)
        stored, _ = parts.STORED.get(settings.module_format, ("weight", torch.int8))
        written = {
            stored: parts.write_codes(settings, spec, own["codes"], shape),
            **parts.write_scales(settings, spec, own),
        }
        if settings.module_format == "pack-quantized":
            written["weight_shape"] = torch.tensor(shape, device=tensor.device)
        if spec.zero is not None:
            written["weight_zero_point"] = parts.write_zeros(settings, spec, own["zeros"], shape)
        if settings.weights.actorder:
            plain = torch.arange(shape[1], dtype=torch.int32, device=tensor.device) // settings.weights.group
            written["weight_g_idx"] = own.get("group_index", plain)
        if settings.sparsity and stored == "weight":
            written |= write_sparse(written.pop("weight"), quarters)
        return written | parts.write_activations(spec, own)

    def refusal(self, settings: CompressedTensorsSettings, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if not spec.scale.stored:
            if settings.sparsity and spec == parts.dense_spec(spec.dtype):
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
            permuted=parts.is_permuted(settings, tensors.get("weight_g_idx"), shape),
        )
        if reason := self.refusal(settings, replace(spec, grouping=replace(spec.grouping, permuted=False)), shape):
            raise FormatError(f"no weight of this scheme has this shape: {reason}", found=list(shape))
        if spec.zero is None and (zeros := tensors.get("weight_zero_point")) is not None and bool(zeros.any()):
            raise FormatError("the scheme is symmetric, but there are zero points", tensor="weight_zero_point")
        return spec
