"""What differs between architectures in a GGUF file: names, the order of some rows, and the keys of the configuration.

Data only. Names are of modules, without ``.weight`` or ``.bias``; ``{n}`` is the number of a block and ``{e}`` of an
expert, whose weights GGUF stacks into one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

# How llama.cpp orders the rows of a weight. ``rope``: the two halves of each head's rows interleaved. ``grouped``: all
# query heads, then the keys, then the values, where Transformers has them together for each group of heads.
RowOrder = Literal["rope_q", "rope_k", "grouped"]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: ``general.architecture``.
        model_type: Transformers' name of the configuration.
        model_class: of the language model.
        modules: GGUF's names of modules to Transformers'.
        config: GGUF's keys, without the architecture's name, to Transformers'.
        constants: what the architecture means where no key says otherwise; a model that differs can't be written.
        flags: Transformers' keys that are true where a tensor is there.
        rows: modules (GGUF's names, last part) whose rows llama.cpp reorders.
        norm_offset: what llama.cpp adds to the weights of norms.
        marker: a tensor that files of this row have, where several rows share a name; None where none is needed.
        name_says: a word in ``general.name`` that selects this row before others of its name.
        unsqueezed: modules (GGUF's names, last part) whose vectors are matrices of one row in Transformers.
        transposed: modules (Transformers' names, last part) whose weights are ``[in, out]`` in Transformers.
        head_required: llama.cpp wants an output head even where it is the embedding.
        rotary: whether positions are rotated into queries and keys.
    """

    name: str
    model_type: str
    model_class: str
    modules: Mapping[str, str]
    config: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    norm_offset: float = 0.0
    marker: str | None = None
    name_says: str | None = None
    unsqueezed: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    head_required: bool = False
    rotary: bool = True


_ENDS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Final = "model.layers.{n}"
_ATTENTION: Final = {
    "blk.{n}.attn_norm": f"{_LAYER}.input_layernorm",
    "blk.{n}.attn_q": f"{_LAYER}.self_attn.q_proj",
    "blk.{n}.attn_k": f"{_LAYER}.self_attn.k_proj",
    "blk.{n}.attn_v": f"{_LAYER}.self_attn.v_proj",
    "blk.{n}.attn_output": f"{_LAYER}.self_attn.o_proj",
}
_HEAD_NORMS: Final = {
    "blk.{n}.attn_q_norm": f"{_LAYER}.self_attn.q_norm",
    "blk.{n}.attn_k_norm": f"{_LAYER}.self_attn.k_norm",
}
_MLP_NORM: Final = {"blk.{n}.ffn_norm": f"{_LAYER}.post_attention_layernorm"}
_GATED_MLP: Final = {
    "blk.{n}.ffn_gate": f"{_LAYER}.mlp.gate_proj",
    "blk.{n}.ffn_up": f"{_LAYER}.mlp.up_proj",
    "blk.{n}.ffn_down": f"{_LAYER}.mlp.down_proj",
}
_LLAMA: Final = {**_ENDS, **_ATTENTION, **_MLP_NORM, **_GATED_MLP}
_GEMMA_NORMS: Final = {
    "blk.{n}.post_attention_norm": f"{_LAYER}.post_attention_layernorm",
    "blk.{n}.ffn_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "blk.{n}.post_ffw_norm": f"{_LAYER}.post_feedforward_layernorm",
}
_MOE: Final = {
    "blk.{n}.ffn_gate_inp": f"{_LAYER}.mlp.gate",
    "blk.{n}.ffn_gate_exps": f"{_LAYER}.mlp.experts.{{e}}.gate_proj",
    "blk.{n}.ffn_up_exps": f"{_LAYER}.mlp.experts.{{e}}.up_proj",
    "blk.{n}.ffn_down_exps": f"{_LAYER}.mlp.experts.{{e}}.down_proj",
}
_SHARED_EXPERT: Final = {
    "blk.{n}.ffn_gate_inp_shexp": f"{_LAYER}.mlp.shared_expert_gate",
    "blk.{n}.ffn_gate_shexp": f"{_LAYER}.mlp.shared_expert.gate_proj",
    "blk.{n}.ffn_up_shexp": f"{_LAYER}.mlp.shared_expert.up_proj",
    "blk.{n}.ffn_down_shexp": f"{_LAYER}.mlp.shared_expert.down_proj",
}
_MIXTRAL: Final = {
    "blk.{n}.ffn_gate_inp": f"{_LAYER}.block_sparse_moe.gate",
    "blk.{n}.ffn_gate_exps": f"{_LAYER}.block_sparse_moe.experts.{{e}}.w1",
    "blk.{n}.ffn_down_exps": f"{_LAYER}.block_sparse_moe.experts.{{e}}.w2",
    "blk.{n}.ffn_up_exps": f"{_LAYER}.block_sparse_moe.experts.{{e}}.w3",
}
_FALCON: Final = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{n}.attn_qkv": "transformer.h.{n}.self_attention.query_key_value",
    "blk.{n}.attn_output": "transformer.h.{n}.self_attention.dense",
    "blk.{n}.ffn_up": "transformer.h.{n}.mlp.dense_h_to_4h",
    "blk.{n}.ffn_down": "transformer.h.{n}.mlp.dense_4h_to_h",
}

