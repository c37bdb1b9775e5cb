from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from lowbit.algorithms import integer_spec, quantize
from lowbit.core import Kept, patterns
from lowbit.errors import PlanError
from lowbit.nn import QuantLinear, dequantize_model, plan_model, quantize_model
from lowbit.nn.planning import as_expression, default_keep, matches

SPEC = integer_spec(4, 32)


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 64),
            "layers": nn.ModuleList(
                [nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(11)]
            ),
            "conv": nn.Conv1d(64, 64, 3),
            "head": nn.Linear(64, 10, bias=False),
        }
    )


def test_every_weight_gets_a_line() -> None:
    plan = plan_model(model(), SPEC, skip=["head"])
    assert len(plan.quantized) == 22
    assert plan.kept["embed"] == Kept("embedding")
    assert plan.kept["conv"] == Kept("Conv1d is not a linear layer")
    assert plan.kept["head"] == Kept("skipped by 'head'")
    text = str(plan)
    assert text.startswith("22 weights quantized, 3 kept")
    assert "layers.*.up (11)" in text


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.lm_head_2", "lm_head", False),
        ("model.layers.1.attn.q", "model.layers.1", True),
        ("model.layers.11.attn.q", "model.layers.1", False),
        ("model.layers.11.attn.q", "layers.1", False),
        ("model.layers.1", "layers.1", True),
        ("model.layers.3.mlp.gate", "mlp.gate", True),
        ("model.layers.3.mlp.gate_proj", "mlp.gate", False),
        ("model.layers.3.mlp.gate", "*.gate", True),
        ("model.layers.3.mlp.gate", "model.layers.?.mlp.*", True),
        ("model.layers.3.mlp.gate", r"model\.layers\.[0-4]\..*", True),
        ("model.layers.7.mlp.gate", r"model\.layers\.[0-4]\..*", False),
        ("lm_head", "lm_head.weight", True),
    ],
)
def test_patterns(name: str, pattern: str, hit: bool) -> None:
    assert (matches(name, [pattern]) is not None) == hit


@pytest.mark.parametrize("pattern", [r"(a+)\1", "((((a*)*)*)*)*b", "(?i)A", "(", "", "x" * 2000])
def test_unusable_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(PlanError):
        matches("a" * 60, [pattern])


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(PlanError, match="nothing in this model would be quantized"):
        plan_model(model(), SPEC, skip=["*"])


def test_what_a_format_cannot_hold_is_kept_with_its_reason() -> None:
    plan = plan_model(model(), SPEC, refusal=lambda _, spec, shape: "too narrow" if shape[0] < 64 else None)
    assert plan.kept["head"] == Kept("too narrow")


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        empty = model()
    assert plan_model(empty, SPEC).entries == plan_model(model(), SPEC).entries


def test_quantize_and_dequantize_a_plain_module() -> None:
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    weights = {name: quantize(net.get_submodule(name).weight, SPEC).dequantize() for name in ("0", "2")}
    quantize_model(net, plan_model(net, SPEC), quantize)
    assert all(isinstance(net[index], QuantLinear) for index in (0, 2))
    inputs = torch.randn(5, 64)
    expected = net(inputs)
    dequantize_model(net)
    assert type(net[0]) is nn.Linear
    assert torch.equal(net[0].weight, weights["0"])
    assert torch.equal(net(inputs), expected)


def tiny_mixtral() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_embeddings_and_heads_are_not_skipped_in_silence() -> None:
    model = tiny_mixtral()
    plan = plan_model(model, SPEC, keep=default_keep(model))
    assert plan.kept["lm_head"].reason == "output head"
    assert plan.kept["model.embed_tokens"].reason == "embedding"


def test_fused_experts_are_planned_quantized_and_dequantized() -> None:
    model = tiny_mixtral().eval()
    plan = plan_model(model, SPEC, keep=default_keep(model))
    module = "model.layers.0.mlp.experts"
    assert plan.shapes[f"{module}.gate_up_proj"] == (2, 192, 64)
    assert plan.quantized[f"{module}.down_proj"] == SPEC
    dense = model.get_submodule(module).gate_up_proj.detach().clone()
    quantize_model(model, plan, quantize)
    assert list(model.get_submodule(module).stacks) == ["gate_proj", "up_proj", "down_proj"]
    outputs = model(torch.arange(5)[None]).logits
    dequantize_model(model)
    expected = torch.cat([quantize(part, SPEC).dequantize() for part in dense[1].chunk(2)])
    assert torch.equal(model.get_submodule(module).gate_up_proj[1], expected)
    torch.testing.assert_close(model(torch.arange(5)[None]).logits, outputs)


def test_both_ends_of_a_tie_stay_dense_whatever_else_is_skipped() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    plan = plan_model(model, SPEC, skip=["k_proj"], keep=default_keep(model))
    assert plan.kept["lm_head"].reason == "tied to model.embed_tokens"
    assert plan.kept["model.layers.0.self_attn.k_proj"].reason == "skipped by 'k_proj'"


def test_conv1d_is_a_transposed_linear_layer() -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    name = "transformer.h.0.attn.c_attn"
    weight = model.get_submodule(name).weight.detach().clone()
    plan = plan_model(model, SPEC, keep=default_keep(model))
    assert plan.shapes[name] == (192, 64)
    quantize_model(model, plan, quantize)
    assert torch.equal(model.get_submodule(name).weight, quantize(weight.T, SPEC).dequantize())
    model(torch.arange(5)[None])


def test_ordinary_expressions_are_patterns() -> None:
    for pattern in (r"model\.layers\.(1|2)\.mlp", r"(?:encoder|decoder)\..*", r"layers\.\d+\.fc[12]"):
        matches("model.layers.1.mlp", [pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "model.layers.1",
        "lm_head.weight",
        "*layers.0.*",
        "model.*.q_pro?",
        ".*mlp\\.(up|down)_proj",
        ".*q_proj",
        "a-b",
    ],
)
def test_an_expression_finds_what_its_pattern_does(pattern: str) -> None:
    names = ["lm_head", "a-b", "a-b.c", "xa-b", "q_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.mlp"]
    names += [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
    ]
    names += [
        "model.layers.0.self_attn.q_proj.lora",
        "model.layers.0.self_attn.my_q_proj",
        "layers.0.x",
        "model.layers.1",
    ]
    expected = [name for name in names if matches(name, [pattern])]
    assert [name for name in names if re.match(as_expression(pattern), name)] == expected
    assert [name for name in names if patterns.match(as_expression(pattern), name)] == expected
    assert 0 < len(expected) < len(names)
