"""A Transformers configuration as a GGUF file's metadata; the inverse of :mod:`lowbit.wire.gguf.config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.architectures import Architecture
from lowbit.wire.gguf.config import head_dim_of, heads_of, layer_types, llama3_factors, query_scale
from lowbit.wire.gguf.mixtures import ModelFacts
from lowbit.wire.gguf.names import ROPE_TENSORS

_SWA_PATTERNS: Final = {"gemma2": 2, "gemma3": 6}
_LOCAL_THETA: Final = 10000.0


def facts_of(row: Architecture, config: Mapping[str, Any]) -> ModelFacts:
    """What a mixture asks of a model, from Transformers' configuration."""
    heads, kv_heads = heads_of(config)
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    tied = bool(config.get("tie_word_embeddings")) and not row.head_required
    return ModelFacts(row.name, int(layers), heads, kv_heads, int(experts), tied)


def metadata_of(row: Architecture, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata under the architecture's name, and the tensors that say how positions are rotated.

    Args:
        config: with every key that the architecture has, as a Transformers configuration's `to_dict` gives it.

    Raises:
        FormatError: llama.cpp's architecture computes something else than the configuration says.
    """
    _check_constants(row, config)
    heads, kv_heads = heads_of(config)
    found: dict[str, Any] = {}
    for key, name in row.config.items():
        value = config.get(name)
        if value is not None and not isinstance(value, list | dict):
            found[key] = value
    found |= {"attention.head_count": heads, "vocab_size": int(config["vocab_size"])}
    if "attention.head_count_kv" in row.config:
        found["attention.head_count_kv"] = kv_heads
    if row.name == "gpt2":
        found.setdefault("feed_forward_length", 4 * int(config["n_embd"]))
    if row.name == "phi3":
        found.setdefault("attention.sliding_window", 0)
    if row.name in _SWA_PATTERNS:
        _check_gemma(row, config, found)
    tensors: dict[str, Tensor] = {}
    if row.rotary:
        found |= _rope(row, config, tensors)
    if "attention.key_length" in row.config:
        found |= {"attention.key_length": head_dim_of(config), "attention.value_length": head_dim_of(config)}
    return {f"{row.name}.{key}": value for key, value in found.items()}, tensors


def _check_constants(row: Architecture, config: Mapping[str, Any]) -> None:
    """Refuse a model whose configuration differs in what llama.cpp takes for granted."""
    stored = set(row.config.values()) | set(row.flags)
    for name, value in row.constants.items():
        if name not in stored and (config.get(name, value) or None) != (value or None):
            raise FormatError(
                f"llama.cpp's '{row.name}' has no other", tensor=name, found=config.get(name), expected=value
            )


def _check_gemma(row: Architecture, config: Mapping[str, Any], found: dict[str, Any]) -> None:
    scale = query_scale(row, config)
    if config.get("query_pre_attn_scalar", scale) != scale:
        raise FormatError(
            f"llama.cpp's '{row.name}' has no other", tensor="query_pre_attn_scalar",
            found=config["query_pre_attn_scalar"], expected=scale,
        )  # fmt: skip
    layers = int(config["num_hidden_layers"])
    types = config.get("layer_types") or layer_types(layers, _SWA_PATTERNS[row.name])
    if row.name == "gemma3" and set(types) == {"full_attention"}:
        found.pop("attention.sliding_window", None)
    elif types != layer_types(layers, _SWA_PATTERNS[row.name]):
        raise FormatError(f"llama.cpp's '{row.name}' has another order of layers", tensor="layer_types", found=types)


def _rope(row: Architecture, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or {})
    local = rope.get("sliding_attention")
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    head_dim = head_dim_of(config)
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or _LOCAL_THETA)
    found: dict[str, Any] = {"rope.freq_base": theta, "rope.dimension_count": rotated}
    if isinstance(local, dict):
        if local.get("rope_type", "default") != "default":
            raise FormatError("llama.cpp scales no local positions", tensor="rope_parameters", found=local)
        if local.get("rope_theta", _LOCAL_THETA) != _LOCAL_THETA:
            found["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        tensors[ROPE_TENSORS[0]] = llama3_factors(rope, theta, head_dim)
    elif kind == "longrope":
        found |= _longrope(rope, config, tensors)
    elif kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            found |= _yarn(rope, config)
    elif kind != "default":
        raise FormatError("llama.cpp has no such scaling of positions", tensor="rope_type", found=kind)
    return found


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    found: dict[str, Any] = {"rope.scaling.original_context_length": int(original)}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if rope.get(name) is not None:
            found[f"rope.scaling.{key}"] = float(rope[name])
    return found


def _longrope(rope: Mapping[str, Any], config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    original = int(rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"])
    for name, key in zip(ROPE_TENSORS[1:], ("long_factor", "short_factor"), strict=True):
        tensors[name] = torch.tensor([float(value) for value in rope[key]], dtype=torch.float32)
    scale = int(config["max_position_embeddings"]) / original
    attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(rope.get("attention_factor") or attention),
    }