_SIZES: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_ROPE: Final = {"rope.freq_base": "rope_theta"}
_RMS: Final = {**_SIZES, **_ROPE, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD: Final = {"attention.key_length": "head_dim"}
_EXPERTS: Final = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_WINDOW: Final = {"attention.sliding_window": "sliding_window"}
_BIASES: Final = {"attention_bias": "blk.0.attn_q.bias"}
_LLAMA_BIASES: Final = {**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"}
_ROPE_ROWS: Final[dict[str, RowOrder]] = {"attn_q": "rope_q", "attn_k": "rope_k"}
_FALCON_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    **_ROPE,
}

# Rows that share a name are asked in this order; the last of them needs no marker.
ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        {**_ENDS, **_ATTENTION, **_MLP_NORM, **_MIXTRAL},
        {**_RMS, **_HEAD, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        {"sliding_window": None, "hidden_act": "silu"},
        rows=_ROPE_ROWS,
        marker="blk.0.ffn_gate_exps.weight",
    ),
    Architecture(
        "llama",
        "mistral",
        "MistralForCausalLM",
        _LLAMA,
        {**_RMS, **_HEAD, **_WINDOW},
        {"sliding_window": None, "hidden_act": "silu"},
        rows=_ROPE_ROWS,
        name_says="mistral",
    ),
    Architecture(
        "llama",
        "llama",
        "LlamaForCausalLM",
        _LLAMA,
        {**_RMS, **_HEAD},
        {"hidden_act": "silu"},
        _LLAMA_BIASES,
        rows=_ROPE_ROWS,
    ),
    Architecture(
        "qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA, _RMS, {"use_sliding_window": False, "hidden_act": "silu"}
    ),
    Architecture(
        "qwen3",
        "qwen3",
        "Qwen3ForCausalLM",
        {**_LLAMA, **_HEAD_NORMS},
        {**_RMS, **_HEAD},
        {"use_sliding_window": False, "hidden_act": "silu"},
        _BIASES,
    ),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_ENDS, **_ATTENTION, **_MLP_NORM, **_MOE, **_SHARED_EXPERT},
        {**_RMS, **_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {
            "use_sliding_window": False,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
        },
        unsqueezed=("ffn_gate_inp_shexp",),
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_ENDS, **_ATTENTION, **_HEAD_NORMS, **_MLP_NORM, **_MOE},
        {**_RMS, **_HEAD, **_EXPERTS},
        {
            "use_sliding_window": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
        },
        _BIASES,
    ),
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        {
            **_ENDS,
            **_MLP_NORM,
            "blk.{n}.attn_norm": f"{_LAYER}.input_layernorm",
            "blk.{n}.attn_qkv": f"{_LAYER}.self_attn.qkv_proj",
            "blk.{n}.attn_output": f"{_LAYER}.self_attn.o_proj",
            "blk.{n}.ffn_up": f"{_LAYER}.mlp.gate_up_proj",
            "blk.{n}.ffn_down": f"{_LAYER}.mlp.down_proj",
        },
        {**_RMS, **_WINDOW, "rope.scaling.original_context_length": "original_max_position_embeddings"},
        {"sliding_window": None, "hidden_act": "silu"},
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        {**_ENDS, **_ATTENTION, **_GEMMA_NORMS, **_GATED_MLP},
        {
            **_RMS,
            **_HEAD,
            **_WINDOW,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        norm_offset=1.0,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_ENDS, **_ATTENTION, **_HEAD_NORMS, **_GEMMA_NORMS, **_GATED_MLP},
        {**_RMS, **_HEAD, **_WINDOW, "final_logit_softcapping": "final_logit_softcapping"},
        {"final_logit_softcapping": None, "attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"},
        norm_offset=1.0,
    ),
    Architecture(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{n}.attn_norm": "transformer.h.{n}.ln_1",
            "blk.{n}.attn_qkv": "transformer.h.{n}.attn.c_attn",
            "blk.{n}.attn_output": "transformer.h.{n}.attn.c_proj",
            "blk.{n}.ffn_norm": "transformer.h.{n}.ln_2",
            "blk.{n}.ffn_up": "transformer.h.{n}.mlp.c_fc",
            "blk.{n}.ffn_down": "transformer.h.{n}.mlp.c_proj",
        },
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        transposed=("c_attn", "c_proj", "c_fc"),
        rotary=False,
    ),
    Architecture(
        "falcon",
        "falcon",
        "FalconForCausalLM",
        {
            **_FALCON,
            "blk.{n}.attn_norm": "transformer.h.{n}.ln_mlp",
            "blk.{n}.attn_norm_2": "transformer.h.{n}.ln_attn",
        },
        _FALCON_SIZES,
        {"new_decoder_architecture": True, "bias": False, "alibi": False, "parallel_attn": True, "activation": "gelu"},
        rows={"attn_qkv": "grouped"},
        marker="blk.0.attn_norm_2.weight",
    ),
    Architecture(
        "falcon",
        "falcon",
        "FalconForCausalLM",
        {**_FALCON, "blk.{n}.attn_norm": "transformer.h.{n}.input_layernorm"},
        _FALCON_SIZES,
        {"new_decoder_architecture": False, "bias": False, "alibi": False, "parallel_attn": True, "activation": "gelu"},
        rows={"attn_qkv": "grouped"},
    ),
    Architecture(
        "stablelm",
        "stablelm",
        "StableLmForCausalLM",
        _LLAMA,
        {
            **_SIZES,
            **_ROPE,
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual",
        },
        {"qk_layernorm": False, "hidden_act": "silu"},
        {"use_qkv_bias": "blk.0.attn_q.bias"},
        head_required=True,
    ),
    Architecture(
        "starcoder2",
        "starcoder2",
        "Starcoder2ForCausalLM",
        {
            **_ENDS,
            **_ATTENTION,
            **_MLP_NORM,
            "blk.{n}.ffn_up": f"{_LAYER}.mlp.c_fc",
            "blk.{n}.ffn_down": f"{_LAYER}.mlp.c_proj",
        },
        {**_SIZES, **_ROPE, **_WINDOW, "attention.layer_norm_epsilon": "norm_epsilon"},
        {"sliding_window": None, "hidden_act": "gelu_pytorch_tanh"},
        {"use_bias": "blk.0.attn_q.bias"},
    ),
)
