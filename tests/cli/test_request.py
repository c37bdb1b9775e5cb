"""Which options go together, and which config they make."""

from __future__ import annotations

from typing import Any

import pytest

from lowbit.cli.request import Format, Method, Request
from lowbit.errors import PlanError


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "nf4", "format": "gptq"}, "nf4 is written as bitsandbytes, not as gptq"),
        ({"method": "int8", "format": "awq"}, "int8 is written as bitsandbytes, not as awq"),
        ({"method": "rtn", "format": "bitsandbytes"}, "rtn is written as gptq or awq or .* not as bitsandbytes"),
        ({"method": "nf4", "bits": 3}, "nf4 has 4 bits, not 3"),
        ({"method": "int8", "bits": 4}, "int8 has 8 bits, not 4"),
        ({"method": "rtn", "bits": 5}, "gptq has 2 or 3 or 4 or 8 bits, not 5"),
        ({"method": "rtn", "bits": 0}, "gptq has 2 or 3 or 4 or 8 bits, not 0"),
        ({"method": "rtn", "bits": 3, "format": "awq"}, "awq has 4 bits, not 3"),
        ({"method": "fp4", "group_size": 128}, "fp4 has blocks of 64, not of 128"),
        ({"method": "int8", "group_size": 64}, "no group size"),
        ({"method": "rtn", "group_size": 0}, "not 0"),
        ({"method": "rtn", "group_size": -2}, "not -2"),
        ({"method": "nf4", "symmetric": True}, "neither --symmetric nor --asymmetric"),
        ({"method": "int8", "symmetric": False}, "int8 is symmetric"),
        ({"method": "rtn", "double_quant": True}, "--double-quant is for nf4 and fp4, not for rtn"),
        ({"method": "int8", "double_quant": True}, "--double-quant is for nf4 and fp4, not for int8"),
        ({"method": "fp8", "format": "gptq"}, "fp8 is written as fbgemm_fp8 or .* not as gptq"),
        ({"method": "fp8", "bits": 4}, "fp8 has 8 bits, not 4"),
        ({"method": "hqq", "format": "awq"}, "hqq is written as hqq, not as awq"),
        ({"method": "hqq", "bits": 5}, "hqq has 1 or 2 or 3 or 4 or 8 bits, not 5"),
        ({"method": "hqq", "symmetric": True}, "hqq is asymmetric"),
        ({"method": "rtn", "format": "eetq", "group_size": 128}, "no group size"),
        ({"method": "rtn", "format": "quanto", "bits": 3}, "quanto has 2 or 4 or 8 bits, not 3"),
        ({"method": "rtn", "format": "quanto", "bits": 8, "symmetric": False}, "quanto is symmetric"),
        ({"method": "rtn", "format": "torchao", "bits": 4, "group_size": 48}, "groups of 32 or 64 or 128 or 256"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        _request(**options).config()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "rtn"}, {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}),
        ({"method": "rtn", "symmetric": True, "bits": 8, "group_size": -1}, {"bits": 8, "group_size": -1, "sym": True}),
        ({"method": "rtn", "skip": ("q_proj",)}, {"modules_to_not_convert": ["q_proj"]}),
        ({"method": "rtn", "format": "awq"}, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}),
        ({"method": "rtn", "format": "awq", "symmetric": True}, {"zero_point": False}),
        ({"method": "rtn", "format": "awq", "skip": ("q_proj",)}, {"modules_to_not_convert": ["q_proj"]}),
        ({"method": "nf4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}),
        ({"method": "fp4", "double_quant": True}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
        ({"method": "nf4", "compute_dtype": "bfloat16"}, {"bnb_4bit_compute_dtype": "bfloat16"}),
        ({"method": "nf4", "bits": 4, "group_size": 64, "format": "bitsandbytes"}, {"load_in_4bit": True}),
        ({"method": "int8", "symmetric": True, "skip": ("a", "b")}, {"llm_int8_skip_modules": ["a", "b"]}),
        ({"method": "hqq", "bits": 3}, {"quant_method": "hqq", "skip_modules": ["lm_head"]}),
        ({"method": "fp8", "skip": ("a",)}, {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["a"]}),
        ({"method": "fp8", "format": "compressed-tensors"}, {"quant_method": "compressed-tensors"}),
        ({"method": "fp8", "format": "torchao"}, {"quant_method": "torchao"}),
        ({"method": "fp8", "format": "quanto"}, {"quant_method": "quanto", "weights": "float8"}),
        ({"method": "rtn", "format": "eetq"}, {"quant_method": "eetq", "weights": "int8"}),
        ({"method": "rtn", "format": "quanto"}, {"weights": "int4"}),
        ({"method": "rtn", "format": "compressed-tensors", "bits": 5}, {"ignore": ["lm_head"]}),
        (
            {"method": "rtn", "format": "compressed-tensors", "skip": ("*.0.*", "q_proj")},
            {"ignore": ["lm_head", r"re:.*\.0\..*$", r"re:(?:(?:.*\.)?q_proj$|q_proj\.)"]},
        ),
        ({"method": "rtn", "format": "torchao"}, {"quant_method": "torchao"}),
    ],
)
def test_config(options: dict[str, Any], expected: dict[str, Any]) -> None:
    data = _request(**options).config().to_dict()
    assert {key: data[key] for key in expected} == expected


def _request(method: str, format: str | None = None, **options: Any) -> Request:
    return Request(Method(method), format=Format(format) if format else None, **options)
