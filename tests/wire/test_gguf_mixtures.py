"""Mixtures of GGUF types: what llama.cpp's rules say, rule by rule. What it says of whole models is in tests/golden."""

from __future__ import annotations

import pytest

from lowbit.errors import FormatError, PlanError
from lowbit.wire.gguf import MIXTURES, GgmlType, ModelFacts, mixture
from lowbit.wire.gguf.mixtures import NEED_IMPORTANCE, fitting, is_quantized, mixture_name

PLAIN = ModelFacts("llama", layers=32, heads=32, kv_heads=32)
SHARED = ModelFacts("llama", layers=32, heads=32, kv_heads=8)
EIGHT = ModelFacts("llama", layers=32, heads=32, kv_heads=8, experts=8)
FALCON = ModelFacts("falcon", layers=32, heads=71, kv_heads=1)
LARGE = ModelFacts("llama", layers=80, heads=64, kv_heads=8)
MOE = ModelFacts("qwen2moe", layers=32, heads=32, kv_heads=32, experts=60)
WIDE = (4096, 4096)


def kind(
    name: str, tensor: str, model: ModelFacts = PLAIN, shape: tuple[int, ...] = WIDE, *, importance: bool = False
) -> str:
    return mixture(name, importance=importance)(tensor, shape, model).name


def calibrated(name: str, part: str, model: ModelFacts = PLAIN, layer: int = 9) -> str:
    return kind(name, f"blk.{layer}.{part}.weight", model, importance=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Q4_K_M", [*range(4), *range(6, 28, 3), *range(28, 32)]),
        ("Q5_K_M", [*range(4), *range(6, 28, 3), *range(28, 32)]),
    ],
)
def test_the_first_and_last_eighth_and_every_third_layer_get_more(name: str, expected: list[int]) -> None:
    for part in ("attn_v", "ffn_down"):
        raised = [layer for layer in range(32) if kind(name, f"blk.{layer}.{part}.weight") == "Q6_K"]
        assert raised == expected


def test_single_rules() -> None:
    assert kind("Q2_K", "blk.9.attn_v.weight") == "Q3_K" and kind("Q2_K", "blk.9.attn_v.weight", SHARED) == "Q4_K"
    assert kind("Q2_K", "blk.9.attn_output.weight") == kind("Q2_K", "blk.9.ffn_down.weight") == "Q3_K"
    assert kind("Q3_K_M", "blk.1.attn_v.weight") == "Q5_K" and kind("Q3_K_M", "blk.2.attn_v.weight") == "Q4_K"
    assert kind("Q3_K_M", "blk.1.ffn_down.weight") == "Q5_K" and kind("Q3_K_M", "blk.2.ffn_down.weight") == "Q4_K"
    assert kind("Q3_K_L", "blk.9.attn_output.weight") == kind("Q3_K_L", "blk.9.ffn_down.weight") == "Q5_K"
    assert kind("Q4_K_S", "blk.3.attn_v.weight") == kind("Q4_K_S", "blk.3.ffn_down.weight") == "Q5_K"
    assert kind("Q4_K_S", "blk.4.attn_v.weight") == kind("Q4_K_S", "blk.4.ffn_down.weight") == "Q4_K"
    assert kind("IQ4_XS", "blk.9.attn_v.weight", SHARED) == kind("IQ4_XS", "blk.0.ffn_down.weight") == "Q5_K"
    assert kind("Q3_K_S", "blk.0.ffn_up.weight") == kind("Q3_K_S", "blk.0.attn_v.weight") == "Q3_K"
    assert kind("Q4_K_M", "blk.10.attn_v.weight", LARGE) == "Q5_K"
    assert kind("IQ3_M", "blk.9.attn_v.weight") == kind("IQ3_M", "blk.9.attn_output.weight") == "Q4_K"
    assert kind("IQ3_M", "blk.3.ffn_down.weight") == "Q4_K" and kind("IQ3_M", "blk.4.ffn_down.weight") == "IQ3_S"
    assert kind("IQ3_S", "blk.9.attn_v.weight", SHARED) == "Q4_K" and kind("IQ3_S", "blk.0.ffn_down.weight") == "IQ3_S"


def test_what_importance_changes() -> None:
    """Of the first layers' ways down only, where llama.cpp guards against what searched scales do to them."""
    for name, alone, with_importance in (
        ("Q4_0", "Q4_0", "Q4_1"),
        ("Q5_0", "Q5_0", "Q5_1"),
        ("IQ4_XS", "Q5_K", "IQ4_XS"),
    ):
        assert kind(name, "blk.3.ffn_down.weight") == alone
        assert calibrated(name, "ffn_down", layer=3) == with_importance
        assert calibrated(name, "ffn_down", layer=4) == kind(name, "blk.4.ffn_down.weight") == name
    for name in set(MIXTURES) - set(NEED_IMPORTANCE) - {"Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"}:
        for part in ("attn_v", "attn_k", "attn_output", "ffn_down", "ffn_up"):
            assert calibrated(name, part, layer=0) == kind(name, f"blk.0.{part}.weight")


