"""GPTQ beyond one layout for all: settings per module, the layout of the Marlin kernel, names of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.algorithms import RoundToNearest
from lowbit.core import QuantTensor, integer_spec
from lowbit.errors import FormatError
from lowbit.wire import GptqWire
from lowbit.wire.gptq import GptqSettings

GPTQ = GptqWire()
BASE: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def marlin_weight(group_size: int, shape: tuple[int, int] = (256, 256)) -> QuantTensor:
    return RoundToNearest(symmetric=True).quantize(torch.randn(shape), integer_spec(4, group_size))


def test_the_first_rule_that_matches_at_the_start_decides() -> None:
    dynamic = {
        r"-:.*\.0\..*gate": {},
        r"+:.*down_proj": {"bits": 8, "group_size": 32, "damp_percent": 0.1},
        r".*\.1\.": {"sym": False},
        r".*": {"bits": 2},
    }
    settings = GPTQ.parse({**BASE, "dynamic": dynamic})
    assert GPTQ.of(settings, "layers.0.down_proj") == GptqSettings(8, 32, borrows=False)
    assert GPTQ.of(settings, "layers.1.down_proj").bits == 8
    assert not GPTQ.of(settings, "layers.1.up_proj").symmetric
    assert GPTQ.of(settings, "layers.2.up_proj").bits == 2
    assert settings.rule_of("layers.0.gate_proj") == (r"-:.*\.0\..*gate", None)
    assert GPTQ.parse(GPTQ.config(settings)) == settings


@pytest.mark.parametrize(
    "dynamic",
    [[], {"(": {}}, {".*": 4}, {".*": {"bits": 5}}, {".*": {"group_size": 0}}, {r"(a)\1": {}}, {"x" * 2000: {}}],
)
def test_a_dynamic_that_says_nothing_is_refused(dynamic: Any) -> None:
    with pytest.raises(FormatError):
        GPTQ.parse({**BASE, "dynamic": dynamic})


def test_a_catastrophic_expression_is_matched_like_any_other() -> None:
    settings = GPTQ.parse({**BASE, "dynamic": {"(a+)+$": {"bits": 8}}})
    assert GPTQ.of(settings, "a" * 200 + "!").bits == 4


def test_modules_with_different_settings_become_rules() -> None:
    own = {"a.x": GptqSettings(4), "a.y": GptqSettings(4), "a.z": GptqSettings(8, 32)}
    joined = GPTQ.join(own, ["a.w"])
    assert {module: GPTQ.of(joined, module) for module in own} == own
    assert joined.rule_of("a.w") == (r"-:^a\.w$", None)
    assert joined.rule_of("a.w2") is None
    with pytest.raises(FormatError, match="one version"):
        GPTQ.join({"a": GptqSettings(4), "b": GptqSettings(4, version=2)}, [])


@pytest.mark.parametrize("spelled", ["exllama", "exllamav2", "ipex", "marlin"])
def test_names_of_kernels_mean_version_1(spelled: str) -> None:
    settings = GPTQ.parse({**BASE, "checkpoint_format": spelled})
    tensor = marlin_weight(128)
    written = GPTQ.write(GptqSettings(4, 128, borrows=False), tensor)
    assert GPTQ.read(settings, written).equal(tensor)


@pytest.mark.parametrize("group_size", [128, -1])
def test_the_layout_of_marlin_is_read_back(group_size: int) -> None:
    settings = GPTQ.parse({**BASE, "group_size": group_size, "is_marlin_format": True})
    assert GPTQ.parse(GPTQ.config(settings)) == settings
    tensor = marlin_weight(group_size)
    written = GPTQ.write(settings, tensor)
    assert {name: (tuple(value.shape), value.dtype) for name, value in written.items()} == GPTQ.expected(
        settings, tensor.spec, tensor.shape
    )
    assert GPTQ.read(settings, written).equal(tensor)
    assert GPTQ.modules(["a.B", "a.s", "b.qweight", "c.weight"]) == ["a", "b"]


def test_what_marlin_cannot_hold() -> None:
    settings = GptqSettings(4, 128, marlin=True)
    with pytest.raises(FormatError, match="not symmetric"):
        GPTQ.write(settings, RoundToNearest().quantize(torch.randn(256, 128), integer_spec(4, 128)))
    for size, shape, reason in ((64, (256, 128), "groups of 128"), (128, (128, 128), "multiple of 256 x 128")):
        refusal = GPTQ.refusal(GptqSettings(4, size, marlin=True), integer_spec(4, size), shape)
        assert refusal is not None and reason in refusal


def test_marlin_tensors_that_do_not_fit_are_refused() -> None:
    settings = GptqSettings(4, 128, marlin=True)
    written = GPTQ.write(settings, marlin_weight(128))
    broken = [
        {"B": written["B"]},
        {**written, "s": written["s"][:1]},
        {**written, "B": written["B"][:-1]},
        {**written, "B": written["B"].to(torch.int64)},
        {**written, "s": written["s"].float()},
    ]
    for tensors in broken:
        with pytest.raises(FormatError):
            GPTQ.read(settings, tensors)
    for undeclared in (GptqSettings(4, 128), GptqSettings(8, 128, marlin=True)):
        with pytest.raises(FormatError, match="packed for the Marlin kernel"):
            GPTQ.read(undeclared, written)
