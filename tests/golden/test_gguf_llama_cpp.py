"""llama.cpp runs the files that lowbit writes, and says what lowbit says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowbit
from apart import require, run
from lowbit.integrations.transformers.gguf.export import write_gguf_model

PROMPT, COUNT = "The history of the", 8
NAMES = ("F16", "Q8_0", "Q4_K_M", "IQ4_XS", "MXFP4", "TQ2_0")
# llama.cpp rounds activations to 8 bits where weights are quantized, so that where two words are as likely as one
# another it may take the other. These agree in every word.
EQUAL = ("F16", "Q8_0")


@pytest.fixture(scope="module")
def texts(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    require("xllamacpp")
    folder = tmp_path_factory.mktemp("llama")
    for name in NAMES:
        write_gguf_model(small, folder / f"{name}.gguf", name)
    run("original_llama.py", folder, PROMPT, str(COUNT))
    return folder, json.loads((folder / "texts.json").read_text(encoding="utf-8"))


def test_every_file_runs(texts: tuple[Path, dict[str, str]]) -> None:
    said = texts[1]
    assert set(said) == set(NAMES) and all(said.values())


@pytest.mark.parametrize("name", EQUAL)
def test_both_say_the_same(name: str, texts: tuple[Path, dict[str, str]]) -> None:
    folder, said = texts
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder / f"{name}.gguf", dtype=torch.float32)
    tokenizer = lowbit.AutoTokenizer.from_pretrained(folder / f"{name}.gguf")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)
    assert tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) == said[name]
