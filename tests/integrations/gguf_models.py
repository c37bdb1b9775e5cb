"""One tiny model with random weights for each architecture that GGUF files are read and written of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5] * 8,
    "short_factor": [1.25] * 8,
    "original_max_position_embeddings": 32,
}
_GEMMA: dict[str, Any] = {**_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 16}

MODELS: dict[str, Any] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED)),
    "llama3": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**_HEADS, rope_parameters=_LLAMA3, tie_word_embeddings=True, attention_bias=True)
    ),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_GROUPED, sliding_window=None)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_HEADS, tie_word_embeddings=True)),
    "qwen2moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            **_GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
        )
    ),
    "qwen3moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**_HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED, sliding_window=None)),
    "phi3-long": lambda: t.Phi3ForCausalLM(
        t.Phi3Config(**_GROUPED, rope_parameters=dict(_LONG), original_max_position_embeddings=32)
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 7})),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2, n_inner=256
        )
    ),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**_COMMON)),
    "falcon-new": lambda: t.FalconForCausalLM(t.FalconConfig(**_COMMON, num_kv_heads=2, new_decoder_architecture=True)),
    "stablelm": lambda: t.StableLmForCausalLM(
        t.StableLmConfig(**_GROUPED, use_qkv_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    ),
    "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**_GROUPED)),
}


def save(kind: str, folder: Path) -> t.PreTrainedModel:
    """Make the tiny model `kind`, every vector random too, save it in `folder`, and return it."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Of few bits, as trained ones in bf16, so that Gemma's offset costs none.
                parameter.add_(torch.round(torch.randn_like(parameter) * 32) / 256)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: t.PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 33)[None]).logits
