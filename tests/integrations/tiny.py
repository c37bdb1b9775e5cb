"""Tiny models with random weights, one per shape of architecture that the integration has to cope with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t

_SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}

MODELS = {
    "llama": ("AutoModelForCausalLM", lambda: t.LlamaForCausalLM(t.LlamaConfig(intermediate_size=128, **_SIZES))),
    "gpt2": (
        "AutoModelForCausalLM",
        lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=64)),
    ),
    "opt": (
        "AutoModelForCausalLM",
        lambda: t.OPTForCausalLM(
            t.OPTConfig(ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64, **_SIZES)
        ),
    ),
    "bloom": (
        "AutoModelForCausalLM",
        lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=128)),
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=32, vocab_size=128, decoder_start_token_id=0
            )
        ),
    ),
    "mixtral": (
        "AutoModelForCausalLM",
        lambda: t.MixtralForCausalLM(
            t.MixtralConfig(intermediate_size=128, num_key_value_heads=2, num_local_experts=4, **_SIZES)
        ),
    ),
    "vit": (
        "AutoModelForImageClassification",
        lambda: t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
        ),
    ),
    "bert": (
        "AutoModelForSequenceClassification",
        lambda: t.BertForSequenceClassification(t.BertConfig(intermediate_size=128, **_SIZES)),
    ),
}


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    """Make the tiny model `kind`, save it in `folder`, and return it."""
    torch.manual_seed(0)
    model = MODELS[kind][1]().to(dtype).eval()
    model.save_pretrained(folder)
    return model


def auto(kind: str, library: Any) -> Any:
    """The Auto class that loads `kind`, of lowbit or of Transformers."""
    return getattr(library, MODELS[kind][0])


def inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    ids = {"input_ids": torch.arange(3, 13)[None]}
    return {**ids, "decoder_input_ids": torch.arange(3, 8)[None]} if kind == "t5" else ids


@torch.no_grad()
def logits(model: t.PreTrainedModel, kind: str) -> torch.Tensor:
    return model(**inputs(kind)).logits
