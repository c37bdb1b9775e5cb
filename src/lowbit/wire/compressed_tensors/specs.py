"""Schemes as specs, and specs as schemes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch

from lowbit.core import (
    Activation,
    FloatCode,
    Grouping,
    IntCode,
    QuantSpec,
    Scale,
    SecondLevel,
    TableCode,
    Zero,
)
from lowbit.core.tables import E2M1, E2M3
from lowbit.errors import FormatError
from lowbit.wire.compressed_tensors.schemes import Args, Scheme

TABLES: Final = {4: ("e2m1", E2M1), 6: ("e2m3", E2M3)}
SCALE_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_GLOBAL: Final = SecondLevel("float8", 0, torch.float32, divides=True)


def spec_of(
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.bfloat16,
    *,
    input_scale_dtype: torch.dtype | None = None,
    permuted: bool = False,
) -> QuantSpec:
    """What a scheme says of a weight.

    Args:
        scale_dtype: of its scales, where the scheme leaves that to the file; weights dequantize to it, those with
            scales of 8 bits to bf16.
        input_scale_dtype: of a stored scale of the inputs.
        permuted: whether there is a group index.

    Raises:
        FormatError: the scheme is of a kind that has no meaning, or that lowbit doesn't run.
    """
    weights = scheme.weights
    if weights is None:
        raise FormatError("this scheme quantizes no weights", found=list(scheme.targets))
    scale = _scale(weights, scale_dtype)
    return QuantSpec(
        code=_code(weights),
        scale=scale,
        grouping=_grouping(weights, permuted),
        zero=None if weights.symmetric else Zero("integer", weights.bits),
        activation=_activation(scheme, input_scale_dtype or scale_dtype),
        dtype=scale_dtype if scale.second is None and scale.dtype in SCALE_DTYPES else torch.bfloat16,
    )


def scheme_of(spec: QuantSpec) -> Scheme:
    """The scheme that says what a spec does.

    Raises:
        FormatError: there is none; says why.
    """
    weights = _args_of(spec)
    inputs = _inputs_of(spec.activation)
    outputs = replace(inputs, strategy="tensor", group=0, dynamic="no") if inputs and spec.activation.outputs else None
    scheme = Scheme(weights=weights, inputs=inputs, outputs=outputs)
    # What the parts above don't look at (a multiplier, the rounding, a floor of the scales) shows here.
    dtype = spec.scale.dtype if spec.scale.dtype in SCALE_DTYPES else torch.bfloat16
    again = spec_of(scheme, dtype, input_scale_dtype=spec.activation.scale_dtype, permuted=weights.actorder)
    if again != replace(spec, dtype=again.dtype):
        raise FormatError("compressed-tensors has no scheme for this weight", found=spec, expected=again)
    return scheme


def _code(args: Args) -> IntCode | FloatCode | TableCode:
    if args.kind == "int":
        return IntCode(args.bits, signed=args.symmetric)
    if not args.symmetric:
        raise FormatError("weights in floating point have no zero points", found="symmetric: false", expected="true")
    return FloatCode(torch.float8_e4m3fn) if args.bits == 8 else TableCode(TABLES[args.bits][0], args.bits)


def _scale(args: Args, dtype: torch.dtype) -> Scale:
    if args.strategy == "tensor_group":
        if args.kind != "float" or args.bits != 4:
            raise FormatError("the strategy 'tensor_group' is of 4-bit floats", found=f"{args.kind}, {args.bits} bits")
        return Scale(torch.float32, second=_GLOBAL)
    if args.exponents:
        return Scale(torch.float8_e8m0fnu)
    if args.kind == "float" and args.bits < 8:
        raise FormatError(f"{args.bits}-bit floats have groups of 32, or of 16 under the strategy 'tensor_group'",
                          found=f"{args.strategy}, {args.group}")  # fmt: skip
    return Scale(dtype)


def _grouping(args: Args, permuted: bool) -> Grouping:
    if args.strategy == "tensor":
        return Grouping.per_tensor()
    if args.strategy == "channel":
        return Grouping.per_channel()
    if args.strategy == "block":
        return Grouping(*args.block)
    return Grouping.groups(args.group, permuted)


def _activation(scheme: Scheme, scale_dtype: torch.dtype) -> Activation:
    """What happens to inputs: the library computes in their dtype and rounds after each operation."""
    args = scheme.inputs
    if args is None:
        if scheme.outputs:
            raise FormatError("outputs are quantized, but inputs are not, which lowbit doesn't do")
        return Activation()
    if args.dynamic == "no" and args.strategy != "tensor":
        raise FormatError("stored scales of inputs are one per tensor", found=args.strategy, expected="tensor")
    if args.strategy not in ("token", "tensor", "group", "tensor_group"):
        raise FormatError("inputs are quantized per token, tensor or group", found=args.strategy)
    if (args.strategy == "tensor_group") != (args.dynamic == "local"):
        raise FormatError("the strategy 'tensor_group' goes with dynamic 'local'", found=args.dynamic)
    if scheme.outputs and scheme.outputs != replace(args, strategy="tensor", group=0, dynamic="no"):
        raise FormatError("outputs are quantized in another way than inputs, which lowbit doesn't do")
    if args.kind == "float" and (not args.symmetric or args.bits == 6):
        raise FormatError(
            "inputs can't be rounded to this", found=f"{args.bits}-bit floats, symmetric {args.symmetric}"
        )
    if args.kind == "int" and (args.bits == 1 or (not args.symmetric and scheme.outputs)):
        raise FormatError("inputs or outputs can't be rounded to this", found=f"{args.bits}-bit integers")
    number = f"int{args.bits}" if args.kind == "int" else {8: "float8_e4m3fn", 4: "float4_e2m1"}[args.bits]
    if args.dynamic == "local":
        scale_dtype = torch.float8_e4m3fn
    elif args.dynamic == "yes":
        scale_dtype = torch.float8_e8m0fnu if args.exponents else torch.float32
    static = args.dynamic == "no"
    return Activation(
        "static" if static else "dynamic",
        number=number,
        per="group" if args.group else "token" if args.strategy == "token" else "tensor",
        size=args.group,
        symmetric=args.symmetric,
        # The range is taken as symmetric, so that both of its ends are reached.
        divisor=((1 << args.bits) - 1) / 2 if args.kind == "int" and args.symmetric and not static else 0.0,
        scale_dtype=scale_dtype,
        rounding="each",
        outputs=scheme.outputs is not None,
    )


def _args_of(spec: QuantSpec) -> Args:
    code, grouping = spec.code, spec.grouping
    if isinstance(code, IntCode):
        if code.signed == (spec.zero is not None):
            raise FormatError("integers are signed without zero points, or unsigned with them", found=spec)
        args = Args(code.bits, "int", symmetric=code.signed)
    elif isinstance(code, FloatCode) and code.dtype == torch.float8_e4m3fn and spec.scale.stored:
        args = Args(8, "float")
    elif isinstance(code, TableCode) and (code.name, code.bits) in (("e2m1", 4), ("e2m3", 6)):
        args = Args(code.bits, "float")
    else:
        raise FormatError("compressed-tensors has integers, e4m3, and the microscaling formats", found=spec)
    if spec.scale.dtype == torch.float8_e8m0fnu:
        args = replace(args, scale_dtype=torch.uint8)
    if spec.scale.second is not None:
        args = replace(args, scale_dtype=torch.float8_e4m3fn)
    return replace(args, **_strategy_of(grouping, two_levels=spec.scale.second is not None))


def _strategy_of(grouping: Grouping, *, two_levels: bool) -> dict[str, Any]:
    if grouping.linear:
        raise FormatError("compressed-tensors has groups of the input axis, rows and blocks", found=grouping)
    if grouping.rows == 0 and grouping.cols == 0:
        return {"strategy": "tensor"}
    if grouping.rows == 1 and grouping.cols == 0:
        return {"strategy": "channel"}
    if grouping.rows == 1:
        strategy = "tensor_group" if two_levels else "group"
        return {"strategy": strategy, "group": grouping.cols, "actorder": grouping.permuted}
    if grouping.rows == 0 or grouping.cols == 0:
        raise FormatError("compressed-tensors has blocks with two sides", found=grouping)
    return {"strategy": "block", "block": (grouping.rows, grouping.cols)}


def _inputs_of(policy: Activation) -> Args | None:
    if policy.kind == "none":
        return None
    if policy.kind == "int8":
        raise FormatError("compressed-tensors has no outlier columns", found=policy)
    bits = int(policy.number[3:]) if policy.number.startswith("int") else 4 if policy.number == "float4_e2m1" else 8
    args = Args(bits, "int" if policy.number.startswith("int") else "float", symmetric=policy.symmetric)
    if policy.kind == "static":
        return args
    if policy.scale_dtype == torch.float8_e4m3fn:
        return replace(
            args, strategy="tensor_group", group=policy.size, dynamic="local", scale_dtype=torch.float8_e4m3fn
        )
    if policy.scale_dtype == torch.float8_e8m0fnu:
        args = replace(args, scale_dtype=torch.uint8)
    strategy = {"token": "token", "tensor": "tensor", "group": "group"}[policy.per]
    return replace(args, strategy=strategy, group=policy.size, dynamic="yes")
