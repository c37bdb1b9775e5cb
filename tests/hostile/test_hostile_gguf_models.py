"""GGUF files whose container is sound and whose model is not: one FormatError, never a model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.errors import FormatError
from lowbit.integrations.transformers.gguf.export import write_gguf_model
from lowbit.wire.gguf.container import Gguf, open_gguf
from lowbit.wire.gguf.types import GgmlType
from lowbit.wire.gguf.writer import Entry, write_gguf


@pytest.fixture(scope="module")
def sound(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Gguf:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf_model(small, path, "Q8_0")
    return open_gguf(path)


def changed(
    sound: Gguf, folder: Path, metadata: dict[str, Any] | None = None, tensors: dict[str, Entry | None] | None = None
) -> Path:
    """The file with other metadata, and with tensors replaced or (None) left out; without its tokenizer."""
    kept = {key: value for key, value in sound.metadata.items() if not key.startswith("tokenizer.ggml.")}
    entries = [
        Entry(name, info.shape, info.type, lambda name=name: sound.raw(name)) for name, info in sound.tensors.items()
    ]
    swapped = [(tensors or {}).get(entry.name, entry) for entry in entries]
    write_gguf(folder / "x.gguf", kept | (metadata or {}), [entry for entry in swapped if entry is not None])
    return folder / "x.gguf"


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight"])
def test_a_tensor_is_missing(name: str, sound: Gguf, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lacks|no embedding"):
        lowbit.AutoModelForCausalLM.from_pretrained(changed(sound, tmp_path, tensors={name: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_length", 512), ("feed_forward_length", 512), ("attention.head_count", 8),
        ("attention.head_count_kv", 1), ("attention.key_length", 32), ("rope.freq_base", 0.0),
    ],
)  # fmt: skip
def test_the_configuration_contradicts_the_tensors(key: str, value: Any, sound: Gguf, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        lowbit.AutoModelForCausalLM.from_pretrained(changed(sound, tmp_path, {f"llama.{key}": value}))


def test_a_vector_of_another_length(sound: Gguf, tmp_path: Path) -> None:
    wrong = Entry("output_norm.weight", (32,), GgmlType.F32, lambda: bytes(128))
    with pytest.raises(FormatError, match="not the model's"):
        lowbit.AutoModelForCausalLM.from_pretrained(changed(sound, tmp_path, tensors={"output_norm.weight": wrong}))


def test_rows_scaled_by_factors_of_no_known_kind(sound: Gguf, tmp_path: Path) -> None:
    factors = Entry("rope_freqs.weight", (32,), GgmlType.F32, lambda: bytes(128))
    path = changed(sound, tmp_path, tensors={"output_norm.weight": factors})
    with pytest.raises(FormatError, match="not Llama 3's"):
        lowbit.AutoConfig.from_pretrained(path)
