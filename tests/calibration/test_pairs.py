"""Pairs of scalable channels: which are found in which architecture, and that applying them changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from blocks import MODELS, traced
from lowbit.calibration.matrices import matrices
from lowbit.calibration.pairs import Pair, apply_scales, find_pairs
from lowbit.errors import PlanError

# Logits in fp32 with random scales on every pair, relative to the largest: 3e-7 on average over the architectures,
# 9e-7 at most.
_ROUNDING = 5e-6


def _named(pairs: list[Pair]) -> list[tuple[str, tuple[str, ...]]]:
    return [(pair.source, pair.targets) for pair in pairs]


@pytest.mark.parametrize("kind", MODELS)
def test_scales_on_every_pair_leave_the_logits_where_they_were(kind: str) -> None:
    model = traced(kind)
    before = model.run()
    pairs = find_pairs(model.block, model.run)
    assert torch.equal(model.run(), before)
    assert pairs
    for pair in pairs:
        apply_scales(model.block, pair, pair.tie(torch.rand(len(pair.rows)) * 3 + 0.2))
    assert (model.run() - before).abs().max() < _ROUNDING * before.abs().max()


def test_a_llama_has_its_four_pairs() -> None:
    model = traced("llama")
    pairs = find_pairs(model.block, model.run)
    assert _named(pairs) == [
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ]
    assert [(pair.kind, pair.repeat) for pair in pairs] == [("norm", 1), ("linear", 2), ("norm", 1), ("linear", 1)]
    # Two heads of queries read each head of values.
    assert pairs[1].rows.view(2, 2, 8).tolist() == [[list(range(8))] * 2, [list(range(8, 16))] * 2]


def test_parallel_layers_share_their_norm() -> None:
    model = traced("phi")
    assert _named(find_pairs(model.block, model.run)) == [
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")),
        ("self_attn.v_proj", ("self_attn.dense",)),  # and none through the GELU
    ]


def test_a_relu_lets_scales_through() -> None:
    model = traced("opt")
    pairs = find_pairs(model.block, model.run)
    assert ("fc1", ("fc2",)) in _named(pairs)
    # Neurons that no token of this run activates are where their neighbours say.
    assert torch.equal(pairs[-1].rows, torch.arange(48))


@pytest.mark.parametrize(
    ("kind", "source", "first_rows"),
    [
        ("phi3", "self_attn.qkv_proj", 32 + 16),  # queries, keys, values
        ("gpt2", "attn.c_attn", 2 * 32),
        ("bloom", "self_attention.query_key_value", 2 * 8),  # the same, head by head
        ("falcon_new", "self_attention.query_key_value", 3 * 8),  # two heads of queries, then keys, then values
        ("deepseek_v3", "self_attn.kv_b_proj", 8),  # up-projected keys, then values
        ("phi3", "mlp.gate_up_proj", 48),
    ],
)
def test_values_are_found_in_fused_projections(kind: str, source: str, first_rows: int) -> None:
    model = traced(kind)
    (pair,) = (pair for pair in find_pairs(model.block, model.run) if pair.source == source)
    assert pair.rows[0] == first_rows
    assert torch.equal(pair.rows[:8], first_rows + torch.arange(8))


def test_norms_after_a_layer_and_norms_without_weights_have_no_pair() -> None:
    for kind in ("olmo", "olmo2"):
        model = traced(kind)
        assert [pair.kind for pair in find_pairs(model.block, model.run)] == ["linear", "linear"]
    model = traced("gemma2")
    sources = [pair.source for pair in find_pairs(model.block, model.run)]
    assert sources == ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]


def test_gemmas_norms_multiply_by_one_more_than_their_weight() -> None:
    model = traced("gemma")
    offsets = {pair.source: pair.offset for pair in find_pairs(model.block, model.run)}
    assert (offsets["input_layernorm"], offsets["post_attention_layernorm"]) == (1.0, 1.0)


def test_routers_and_all_experts_go_with_their_norm() -> None:
    model = traced("qwen3_moe")
    pairs = find_pairs(model.block, model.run)
    (norm,) = (pair for pair in pairs if pair.source == "post_attention_layernorm")
    experts = {f"mlp.experts.{number}.{part}" for number in range(4) for part in ("gate_proj", "up_proj")}
    assert set(norm.targets) == {"mlp.gate", *experts}
    inner = [(f"mlp.experts.{number}.up_proj", (f"mlp.experts.{number}.down_proj",)) for number in range(4)]
    assert [entry for entry in _named(pairs) if "experts" in entry[0]] == inner


def test_experts_that_add_to_their_ungated_half_have_no_pair_of_their_own() -> None:
    model = traced("gpt_oss")
    assert not [pair for pair in find_pairs(model.block, model.run) if "experts" in pair.source]


class _Experts(nn.Module):
    """A norm, and experts as separate layers, of which the run reaches only some."""

    def __init__(self, act: Callable[[Tensor], Tensor], residual: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(3)
        )
        self.act, self.residual = act, residual

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden).view(-1, 16)
        out = torch.zeros_like(normed)
        for number, tokens in ((0, slice(0, 5)), (1, slice(5, None))):
            expert = self.experts[number]
            out[tokens] = expert["down"](self.act(expert["up"](normed[tokens])))
        return (normed if self.residual else hidden.view(-1, 16)) + out


def test_an_expert_that_saw_no_token_is_scaled_with_its_siblings() -> None:
    block = _Experts(torch.relu)
    pairs = find_pairs(block, lambda: block(torch.randn(2, 8, 16)))
    assert _named(pairs) == [
        ("norm", ("experts.0.up", "experts.1.up", "experts.2.up")),
        ("experts.0.up", ("experts.0.down",)),
        ("experts.1.up", ("experts.1.down",)),
        ("experts.2.up", ("experts.2.down",)),
    ]


def test_what_else_reads_a_norm_or_bends_its_channels_forbids_the_pair() -> None:
    block = _Experts(torch.nn.functional.gelu, residual=True)
    assert find_pairs(block, lambda: block(torch.randn(2, 8, 16))) == []
    squared = _Experts(lambda inputs: torch.relu(inputs).square())
    assert [pair.source for pair in find_pairs(squared, lambda: squared(torch.randn(2, 8, 16)))] == ["norm"]


def test_weights_keep_their_dtype_and_biases_follow() -> None:
    block = _Experts(torch.relu).bfloat16()
    hidden = torch.randn(2, 8, 16)
    pairs = find_pairs(block, lambda: block(hidden.bfloat16()))
    bias, weight = block.norm.bias.clone(), block.experts[2]["up"].weight.clone()
    scales = torch.linspace(1, 2, 16)
    apply_scales(block, pairs[0], scales)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert torch.equal(block.norm.bias, (bias.float() / scales).bfloat16())
    assert torch.equal(block.experts[2]["up"].weight, (weight.float() * scales).bfloat16())


def test_scales_that_a_pair_cannot_take_are_refused() -> None:
    model = traced("llama")
    pair = find_pairs(model.block, model.run)[1]
    with pytest.raises(PlanError, match=r"has 32 scales, not \[16\]"):
        apply_scales(model.block, pair, torch.ones(16))
    with pytest.raises(PlanError, match="positive and finite"):
        apply_scales(model.block, pair, torch.zeros(32))
    with pytest.raises(PlanError, match="belong to one channel"):
        apply_scales(model.block, pair, torch.linspace(1, 2, 32))
    tied = pair.tie(torch.tensor([1.0] * 8 + [4.0] * 8 + [1.0] * 16))
    assert torch.allclose(tied, torch.tensor([2.0] * 16 + [1.0] * 16))


def test_blocks_that_cannot_be_tried_are_refused() -> None:
    block = _Experts(torch.dropout_)  # never called
    with pytest.raises(PlanError, match="doesn't call the block"):
        find_pairs(block, lambda: None)
    with pytest.raises(PlanError, match="meta device"):
        find_pairs(_Experts(torch.relu).to("meta"), lambda: None)
    noisy = _Experts(lambda inputs: inputs + torch.rand_like(inputs))
    with pytest.raises(PlanError, match="other outputs when the same call is repeated"):
        find_pairs(noisy, lambda: noisy(torch.randn(2, 8, 16)))


def test_outputs_that_are_not_numbers_are_refused() -> None:
    block = _Experts(torch.relu)
    with pytest.raises(PlanError, match="NaN or infinite outputs"):
        find_pairs(block, lambda: block(torch.full((2, 8, 16), torch.nan)))


def test_every_matrix_of_a_block_has_a_name() -> None:
    known = matrices(traced("mixtral").block)
    assert known["mlp.experts.3.up_proj"].weight.shape == (48, 32)
    assert known["mlp.gate"].weight.shape == (4, 32)
    assert not known["mlp.gate"].linear
    assert known["self_attn.q_proj"].linear
    assert known["mlp.experts.0.down_proj"].weight.data_ptr() != known["mlp.experts.1.down_proj"].weight.data_ptr()
