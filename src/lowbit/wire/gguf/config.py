"""A model's configuration in a GGUF file's metadata, and back: plain dicts with Transformers' keys."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.wire.gguf.architectures import Architecture
from lowbit.wire.gguf.container import TensorInfo
from lowbit.wire.gguf.names import ROPE_TENSORS, blocks_of, find_architecture

_LIMIT: Final = 1 << 31
_FP32_LIMIT: Final = 3.4e38
_WHOLE: Final = ("_count", "_length", "_count_kv")  # endings of keys whose values count something
_REQUIRED: Final = ("block_count", "embedding_length", "attention.head_count")
TOKENS: Final = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_HEADS: Final = ("num_attention_heads", "n_head")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads")
_HIDDEN: Final = ("hidden_size", "n_embd")
# Meta's choices for Llama 3.1 to 3.3: the factors are made from these, and only the factors are stored.
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# The sizes whose queries llama.cpp scales by the hidden size instead of the head's: Gemma's 27B models.
_WIDE_QUERIES: Final = {"gemma2": 46, "gemma3": 62}
_THETA: Final = 10000.0  # llama.cpp's base where a file names none
_PATTERNS: Final = {"gemma2": 2, "gemma3": 6}


class Source(Protocol):
    """What is asked of an open GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def dense(self, name: str) -> Tensor: ...


def config_of(file: Source) -> dict[str, Any]:
    """The Transformers configuration of a GGUF file, as ``config.json`` would hold it.

    Raises:
        FormatError: the architecture is unknown, a key is missing, of the wrong type or out of range, or contradicts
            the tensors.
    """
    row = find_architecture(file.metadata, file.tensors)
    config: dict[str, Any] = {"model_type": row.model_type, "architectures": [row.model_class], **row.constants}
    for key, name in row.config.items():
        value = _value(file.metadata, f"{row.name}.{key}", required=key in _REQUIRED)
        if value is not None:
            config[name] = value
    _check_blocks(row, config, file.tensors)
    config |= {name: tensor in file.tensors for name, tensor in row.flags.items()}
    config["vocab_size"] = _vocabulary(file)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config |= {name: _token(file.metadata, key, config["vocab_size"]) for name, key in TOKENS.items()}
    _complete(row, file, config)
    return config


def heads_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of query heads and of key-value heads."""
    heads = next(int(config[name]) for name in _HEADS if config.get(name))
    kv_heads = next((int(config[name]) for name in _KV_HEADS if config.get(name)), heads)
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query", True) else heads
    return heads, kv_heads


def head_dim_of(config: Mapping[str, Any]) -> int:
    """The size of a head."""
    hidden = next(int(config[name]) for name in _HIDDEN if config.get(name))
    return int(config.get("head_dim") or hidden // heads_of(config)[0])


def _value(metadata: Mapping[str, Any], key: str, *, required: bool) -> Any:
    value = metadata.get(key)
    if value is None:
        if required:
            raise FormatError("the metadata lacks a key of its architecture", tensor=key)
        return None
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]  # some writers repeat it for each block
    whole = key.endswith(_WHOLE)
    if isinstance(value, bool) and not whole:
        return value
    if type(value) is int and 0 <= value < _LIMIT:
        if value == 0 and (required or key.endswith("head_count_kv")):
            raise FormatError("a count of the configuration is out of range", tensor=key, found=value)
        return value
    if isinstance(value, float) and math.isfinite(value) and not whole:
        return shortest(value)
    raise FormatError(
        "a value of the configuration is out of range",
        tensor=key,
        found=repr(value)[:80],
        expected="a whole number" if whole else "a finite number",
    )


def shortest(value: float) -> float:
    """The shortest decimal number that rounds to the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in candidates if _fp32(short) == _fp32(value)), value)


def _fp32(value: float) -> bytes:
    return struct.pack("<f", value) if abs(value) < _FP32_LIMIT else struct.pack("<d", value)


def _check_blocks(row: Architecture, config: Mapping[str, Any], tensors: Collection[str]) -> None:
    declared = next(config[name] for name in ("num_hidden_layers", "n_layer") if name in config)
    found = blocks_of(tensors)
    if len(found) != declared or max(found, default=-1) != declared - 1:
        raise FormatError(
            "the blocks that have tensors are not those that the metadata counts",
            tensor=f"{row.name}.block_count",
            found=f"{declared}, and tensors of {len(found)} blocks",
        )


def _vocabulary(file: Source) -> int:
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise FormatError("the file has no embedding", tensor="token_embd.weight")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and (not isinstance(tokens, list) or len(tokens) > info.shape[0]):
        raise FormatError(
            "the list of tokens doesn't fit the embedding", tensor="tokenizer.ggml.tokens",
            found=len(tokens) if isinstance(tokens, list) else repr(tokens)[:40], expected=info.shape[0],
        )  # fmt: skip
    return info.shape[0]