def test_mixtures_that_need_importance() -> None:
    for name, base, raised, output in (
        ("IQ1_S", "IQ1_S", "Q2_K", "IQ2_XXS"),
        ("IQ1_M", "IQ1_M", "Q2_K", "IQ2_XXS"),
        ("IQ2_XXS", "IQ2_XXS", "Q2_K", "IQ2_XXS"),
        ("IQ2_XS", "IQ2_XS", "Q2_K", "IQ2_XS"),
        ("IQ2_S", "IQ2_XS", "IQ3_S", "IQ3_S"),
        ("IQ2_M", "IQ2_S", "IQ3_S", "IQ3_S"),
    ):
        assert {calibrated(name, part) for part in ("attn_q", "attn_k", "ffn_up", "ffn_gate", "ffn_down")} == {base}
        assert calibrated(name, "attn_v") == calibrated(name, "ffn_down", layer=3) == raised
        assert calibrated(name, "attn_v", SHARED) == calibrated(name, "attn_qkv", MOE) == "Q4_K"
        assert calibrated(name, "attn_output") == output and calibrated(name, "attn_output", EIGHT) == "Q5_K"
        assert calibrated(name, "attn_k", EIGHT) == "Q4_K" and calibrated(name, "attn_q", EIGHT) == base
        assert kind(name, "output.weight", importance=True) == "Q5_K"
        assert kind(name, "token_embd.weight", importance=True) == raised
    assert [calibrated("IQ3_XXS", part) for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")] == [
        *("IQ2_S", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ3_XXS")
    ]
    assert calibrated("IQ3_XS", "attn_q") == calibrated("IQ3_XS", "ffn_gate") == "IQ3_XXS"
    assert calibrated("IQ3_XS", "ffn_up", layer=3) == calibrated("IQ3_XS", "ffn_up", layer=28) == "IQ3_S"
    assert calibrated("Q2_K_S", "attn_v", SHARED) == calibrated("Q2_K_S", "ffn_down", layer=3) == "Q4_K"


def test_shared_experts_count_twice() -> None:
    found = [calibrated("IQ2_XS", f"ffn_down_{part}", MOE, layer) for layer in range(3) for part in ("exps", "shexp")]
    assert found == ["Q2_K"] * 4 + ["IQ2_XS"] * 2


def test_what_needs_importance_is_refused_without() -> None:
    for name in NEED_IMPORTANCE:
        with pytest.raises(PlanError, match=f"--method gguf:{name} --dataset FILE"):
            mixture(name.lower())
    assert {"IQ3_S", "IQ3_M"} & set(NEED_IMPORTANCE) == set()


def test_mixtures_of_experts_and_falcon() -> None:
    assert kind("Q4_K_M", "blk.9.attn_v.weight", EIGHT) == kind("Q4_K_M", "blk.9.attn_k.weight", EIGHT) == "Q8_0"
    assert kind("Q4_K_M", "blk.9.attn_output.weight", EIGHT) == "Q5_K"
    assert kind("Q4_K_M", "blk.1.ffn_down.weight", FALCON) == "Q6_K"
    assert kind("Q4_K_M", "blk.2.ffn_down.weight", FALCON) == "Q5_K"
    assert kind("Q4_K_M", "blk.4.ffn_down.weight", FALCON) == "Q4_K"
    assert kind("Q3_K_L", "blk.4.attn_output.weight", FALCON) == "Q4_K"
    assert kind("Q4_K_M", "output.weight", FALCON) == "Q8_0"
    assert kind("MXFP4_MOE", "blk.0.ffn_up_exps.weight", shape=(8, 64, 64)) == "MXFP4"
    assert kind("MXFP4_MOE", "blk.0.attn_q.weight") == kind("MXFP4_MOE", "output.weight") == "Q8_0"
    assert kind("MXFP4", "blk.0.attn_q.weight") == "MXFP4" and kind("MXFP4", "token_embd.weight") == "Q8_0"


def test_embedding_and_head() -> None:
    tied = ModelFacts("llama", 32, 32, 32, tied=True)
    for name, embedding, head in (("Q4_K_M", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0"), ("TQ1_0", "Q4_K", "Q6_K")):
        assert kind(name, "token_embd.weight") == embedding and kind(name, "output.weight") == head
        assert kind(name, "token_embd.weight", tied) == head
    assert kind("F16", "output.weight") == kind("F16", "token_embd.weight", tied) == "F16"


def test_rows_that_are_not_whole_blocks() -> None:
    found = [fitting(GgmlType[name], 96).name for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0")]
    assert found == ["Q4_0", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_0"]
    for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"):
        assert fitting(GgmlType[name], 96) is GgmlType.IQ4_NL and fitting(GgmlType[name], 40) is GgmlType.F16
    assert fitting(GgmlType.Q4_K, 100) is fitting(GgmlType.Q4_0, 40) is GgmlType.F16
    assert kind("Q4_K_M", "output.weight", shape=(10, 96)) == "Q8_0"


def test_what_stays_as_it_is() -> None:
    for name in (
        "blk.0.attn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "position_embd.weight",
        "blk.0.ssm_conv1d.weight",
    ):
        assert not is_quantized(name, WIDE) and kind("Q4_0", name) == "F32"
    assert not is_quantized("blk.0.attn_q.weight", (64,)) and not is_quantized("blk.0.attn_q.bias", WIDE)
    assert is_quantized("blk.0.time_mix_key.weight", WIDE) and not is_quantized("blk.0.time_mix_w1.weight", WIDE)
    assert mixture("Q4_0")("output_norm.weight", (64,), PLAIN, stored=GgmlType.BF16) is GgmlType.BF16


def test_names() -> None:
    assert mixture("q4_k").name == mixture_name("q4_k") == "Q4_K_M" and mixture("Q3_K").file_type == 12
    every = [mixture(name, importance=True) for name in MIXTURES]
    assert all(one.base in GgmlType and one.importance for one in every)
    assert len({one.file_type for one in every}) == len(MIXTURES) - 4  # aliases, and two of MXFP4
    for name in ("IQ2_XL", "Q9_9", "", 4):
        with pytest.raises(FormatError, match="no such mixture"):
            mixture(name)
