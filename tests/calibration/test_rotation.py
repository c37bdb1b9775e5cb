"""Rotated models compute what they did, their weights have no outliers, and what can't be rotated is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from blocks import Traced, randomized, traced
from lowbit.algorithms import RoundToNearest, integer_spec
from lowbit.calibration import rotation as module
from lowbit.calibration.matrices import matrices
from lowbit.calibration.rotation import RotationPlan, final_norm_name, find_rotation
from lowbit.errors import PlanError

# Logits in fp32, relative to the largest: between 5e-7 and 1.5e-6 over the architectures.
_ROUNDING = 8e-6
_RMS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe"]
_RMS += ["gpt_oss", "deepseek_v3"]
_LAYER_NORM = ["phi", "stablelm", "starcoder2", "cohere", "gpt_neox", "gptj", "falcon", "falcon_new"]


def _rotate(model: Traced, plan: RotationPlan) -> None:
    stack = model.model.get_submodule(module._stack_name(model.model, model.block))
    norm = model.model.get_submodule(final_norm_name(model.model, model.block))
    for block in stack.children():
        plan.rotate_block(block)
    plan.rotate_outside(model.model.get_input_embeddings(), norm, model.model.get_output_embeddings())


@pytest.mark.parametrize("kind", _RMS + _LAYER_NORM)
def test_a_rotated_model_computes_the_same(kind: str) -> None:
    model = traced(kind)
    before, weight = model.run(), next(iter(matrices(model.block).values())).weight.clone()
    plan = find_rotation(model.model, model.block, model.run, seed=5)
    assert torch.equal(model.run(), before)
    _rotate(model, plan)
    assert (model.run() - before).abs().max() < _ROUNDING * before.abs().max()
    assert not torch.allclose(next(iter(matrices(model.block).values())).weight, weight, atol=0.01)
    assert plan.rotation.centred == (kind in _LAYER_NORM)
    (found,) = plan.kinds.values()
    assert [values.rows.shape for values in found.heads] == [(4, 8)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "post_attention_layernorm, post_feedforward_layernorm: a norm with weights between a layer"),
        ("gemma3", "a norm with weights between a layer and the residual stream"),
        ("olmo2", "a norm with weights between a layer and the residual stream"),
        ("olmo", r"one norm is expected outside the blocks, behind the last; found \[\]"),
        ("opt", "more than an embedding, a norm and a head: model.decoder.embed_positions.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("bloom", "found .*word_embeddings_layernorm"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
    ],
)
def test_what_does_not_commute_with_a_rotation_is_refused(kind: str, reason: str) -> None:
    model = traced(kind)
    before = model.run()
    with pytest.raises(PlanError, match=reason):
        find_rotation(model.model, model.block, model.run)
    assert torch.equal(model.run(), before)


def test_blocks_come_one_by_one_to_a_model_without_weights() -> None:
    model = traced("llama")
    with torch.device("meta"):
        skeleton = t.LlamaForCausalLM(model.model.config)
    block = copy.deepcopy(model.block)
    plan = find_rotation(skeleton, model.block, model.run, seed=5)
    plan.rotate_block(block)
    _rotate(model, find_rotation(model.model, model.block, model.run, seed=5))
    assert all(torch.equal(*pair) for pair in zip(block.parameters(), model.block.parameters(), strict=True))


def test_blocks_of_another_kind_have_to_be_traced_too() -> None:
    base = traced("deepseek_v3").model.config
    base.first_k_dense_replace = 1
    base.mlp_layer_types = ["dense", "sparse"]
    model = randomized(t.DeepseekV3ForCausalLM(base), "model.layers.1")
    first, before = model.model.get_submodule("model.layers.0"), model.run()
    assert len(list(first.parameters())) < len(list(model.block.parameters()))
    plan = find_rotation(model.model, model.block, model.run)
    with pytest.raises(PlanError, match="other parameters than the block that was traced"):
        plan.rotate_block(first)
    plan.add_block(first, model.run)
    _rotate(model, plan)
    assert len(plan.kinds) == 2
    assert (model.run() - before).abs().max() < _ROUNDING * before.abs().max()


def test_tied_embeddings_are_untied_and_said_to_be() -> None:
    model = traced("gemma")
    plan = find_rotation(model.model, model.block, model.run)
    assert plan.untie
    assert "tie_word_embeddings to False" in plan.notes[0]
    _rotate(model, plan)
    embedding, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight
    assert embedding is not head and not torch.equal(embedding, head)
    assert not find_rotation(*_arguments(traced("llama"))).untie


def _arguments(model: Traced) -> tuple[nn.Module, nn.Module, object]:
    return model.model, model.block, model.run


def test_outliers_are_spread_and_rounding_costs_less() -> None:
    model = traced("llama")
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    with torch.no_grad():
        for name in names:
            weight = matrices(model.block)[name].weight
            (weight if weight.shape[0] == 32 and "q_proj" not in name else weight.t())[3] *= 12

    def error(name: str) -> float:
        weight = matrices(model.block)[name].weight
        rounded = RoundToNearest().quantize(weight, integer_spec(bits=4, group_size=-1)).dequantize()
        return float((rounded - weight).square().sum() / weight.square().sum())

    def kurtosis(name: str) -> float:
        weight = matrices(model.block)[name].weight
        return float((weight - weight.mean()).pow(4).mean() / weight.var().square())

    before = {name: (kurtosis(name), error(name)) for name in names}
    _rotate(model, find_rotation(model.model, model.block, model.run))
    for name in names:
        assert before[name][0] > 10 and kurtosis(name) < 5
        if name not in ("self_attn.o_proj", "mlp.down_proj"):  # their rows are outliers, which have scales of their own
            assert error(name) < 0.5 * before[name][1]


def test_without_heads_only_the_stream_is_rotated() -> None:
    model = traced("llama")
    plan = find_rotation(model.model, model.block, model.run, rotate_heads=False)
    assert [kind.heads for kind in plan.kinds.values()] == [()]
    before = model.run()
    _rotate(model, plan)
    assert (model.run() - before).abs().max() < _ROUNDING * before.abs().max()


def test_a_bias_that_nothing_can_take_up_stays_with_its_norm() -> None:
    model = traced("falcon")  # LayerNorm with bias before matrices without
    plan = find_rotation(model.model, model.block, model.run)
    norm = model.block.get_submodule("input_layernorm")
    assert torch.equal(plan.rotation.apply(norm.bias.detach() / norm.weight.detach()), _rotated_bias(plan, model))
    with torch.no_grad():
        norm.weight[3] = 0
    with pytest.raises(PlanError, match="a norm has a bias, weights of 0"):
        plan.rotate_block(model.block)


def _rotated_bias(plan: RotationPlan, model: Traced) -> Tensor:
    block = copy.deepcopy(model.block)
    plan.rotate_block(block)
    return block.get_submodule("input_layernorm").bias.detach()


class _Decoder(nn.Module):
    """The least that has an embedding, blocks, a norm and a head."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(20, 16), nn.RMSNorm(16), nn.Linear(16, 20, bias=False)
        self.layers = nn.ModuleList([block()])

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class _Scaled(nn.Module):
    """A block with a scale per channel on what it adds, which no norm and no matrix holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.RMSNorm(16), nn.Linear(16, 16), nn.Parameter(torch.rand(16))
        self.out = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, other: Tensor | None = None) -> Tensor:
        added = self.scale * self.out(torch.relu(self.linear(self.norm(hidden))))
        return hidden + added + (0 if other is None else other)


def test_a_block_that_does_something_else_with_the_stream_is_refused() -> None:
    model = _Decoder(_Scaled)
    (block,) = model.layers
    hidden = torch.randn(2, 8, 16)
    with pytest.raises(PlanError, match="_Scaled doesn't commute with a rotation: its output is"):
        find_rotation(model, block, lambda: block(hidden))
    block.scale.data.fill_(0.7)
    find_rotation(model, block, lambda: block(hidden))
    with pytest.raises(PlanError, match=r"takes two inputs of \[2, 8, 16\]"):
        find_rotation(model, block, lambda: block(hidden, hidden * 2))


def test_models_whose_outside_is_not_understood_are_refused() -> None:
    model = _Decoder(_Scaled)
    (block,) = model.layers
    model.norm = nn.LayerNorm(16)
    block.scale.data.fill_(0.7)
    with pytest.raises(PlanError, match="the final norm is a LayerNorm, those in blocks are RMSNorm"):
        find_rotation(model, block, lambda: block(torch.ones(2, 8, 16).cumsum(2)))
    model.head = nn.Linear(8, 20)
    with pytest.raises(PlanError, match="differ in their number of channels"):
        find_rotation(model, block, lambda: None)
    with pytest.raises(PlanError, match="one list of Linear is expected"):
        find_rotation(model, nn.Linear(2, 2), lambda: None)
