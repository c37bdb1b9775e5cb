"""Damaged EETQ and FBGEMM FP8 checkpoints: one `FormatError` that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import FormatError

MODULE = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    dense = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(dense)
    folders = {}
    for name, asked in {"eetq": lowbit.EetqConfig(), "fbgemm": lowbit.FbgemmFp8Config()}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        lowbit.AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked).save_pretrained(folders[name])
    return folders


@pytest.fixture
def damaged(originals: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint after changes to its tensors and its config."""

    def make(
        kind: str,
        tensors: Callable[[Tensors], Any] = lambda tensors: None,
        config: Callable[[dict[str, Any]], Any] = lambda config: None,
    ) -> Path:
        held = load_file(originals[kind] / "model.safetensors")
        data = json.loads((originals[kind] / "config.json").read_text())
        tensors(held)
        config(data["quantization_config"])
        save_file(
            {name: tensor.contiguous() for name, tensor in held.items()},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        (tmp_path / "config.json").write_text(json.dumps(data))
        return tmp_path

    return make


def refused(path: Path, *words: str) -> None:
    """Both ways of reading raise one error that holds the words."""
    for attempt in (
        lambda: dict(lowbit.open_checkpoint(path).weights.items()),
        lambda: lowbit.AutoModelForCausalLM.from_pretrained(path),
    ):
        with pytest.raises(FormatError) as caught:
            attempt()
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))


def replace(held: Tensors, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    held[f"{MODULE}.{name}"] = change(held[f"{MODULE}.{name}"])


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_eetq_scales_of_the_wrong_length_are_refused(damaged: Callable[..., Path], length: int) -> None:
    path = damaged("eetq", lambda held: replace(held, "weight_scales", lambda scales: torch.ones(length).half()))
    refused(path, f"{MODULE}.weight_scales", "wrong shape")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_eetq_scales_of_another_dtype_are_refused(damaged: Callable[..., Path], dtype: torch.dtype) -> None:
    refused(
        damaged("eetq", lambda held: replace(held, "weight_scales", lambda scales: scales.to(dtype))),
        "weight_scales",
        "dtype",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_eetq_scale_that_is_no_number_is_refused(damaged: Callable[..., Path], value: float) -> None:
    path = damaged("eetq", lambda held: held[f"{MODULE}.weight_scales"].__setitem__(5, value))
    refused(path, f"{MODULE}.weight_scales", "no numbers")


def test_an_eetq_scale_of_zero_is_a_row_of_zeros(damaged: Callable[..., Path]) -> None:
    path = damaged("eetq", lambda held: held[f"{MODULE}.weight_scales"].zero_())
    assert not lowbit.open_checkpoint(path).weights[MODULE].dequantize().any()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[:-1],
        lambda weight: weight[:, :32],
        lambda weight: weight.to(torch.int16),
        lambda weight: weight.view(torch.uint8),
        lambda weight: weight.reshape(-1),
        lambda weight: weight[:0],
    ],
)
def test_an_eetq_weight_of_another_shape_or_dtype_is_refused(damaged: Callable[..., Path], change: Any) -> None:
    refused(damaged("eetq", lambda held: replace(held, "weight", change)), MODULE)


def test_an_eetq_weight_that_is_not_transposed_is_refused(damaged: Callable[..., Path]) -> None:
    refused(damaged("eetq", lambda held: replace(held, "weight", lambda weight: weight.reshape(64, 128))), MODULE)


@pytest.mark.parametrize("weights", ["int4", "int2", 8, "INT8", ["int8"]])
def test_eetq_weights_of_other_numbers_are_refused(damaged: Callable[..., Path], weights: Any) -> None:
    refused(damaged("eetq", config=lambda config: config.update(weights=weights)))


@pytest.mark.parametrize("kind", ["eetq", "fbgemm"])
@pytest.mark.parametrize("names", ["lm_head", {"a": 1}, [1], 7])
def test_a_list_of_modules_that_is_none_is_refused(damaged: Callable[..., Path], kind: str, names: Any) -> None:
    refused(damaged(kind, config=lambda config: config.update(modules_to_not_convert=names)), "modules_to_not_convert")


@pytest.mark.parametrize("kind", ["eetq", "fbgemm"])
def test_missing_scales_are_refused(damaged: Callable[..., Path], kind: str) -> None:
    """What is left is a weight of int8 or FP8 numbers without a meaning."""
    name = "weight_scales" if kind == "eetq" else "weight_scale"
    path = damaged(kind, lambda held: held.pop(f"{MODULE}.{name}"))
    with pytest.raises(FormatError, match=MODULE):
        lowbit.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(("value", "word"), [(0.0, "positive"), (-1.0, "positive"), (float("nan"), "no numbers")])
def test_an_fp8_scale_that_is_zero_or_no_number_is_refused(
    damaged: Callable[..., Path], value: float, word: str
) -> None:
    path = damaged("fbgemm", lambda held: held[f"{MODULE}.weight_scale"].__setitem__((5, 0), value))
    refused(path, f"{MODULE}.weight_scale", word)


@pytest.mark.parametrize(
    "change",
    [
        lambda scale: scale.t(),
        lambda scale: scale.reshape(-1),
        lambda scale: scale[:-1],
        lambda scale: scale.expand(-1, 128),
        lambda scale: scale[:1],
    ],
)
def test_fp8_scales_along_the_wrong_axis_are_refused(damaged: Callable[..., Path], change: Any) -> None:
    path = damaged("fbgemm", lambda held: replace(held, "weight_scale", change))
    refused(path, f"{MODULE}.weight_scale", "wrong shape")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fp8_scales_of_another_dtype_are_refused(damaged: Callable[..., Path], dtype: torch.dtype) -> None:
    refused(
        damaged("fbgemm", lambda held: replace(held, "weight_scale", lambda scale: scale.to(dtype))), "weight_scale"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.bfloat16])
def test_fp8_codes_of_another_dtype_are_refused(damaged: Callable[..., Path], dtype: torch.dtype) -> None:
    path = damaged("fbgemm", lambda held: replace(held, "weight", lambda weight: weight.float().to(dtype)))
    refused(path, f"{MODULE}.weight", "dtype")


def test_fp8_codes_that_are_no_numbers_are_refused(damaged: Callable[..., Path]) -> None:
    path = damaged("fbgemm", lambda held: held[f"{MODULE}.weight"].view(torch.uint8)[2].fill_(0xFF))
    refused(path, f"{MODULE}.weight", "no numbers")


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), "1200", True, [1200.0], float("nan")])
def test_a_bound_of_activations_that_is_none_is_refused(damaged: Callable[..., Path], bound: Any) -> None:
    refused(damaged("fbgemm", config=lambda config: config.update(activation_scale_ub=bound)), "activation_scale_ub")