def _token(metadata: Mapping[str, Any], key: str, vocabulary: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocabulary:
        raise FormatError("a token's number is out of range", tensor=key, found=repr(value)[:40], expected=vocabulary)
    return value


def _complete(row: Architecture, file: Source, config: dict[str, Any]) -> None:
    """What follows from several keys together."""
    heads, kv_heads = heads_of(config)
    if heads % kv_heads:
        raise FormatError("the heads don't divide into the key-value heads", found=heads, expected=f"n x {kv_heads}")
    if row.name == "falcon":
        _complete_falcon(row, config, file.metadata)
    if row.name == "stablelm":
        config["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in file.tensors
    if "head_dim" in row.config.values():
        config.setdefault("head_dim", _number(file.metadata, row, "rope.dimension_count") or head_dim_of(config))
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None  # Phi-3 without a window
    if row.name in _PATTERNS:
        _complete_gemma(row, config)
    if row.rotary:
        theta = config.pop("rope_theta", _THETA)
        if theta <= 0:
            raise FormatError("the base of the rotary positions is out of range", found=theta, expected="more than 0")
        rope = {"rope_theta": theta, **_rope(row, file, {**config, "rope_theta": theta})}
        if row.name == "gemma3":
            local = {"rope_type": "default", "rope_theta": _number(file.metadata, row, "rope.freq_base_swa") or _THETA}
            config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        else:
            config["rope_parameters"] = rope


def _number(metadata: Mapping[str, Any], row: Architecture, key: str) -> Any:
    return _value(metadata, f"{row.name}.{key}", required=False)


def _complete_falcon(row: Architecture, config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    heads, stored = config["num_attention_heads"], config.get("num_kv_heads", 1)
    if not config["new_decoder_architecture"] and 1 < stored < heads:
        config |= {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
    config["multi_query"] = stored < heads or heads == 1
    config["num_kv_heads"] = stored


def _complete_gemma(row: Architecture, config: dict[str, Any]) -> None:
    layers = config["num_hidden_layers"]
    config["query_pre_attn_scalar"] = query_scale(row, config)
    pattern = _PATTERNS[row.name] if config.get("sliding_window") or row.name == "gemma2" else 1
    config["layer_types"] = layer_types(layers, pattern)
    if not config.get("sliding_window"):
        config["sliding_window"] = 4096


def query_scale(row: Architecture, config: Mapping[str, Any]) -> int:
    """What llama.cpp scales Gemma's queries by; no key says it."""
    if config["num_hidden_layers"] == _WIDE_QUERIES[row.name]:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return head_dim_of(config)


def layer_types(layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer attends to everything."""
    return ["full_attention" if (index + 1) % pattern == 0 else "sliding_attention" for index in range(layers)]


def _rope(row: Architecture, file: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` but for the base."""
    metadata = file.metadata
    rope: dict[str, Any] = {"rope_type": "default"}
    rotated = _number(metadata, row, "rope.dimension_count")
    if rotated and rotated != head_dim_of(config):
        rope["partial_rotary_factor"] = rotated / head_dim_of(config)
    elif row.name == "stablelm":
        rope["partial_rotary_factor"] = 1.0
    kind = metadata.get(f"{row.name}.rope.scaling.type")
    if all(name in file.tensors for name in ROPE_TENSORS[1:]):
        long, short = (file.dense(name).tolist() for name in ROPE_TENSORS[1:])
        rope |= {"rope_type": "longrope", "long_factor": _all_shortest(long), "short_factor": _all_shortest(short)}
        rope["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    elif ROPE_TENSORS[0] in file.tensors:
        rope |= _llama3(file.dense(ROPE_TENSORS[0]), config)
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _number(metadata, row, "rope.scaling.factor") or 1.0}
        if kind == "yarn":
            rope |= _yarn(metadata, row)
    elif kind not in (None, "none", "longrope"):
        raise FormatError("unknown scaling of rotary positions", found=repr(kind)[:40])
    return rope


def _yarn(metadata: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    keys = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    found = {name: _number(metadata, row, f"rope.scaling.{key}") for key, name in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _all_shortest(values: list[float]) -> list[float]:
    return [shortest(value) for value in values]


def _llama3(stored: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, recognised by its factors.

    Raises:
        FormatError: the factors are not of that kind.
    """
    rope = {"rope_type": "llama3", "factor": shortest(float(stored.max())), **_LLAMA3}
    theta = float(config["rope_theta"])
    made = llama3_factors(rope, theta, head_dim_of(config))
    if stored.shape != made.shape or not torch.allclose(stored.float(), made, rtol=1e-3):
        raise FormatError(
            "the factors of the rotary positions are not Llama 3's", tensor=ROPE_TENSORS[0], found=list(stored.shape)
        )
    return rope


def llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> Tensor:
    """What each rotary frequency is divided by, ``fp32 [head_dim / 2]``."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
