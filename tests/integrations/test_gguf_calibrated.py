"""GGUF's types chosen as llama.cpp does with an importance matrix, from the run to the file; and what is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import lowbit
from lowbit.calibration.data import load_calibration
from lowbit.errors import FormatError
from lowbit.integrations.transformers.calibrate import CalibratedRun
from lowbit.integrations.transformers.calibrated_methods import Settings, calibrated_method
from lowbit.integrations.transformers.gguf.export import write_gguf_model
from lowbit.wire.gguf import GgmlType, Gguf, ModelFacts, mixture, open_gguf
from lowbit.wire.gguf.mixtures import is_quantized

IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
FACTS = ModelFacts("llama", 8, 4, 1)
Q4 = "Q4_K_M"


def llama(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**SIZES, **changes}))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def calibrated(source: Path, folder: Path, **config: Any) -> Path:
    """By importance alone, since error feedback takes longer."""
    method, data = calibrated_method("gguf", Settings(feedback=False)), load_calibration(IDS, None)
    run = CalibratedRun(source, lowbit.GgufConfig(**config), method, data, folder / "job", torch.device("cpu"))
    run.run()
    made = folder / "made"
    made.mkdir()
    run.write(made)
    run.close()
    return made


def on_load(source: Path, folder: Path, **config: Any) -> Path:
    model = lowbit.AutoModelForCausalLM.from_pretrained(source, quantization_config=lowbit.GgufConfig(**config))
    model.save_pretrained(folder / "made")
    return folder / "made"


def written(made: Path, kind: str) -> Gguf:
    write_gguf_model(made, made.parent / "model.gguf", kind)
    return open_gguf(made.parent / "model.gguf")


@pytest.mark.parametrize("kind", ["iq2_xs", "IQ3_XXS", "Q4_0"])
def test_the_file_has_the_types_of_the_mixture_with_importance(kind: str, tmp_path: Path) -> None:
    made = calibrated(llama(tmp_path / "dense"), tmp_path, type=kind)
    file, chosen = written(made, kind), mixture(kind, importance=True)
    found = {name: info.type for name, info in file.tensors.items() if is_quantized(name, info.shape)}
    assert len(found) == 8 * 7 + 2
    assert found == {name: chosen(name, file.tensors[name].shape, FACTS) for name in found}
    assert file.metadata["general.file_type"] == chosen.file_type
    if kind == "Q4_0":
        assert found["blk.0.ffn_down.weight"] is GgmlType.Q4_1  # which it isn't without importance
    before, after = lowbit.open_checkpoint(made).weights, lowbit.open_checkpoint(file.path).weights
    assert all(after[name].equal(weight) for name, weight in before.items())
    model = lowbit.AutoModelForCausalLM.from_pretrained(made)
    assert model.config.quantization_config.type == kind and bool(torch.isfinite(model(IDS).logits).all())


def test_narrow_experts_get_what_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = t.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2, sliding_window=None)
    t.MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    file = written(calibrated(tmp_path / "dense", tmp_path, type="IQ1_S"), "IQ1_S")
    types = {
        name.removeprefix("blk.0."): info.type.name for name, info in file.tensors.items() if info.type.name != "F32"
    }
    assert types.pop("token_embd.weight") == "Q4_0" and types.pop("attn_v.weight") == "Q5_0"  # for Q2_K and Q4_K
    assert types.pop("output.weight") == "Q8_0"
    assert len(types) == 6 and set(types.values()) == {"IQ4_NL"}


@pytest.mark.parametrize("make", [on_load, calibrated])
def test_what_was_skipped_stays_dense(make: Any, tmp_path: Path) -> None:
    source = llama(tmp_path / "dense", num_hidden_layers=2)
    made = make(source, tmp_path, type=Q4, modules_to_not_convert=["model.layers.1.mlp", "*.k_proj", "lm_head"])
    file, chosen, facts = written(made, Q4), mixture(Q4), ModelFacts("llama", 2, 4, 1)
    skipped = {"output", "blk.0.attn_k", "blk.1.attn_k", "blk.1.ffn_gate", "blk.1.ffn_up", "blk.1.ffn_down"}
    for name, info in file.tensors.items():
        dense = name.removesuffix(".weight") in skipped
        assert info.type is (GgmlType.BF16 if dense else chosen(name, info.shape, facts)), name
    again = open_gguf(write_gguf_model(source, tmp_path / "all.gguf", Q4)[0])
    assert all(info.type is chosen(name, info.shape, facts) for name, info in again.tensors.items())


def test_a_skipped_head_that_is_tied_keeps_the_embedding_dense(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense", num_hidden_layers=1, tie_word_embeddings=True)
    made = on_load(source, tmp_path, type=Q4, modules_to_not_convert=["lm_head"])
    types = {name: info.type for name, info in written(made, Q4).tensors.items()}
    assert types["token_embd.weight"] is GgmlType.BF16 and types["blk.0.attn_q.weight"] is GgmlType.Q4_K


def test_another_mixture_is_chosen_anew(tmp_path: Path) -> None:
    """What was left dense is then a weight as any other."""
    source = llama(tmp_path / "dense", num_hidden_layers=1)
    made = on_load(source, tmp_path, type="Q4_0", modules_to_not_convert=["*.mlp.*"])
    types = {name: info.type for name, info in written(made, "Q8_0").tensors.items() if len(info.shape) == 2}
    assert set(types.values()) == {GgmlType.Q8_0}
    with pytest.raises(FormatError, match="requantize"):
        write_gguf_model(made, tmp_path / "other.gguf", "Q5_K_M")
