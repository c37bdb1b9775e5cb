from __future__ import annotations

import pytest
import torch

from lowbit.core import Activation, Grouping, IntCode, QuantSpec, Scale, SecondLevel, TableCode, Zero
from lowbit.errors import FormatError, SpecError

NESTED = SecondLevel("table", 256, offset=True)
K_QUANT = SecondLevel("integer", 8, torch.float16, bits=6)
NVFP4 = SecondLevel("float8", 0)

SPECS = [
    QuantSpec(IntCode(4), Scale(torch.float16), Grouping.groups(128), Zero("integer", 4)),
    QuantSpec(IntCode(3), Scale(torch.bfloat16), Grouping.groups(64, permuted=True), Zero("integer", 3)),
    QuantSpec(
        IntCode(8, signed=True), Scale(torch.float32, 1 / 127), Grouping.per_channel(), None, Activation("int8", 6.0)
    ),
    QuantSpec(TableCode("nf4"), Scale(torch.float32, second=NESTED), Grouping.flat_blocks(64), dtype=torch.bfloat16),
    QuantSpec(IntCode(4), Scale(torch.float32, second=K_QUANT), Grouping.groups(32), Zero("additive", second=K_QUANT)),
    QuantSpec(TableCode("fp4"), Scale(torch.float32, second=NVFP4), Grouping.groups(16)),
    QuantSpec(IntCode(2), Scale(torch.float16), Grouping.per_tensor(), Zero("float"), rounding="each"),
    QuantSpec(IntCode(8), Scale(torch.float32), Grouping(128, 128)),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_json_gives_the_same_spec_back(spec: QuantSpec) -> None:
    assert QuantSpec.from_json(spec.to_json()) == spec
    assert hash(QuantSpec.from_json(spec.to_json())) == hash(spec)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"code": 3}', "[" * 100_000, SPECS[0].to_json().replace("float16", "load")],
)
def test_any_other_text_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        QuantSpec.from_json(text)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(FormatError, match="unknown fields in Grouping"):
        QuantSpec.from_json(SPECS[0].to_json().replace('"cols"', '"columns"'))


@pytest.mark.parametrize(
    "build",
    [
        lambda: IntCode(0),
        lambda: IntCode(9),
        lambda: IntCode(True),
        lambda: TableCode("x", 9),
        lambda: Zero("integer"),
        lambda: Zero("other"),  # type: ignore[arg-type]
        lambda: Grouping(rows=-1),
        lambda: Grouping(rows=2, cols=4, flat=True),
        lambda: Grouping(cols=4, flat=True, permuted=True),
        lambda: Activation("int8", -1.0),
        lambda: SecondLevel("table", -1),
        lambda: QuantSpec(TableCode("nf4"), Scale(torch.float16), Grouping.per_channel(), Zero("integer", 4)),
    ],
)
def test_what_has_no_meaning_is_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(SpecError):
        build()


def test_the_tensors_of_a_spec() -> None:
    assert SPECS[0].tensors((64, 256)) == {
        "codes": ((64, 128), torch.uint8),
        "scales": ((64, 2), torch.float16),
        "zeros": ((64, 1), torch.uint8),
    }
    assert SPECS[3].tensors((64, 256)) == {
        "codes": ((8192,), torch.uint8),
        "table": ((16,), torch.float32),
        "scales": ((256,), torch.uint8),
        "super_scales": ((1,), torch.float32),
        "super_scales_table": ((256,), torch.float32),
        "super_scales_offset": ((1,), torch.float32),
    }
    assert SPECS[1].tensors((10, 130))["group_index"] == ((130,), torch.int32)
    assert SPECS[7].tensors((200, 300))["scales"] == ((2, 3), torch.float32)
