"""Tiny random models of many architectures, and one of their blocks in the middle of a forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
_T5: dict[str, Any] = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 4,
}

MODELS: dict[str, tuple[str, Callable[[], t.PreTrainedModel]]] = {
    "llama": ("model.layers.1", lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED))),
    "mistral": ("model.layers.1", lambda: t.MistralForCausalLM(t.MistralConfig(**_GROUPED))),
    "qwen2": ("model.layers.1", lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_GROUPED))),
    "qwen3": ("model.layers.1", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_GEMMA))),
    "gemma": ("model.layers.1", lambda: t.GemmaForCausalLM(t.GemmaConfig(**_GEMMA))),
    "gemma2": ("model.layers.1", lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA))),
    "gemma3": ("model.layers.1", lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA))),
    "phi": ("model.layers.1", lambda: t.PhiForCausalLM(t.PhiConfig(**_GROUPED))),
    "phi3": ("model.layers.1", lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED))),
    "stablelm": ("model.layers.1", lambda: t.StableLmForCausalLM(t.StableLmConfig(**_GROUPED))),
    "starcoder2": ("model.layers.1", lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**_GROUPED))),
    "cohere": ("model.layers.1", lambda: t.CohereForCausalLM(t.CohereConfig(**_GROUPED))),
    "olmo": ("model.layers.1", lambda: t.OlmoForCausalLM(t.OlmoConfig(**_GROUPED))),
    "olmoe": (
        "model.layers.1",
        lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2)),
    ),
    "olmo2": ("model.layers.1", lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**_GROUPED))),
    "granite": ("model.layers.1", lambda: t.GraniteForCausalLM(t.GraniteConfig(**_GROUPED))),
    "gpt_neox": ("gpt_neox.layers.1", lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_SIZES, intermediate_size=48))),
    "gpt2": ("transformer.h.1", lambda: t.GPT2LMHeadModel(t.GPT2Config(**_GPT))),
    "gptj": ("transformer.h.1", lambda: t.GPTJForCausalLM(t.GPTJConfig(**_GPT, rotary_dim=4))),
    "opt": (
        "model.decoder.layers.1",
        lambda: t.OPTForCausalLM(t.OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    ),
    "falcon": (
        "transformer.h.1",
        lambda: t.FalconForCausalLM(t.FalconConfig(**_SIZES, multi_query=True, alibi=False)),
    ),
    "falcon_new": (
        "transformer.h.1",
        lambda: t.FalconForCausalLM(
            t.FalconConfig(**_SIZES, num_kv_heads=2, new_decoder_architecture=True, alibi=False)
        ),
    ),
    "bloom": (
        "transformer.h.1",
        lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    ),
    "mixtral": (
        "model.layers.1",
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**_GROUPED, num_local_experts=4)),
    ),
    "qwen2_moe": (
        "model.layers.1",
        lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=24)),
    ),
    "qwen3_moe": ("model.layers.1", lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_GEMMA, **_EXPERTS))),
    "gpt_oss": (
        "model.layers.1",
        lambda: t.GptOssForCausalLM(t.GptOssConfig(**_GEMMA, num_local_experts=4, num_experts_per_tok=2)),
    ),
    "deepseek_v3": (
        "model.layers.1",
        lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**_GROUPED, "num_key_value_heads": 4}, **_MLA)),
    ),
    "t5": ("decoder.block.1", lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5, decoder_start_token_id=0))),
    "t5_gated": (
        "encoder.block.1",
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(**_T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
        ),
    ),
    "bart": ("model.decoder.layers.1", lambda: t.BartForConditionalGeneration(t.BartConfig(**_BART))),
}


@dataclass
class Traced:
    """A model, one of its blocks, and what runs it."""

    model: t.PreTrainedModel
    block: nn.Module

    def run(self) -> Tensor:
        ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(3))
        extra = {"decoder_input_ids": ids.flip(1)} if self.model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False, **extra).logits


def traced(kind: str) -> Traced:
    """A tiny model whose norms, biases and weights are all random, in fp32."""
    path, make = MODELS[kind]
    torch.manual_seed(0)
    return randomized(make(), path)


def randomized(model: t.PreTrainedModel, path: str) -> Traced:
    """A model with all its parameters drawn anew, and its block at `path`."""
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return Traced(model, model.get_submodule(path))
