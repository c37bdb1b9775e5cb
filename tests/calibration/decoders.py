"""Tiny random models of every shape that a calibrated run has to cope with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96, **_IDS}
GROUPED: dict[str, Any] = {
    **_SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
_GEMMA: dict[str, Any] = {**GROUPED, "head_dim": 16}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 16,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


_SHARING: dict[str, Any] = {
    **_GEMMA,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 96,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def _gemma3n() -> t.PreTrainedModel:
    sizes = {"laurel_rank": 32, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2}
    return t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**_SHARING, **sizes))


def _hybrid() -> t.PreTrainedModel:
    sizes = {**GROUPED, "num_experts": 2, "mamba_dt_rank": 32, "use_mamba_kernels": False, **_MAMBA}
    return t.JambaForCausalLM(t.JambaConfig(attn_layer_period=2, attn_layer_offset=1, **sizes))


def _gemma3() -> t.PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(layer_types=kinds, sliding_window=8, **_GEMMA))


def _gpt_oss() -> t.PreTrainedModel:
    sizes = {**_GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    model = t.GptOssForCausalLM(t.GptOssConfig(**sizes))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.experts.gate_up_proj_bias)
        torch.nn.init.normal_(layer.mlp.experts.down_proj_bias)
    return model


def _llava() -> t.PreTrainedModel:
    vision = t.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**GROUPED), image_token_id=95)
    return t.LlavaForConditionalGeneration(config)


def _gemma3_multimodal() -> t.PreTrainedModel:
    vision = t.SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = t.Gemma3TextConfig(sliding_window=8, **_GEMMA)
    ids = {"image_token_index": 95, "boi_token_index": 93, "eoi_token_index": 94}
    config = t.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, **ids)
    return t.Gemma3ForConditionalGeneration(config)


def _qwen2_vl(version: str = "2") -> t.PreTrainedModel:
    name = "Qwen2VL" if version == "2" else "Qwen2_5_VL"
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1, "patch_size": 8}
    if version != "2":
        vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    ids = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
    text = {**GROUPED, "rope_parameters": _ROPE}
    config = getattr(t, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(t, f"{name}ForConditionalGeneration")(config)


def _t5() -> t.PreTrainedModel:
    sizes = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 96}
    return t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, **sizes))


def _bart() -> t.PreTrainedModel:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 96}
    return t.BartForConditionalGeneration(
        t.BartConfig(d_model=64, vocab_size=96, max_position_embeddings=64, **sides, **_IDS)
    )


MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_GEMMA)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=8)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA, sliding_window=8)),
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": lambda: t.Gemma4ForCausalLM(t.Gemma4TextConfig(global_head_dim=16, **_SHARING)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=64, **_IDS)
    ),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64, **_SIZES)
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(intermediate_size=96, max_position_embeddings=64, **_SIZES)
    ),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(ffn_hidden_size=96, new_decoder_architecture=True, num_kv_heads=2, **_SIZES)
    ),
    "falcon_alibi": lambda: t.FalconForCausalLM(t.FalconConfig(alibi=True, multi_query=True, **_SIZES)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=96, **_IDS)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, **GROUPED)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(moe_intermediate_size=32, mlp_only_layers=[0], **_EXPERTS, **_GEMMA)
    ),
    "gpt_oss": _gpt_oss,
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(num_local_experts=4, intermediate_size_mlp=96, interleave_moe_layer_step=2, **_GEMMA)
    ),
    "granitemoe": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(num_local_experts=4, num_experts_per_tok=2, **GROUPED)
    ),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**_EXPERTS, **GROUPED)),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**GROUPED, "num_key_value_heads": 4}, **_MLA)),
    "jamba": _hybrid,
    "t5": _t5,
    "bart": _bart,
    "llava": _llava,
    "gemma3_multimodal": _gemma3_multimodal,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": lambda: _qwen2_vl("2.5"),
}
ENCODERS = {"t5", "bart"}


def save(kind: str, folder: Path) -> t.PreTrainedModel:
    """Make the tiny model `kind`, save it in `folder`, and return it."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # so that activations grow, and every branch of a block matters
            torch.nn.init.normal_(parameter, std=0.1 if "router" not in name else 0.5)
    model.save_pretrained(folder)
    return model


def auto(model: t.PreTrainedModel, library: Any) -> Any:
    """The Auto class that loads a model of this kind, of lowbit or of Transformers."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return library.AutoModelForSeq2SeqLM
    causal = name.endswith(("CausalLM", "LMHeadModel"))
    return library.AutoModelForCausalLM if causal else library.AutoModelForImageTextToText
