"""Keys of a configuration that nobody knows: said, and otherwise of no consequence."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from lowbit.integrations.transformers.auto import _as_object
from lowbit.integrations.transformers.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

import formats


def stored(name: str) -> dict[str, object]:
    """The config of a format as it stands in config.json."""
    data = formats.AQLM if name == "aqlm" else formats.CONFIGS[name]().to_dict()
    return json.loads(json.dumps(data, default=str))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_unknown_key_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        _as_object(stored(name))
        assert caplog.messages == []
        _as_object({**stored(name), "frobnicate": 3})
    assert len(caplog.messages) == 1
    assert "frobnicate" in caplog.messages[0]
    assert len(caplog.messages[0]) < 400


def test_every_method_is_asked() -> None:
    assert {name.partition("-")[0] for name in formats.FORMATS} | {"compressed-tensors"} >= {
        name.partition("-")[0] for name in METHODS
    }


@pytest.mark.parametrize(
    "data",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "static_groups": False, "lm_head": False,
         "model_name_or_path": "x", "model_file_base_name": "model", "pack_dtype": "int32", "meta": {"uri": "u"}},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "gemm"},
    ],
    ids=["autogptq", "llm-awq"],
)  # fmt: skip
def test_what_other_writers_leave_is_known(data: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        _as_object(data)
    assert caplog.messages == []
