"""GPTQ's list of modules that stay dense, which Transformers doesn't have and GPTQModel calls ``dynamic``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.errors import FormatError
from lowbit.nn import QuantLinear

DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(4)]


def _load(path: Path, config: Any = None) -> Any:
    kwargs = {} if config is None else {"quantization_config": config}
    return lowbit.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def _dense(model: Any) -> list[str]:
    return [
        name for name, module in model.named_modules() if name[-5:] == "_proj" and not isinstance(module, QuantLinear)
    ]


def _stored(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def test_stored_for_our_readers_and_for_others(small: Path, tmp_path: Path) -> None:
    model = _load(small, lowbit.GPTQConfig(4, modules_to_not_convert=["*.down_proj"]))
    assert _dense(model) == DOWN
    model.save_pretrained(tmp_path)
    stored = _stored(tmp_path)
    assert stored["modules_to_not_convert"] == DOWN
    for name in DOWN:
        # How GPTQModel and vLLM look for a module.
        rules = [rule for rule in stored["dynamic"] if re.match(rule.removeprefix("-:"), name)]
        assert rules == [f"-:^{re.escape(name)}$"]
    assert not [rule for rule in stored["dynamic"] if re.match(rule[2:], "model.layers.0.mlp.up_proj")]

    again = _load(tmp_path)
    assert _dense(again) == DOWN
    again.save_pretrained(tmp_path / "again")
    assert _stored(tmp_path / "again") == stored


def test_stored_config_quantizes_in_the_same_way(small: Path, tmp_path: Path) -> None:
    _load(small, lowbit.GPTQConfig(4, modules_to_not_convert=["*.down_proj"])).save_pretrained(tmp_path)
    assert _dense(_load(small, _stored(tmp_path))) == DOWN


def test_nothing_is_stored_where_nothing_is_skipped(small: Path, tmp_path: Path) -> None:
    _load(small, lowbit.GPTQConfig(4)).save_pretrained(tmp_path)
    assert not {"dynamic", "modules_to_not_convert"} & set(_stored(tmp_path))


@pytest.mark.parametrize("rule", [r"-:.*\.down", r"-:model\.layers\.\d\.mlp\.down_proj", r"-:^model.*down_proj$"])
def test_dynamic_leaves_modules_dense(small: Path, rule: str) -> None:
    config = lowbit.GPTQConfig(4, dynamic={rule: {}, "+:.*up_proj": {"bits": 4, "damp_percent": 0.2}})
    assert _dense(_load(small, config)) == DOWN


@pytest.mark.parametrize("dynamic", [{"+:.*up_proj": {"bits": 7}}, {".*": {"group_size": 0}}, ["-:x"], {"-:x": 1}])
def test_dynamic_that_is_not_understood(small: Path, dynamic: Any) -> None:
    with pytest.raises(FormatError):
        _load(small, lowbit.GPTQConfig(4, dynamic=dynamic))


@pytest.mark.parametrize("modules", ["q_proj", [1], {"a": 1}])
def test_modules_that_are_not_names(modules: Any) -> None:
    with pytest.raises(FormatError, match="modules_to_not_convert"):
        lowbit.GPTQConfig(4, modules_to_not_convert=modules)
