"""Which type each tensor gets, against what llama.cpp said of the same models (``llama_cpp_mixtures.py``)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import PlanError
from lowbit.wire.gguf import MIXTURES, ModelFacts, mixture
from lowbit.wire.gguf.mixtures import NEED_IMPORTANCE

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("llama_cpp_mixtures.json").read_text(encoding="utf-8"))
MODELS: dict[str, Any] = RECORDED["models"]
OURS = {"F32", "F16", "BF16", "MXFP4", "NVFP4", "Q1_0", "Q3_K", "Q4_K", "Q5_K"}  # not recorded, and aliases


def recorded(types: str) -> list[str]:
    """``Q6_K*2 Q4_K*1`` -> Q6_K, Q6_K, Q4_K."""
    return [kind for kind, count in re.findall(r"(\w+)\*(\d+)", types) for _ in range(int(count))]


@pytest.mark.parametrize("importance", [False, True], ids=["alone", "importance"])
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_gets_llama_cpps_type(model: str, importance: bool) -> None:
    facts, shapes = ModelFacts(**MODELS[model]["facts"]), MODELS[model]["shapes"]
    for name, recordings in MODELS[model]["types"].items():
        types = recordings[-1 if importance else 0]
        if not importance and name in NEED_IMPORTANCE:
            continue
        chosen = mixture(name, importance=importance)
        for role, shape in shapes.items():
            expected = recorded(types[role])
            found = [chosen(role.format(layer), tuple(shape), facts).name for layer in range(len(expected))]
            assert found == expected, (name, role)


def test_what_llama_cpp_refuses_without_importance_is_refused() -> None:
    """But for rows that hold none of the types in question, where nothing is left that would need it."""
    refused = {name for model in MODELS.values() for name, types in model["types"].items() if types[0] is None}
    assert refused == set(NEED_IMPORTANCE)
    for name in refused:
        with pytest.raises(PlanError, match=f"gguf:{name} --dataset FILE"):
            mixture(name)


def test_every_mixture_is_recorded_under_its_number() -> None:
    assert set(RECORDED["file_types"]) == set(MIXTURES) - OURS
    assert {name: mixture(name, importance=True).file_type for name in RECORDED["file_types"]} == RECORDED["file_types"]
