"""The types that llama.cpp gives to a model's tensors: makes ``llama_cpp_mixtures.json``.

Usage: ``llama_cpp_mixtures.py FOLDER_OF_LIBLLAMA``, built of the sources in llama-cpp-python 0.3.36.

lowbit writes files of random models, and ``llama_model_quantize`` says what would become of them, with importance for
every tensor and without any. By the model's name: ``facts``, as :class:`ModelFacts` has them; ``shapes`` of what is
quantized, in torch's order, with ``{}`` for the layer; ``types`` by mixture, a list of two, without importance and
with: for each shape's name the types layer after layer, ``Q6_K*2 Q4_K*14``. Null stands for what is refused, and a list
of one for both the same.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers as t

from lowbit.integrations.transformers.gguf.export import open_source, write_gguf_model
from lowbit.wire.gguf import open_gguf
from lowbit.wire.gguf.metadata import facts_of
from lowbit.wire.gguf.mixtures import ModelFacts, is_quantized
from lowbit.wire.gguf.names import architecture_for

_WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 4, "vocab_size": 32,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_TIED: dict[str, Any] = {**_WIDE, "tie_word_embeddings": True}
_FOUR: dict[str, Any] = {**_WIDE, "num_key_value_heads": 1}
_FALCON: dict[str, Any] = {key: _WIDE[key] for key in ("hidden_size", "num_attention_heads", "vocab_size")}
_GPT2: dict[str, Any] = {"n_embd": 256, "n_inner": 512, "n_layer": 9, "n_head": 4, "vocab_size": 32, "n_positions": 64}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
MODELS: dict[str, Any] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_WIDE)),
    "llama, tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**_TIED, "num_hidden_layers": 21})),
    "llama, four heads share": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_FOUR)),
    "llama, narrow": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**{**_WIDE, "hidden_size": 96, "num_hidden_layers": 8, "intermediate_size": 144})
    ),
    "llama, as 70B": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**_FOUR, "num_hidden_layers": 80})),
    "mixtral": lambda: t.MixtralForCausalLM(
        t.MixtralConfig(**_FOUR, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen2moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**_WIDE, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=512)
    ),
    "qwen3moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**{**_WIDE, **_EXPERTS, "num_hidden_layers": 8}, num_experts=3, norm_topk_prob=True)
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_WIDE, sliding_window=None, pad_token_id=0)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**_GPT2)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON, num_hidden_layers=16)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_WIDE, head_dim=64, query_pre_attn_scalar=64)),
}
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21,
    "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29,
    "IQ4_XS": 30, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
}  # fmt: skip
_LINE = re.compile(r"\] +(\S+) +- \[[^]]*\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")


class Entry(ctypes.Structure):
    """``llama_model_imatrix_data``."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Params(ctypes.Structure):
    """``llama_model_quantize_params``."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("threads", "file_type", "output_type", "embedding_type")],
        *[(name, ctypes.c_bool) for name in ("requantize", "output", "copy", "pure", "keep_split", "dry_run")],
        ("importance", ctypes.POINTER(Entry)),
        *[(name, ctypes.c_void_p) for name in ("metadata", "types", "pruned")],
        ("buffer", ctypes.c_size_t),
    ]


class Llama:
    """The library, and what it says while it works."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self._library = ctypes.CDLL(str(folder / "libllama.so"))
        self._library.llama_model_quantize_default_params.restype = Params
        self._library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)]
        self._library.llama_model_quantize.restype = ctypes.c_uint32
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._say = callback(lambda level, text, data: self.said.append(text.decode()))
        self._library.llama_log_set(self._say, None)
        self._library.llama_backend_init()

    def types(self, file: Path, file_type: int, importance: list[str]) -> dict[str, str] | None:
        """Of all tensors, in llama.cpp's order; None where importance is needed and there is none."""
        self.said.clear()
        params = self._library.llama_model_quantize_default_params()
        params.file_type, params.dry_run, params.threads = file_type, True, 1
        one = (ctypes.c_float * 1)(1.0)  # nothing is made of it
        entries = [Entry(name.encode(), ctypes.addressof(one), 1) for name in importance]
        array = (Entry * (len(entries) + 1))(*entries, Entry())
        if importance:
            params.importance = array
        status = self._library.llama_model_quantize(bytes(file), bytes(file.with_suffix(".out")), params)
        text = "".join(self.said)
        if status:
            raise SystemExit(text[-2000:])
        if "will require an imatrix" in text:
            return None
        return {name: (after or before).upper() for name, before, after in _LINE.findall(text)}


def facts(folder: Path) -> ModelFacts:
    config = open_source(folder).config.to_dict()
    return facts_of(architecture_for(config), config)


def by_layer(types: dict[str, str], names: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: int("0" + "".join(re.findall(r"blk\.(\d+)", name)))):
        found.setdefault(role(name), []).append(types[name])
    return {
        name: " ".join(f"{kind}*{len(list(run))}" for kind, run in itertools.groupby(kinds))
        for name, kinds in found.items()
    }


def role(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "blk.{}.", name)


def recorded(llama: Llama, folder: Path) -> dict[str, Any]:
    write_gguf_model(folder, folder / "model.gguf", "F16")
    file = open_gguf(folder / "model.gguf")
    shapes = {name: list(info.shape) for name, info in file.tensors.items() if is_quantized(name, info.shape)}
    by_role = {role(name): shape for name, shape in shapes.items()}
    types: dict[str, Any] = {}
    for name, number in FILE_TYPES.items():
        both = []
        for importance in ([], list(shapes)):
            found = llama.types(folder / "model.gguf", number, importance)
            if found is not None and set(found) != set(file.tensors):
                raise SystemExit(f"what llama.cpp says is not understood: {''.join(llama.said)[-2000:]}")
            changed = {key for key, kind in (found or {}).items() if kind not in ("F16", "F32")}
            if not changed <= set(shapes):
                raise SystemExit(f"llama.cpp quantizes also {changed - set(shapes)}")
            both.append(None if found is None else by_layer(found, list(shapes)))
        types[name] = both[:1] if both[0] == both[1] else both
    return {"facts": asdict(facts(folder)), "shapes": by_role, "types": types}


def main(library: Path) -> None:
    llama, models = Llama(library), {}
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            make().half().save_pretrained(scratch)
            models[name] = recorded(llama, Path(scratch))
    text = json.dumps({"file_types": FILE_TYPES, "models": models})
    text = re.sub(r'([{,]) ?(?="[\w, ]+": [\[{])', r"\1\n", text)  # a line for each model and mixture
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
