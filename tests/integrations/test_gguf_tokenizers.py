"""Tokenizers to GGUF's metadata and back: the same tokens of any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lowbit.errors import FormatError
from lowbit.integrations.transformers.gguf.splits import BY_NAME, SPLITS, find_split
from lowbit.integrations.transformers.gguf.tokenizer import tokenizer_metadata, tokenizer_of
from lowbit.wire.gguf.values import Typed

TEXTS = [
    "Hello World's DON'T  3 333 33333",
    "  lead\n\n\n and\ttabs\r\n end  ",
    "ÜnïcÖdé 東京 🦙 ---''",
    "a <|x|> b",
    "",
]
_SPACE = "\u2581"


def read_back(tokenizer: Any, rows: int) -> tuple[dict[str, Any], Any]:
    stored = tokenizer_metadata(tokenizer, rows)
    metadata = {key: value.value if isinstance(value, Typed) else value for key, value in stored.items()}
    return metadata, tokenizer_of(metadata)


def byte_level(small: Path, name: str) -> Any:
    """The small model's vocabulary, splitting as `name` does."""
    data = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    split = BY_NAME[name]
    data["pre_tokenizer"] = split.json
    data["normalizer"] = {"type": split.normalizer} if split.normalizer else None
    data["model"]["ignore_merges"] = split.ignore_merges
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("name", [split.names[0] for split in SPLITS])
def test_byte_level(name: str, small: Path) -> None:
    original = byte_level(small, name)
    metadata, tokenizer = read_back(original, 8200)
    assert metadata["tokenizer.ggml.pre"] == name and len(metadata["tokenizer.ggml.tokens"]) == 8200
    for text in TEXTS:
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(original(text).input_ids) == original.decode(original(text).input_ids)


def test_every_name_splits_in_one_way() -> None:
    assert len(BY_NAME) == sum(len(split.names) for split in SPLITS)
    for split in SPLITS:
        normalizer = {"type": split.normalizer} if split.normalizer else None
        found = find_split(split.json, normalizer)
        assert found is split
        assert find_split({"type": "Sequence", "pretokenizers": [split.json]}, normalizer) is split
        assert find_split(split.json, {"type": "Lowercase"}) is None


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, small: Path) -> None:
    original = sentencepiece((small.parent / "sample.txt").read_text(encoding="utf-8"), prefix)
    metadata, tokenizer = read_back(original, 700)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert [metadata["tokenizer.ggml.token_type"][index] for index in (0, 1, 3, 600)] == [2, 3, 6, 1]
    for text in TEXTS:
        expected = original(text, add_special_tokens=False).input_ids
        assert tokenizer(text, add_special_tokens=False).input_ids == expected
        assert tokenizer.decode(expected) == original.decode(expected)


def sentencepiece(text: str, prefix: bool) -> Any:
    """A vocabulary such as SentencePiece's, with bytes to fall back to."""
    replace = normalizers.Replace(" ", _SPACE)
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.normalizer = replace
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator([text], trainers.BpeTrainer(vocab_size=640, special_tokens=special))
    data = json.loads(learner.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    data["model"]["fuse_unk"] = True
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    tokenizer.pre_tokenizer = None if prefix else pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_tokens([AddedToken("<|x|>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_begin_and_end_of_texts(small: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = "{{ messages[0].content }}"
    metadata, read = read_back(tokenizer, 8192)
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.add_eos_token"] is False
    assert read.chat_template == tokenizer.chat_template
    ids = read("a", add_special_tokens=False).input_ids
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert tokenizer_of(metadata)("a").input_ids == [*ids, 1]
    assert tokenizer_of(metadata)("a", "a").input_ids == [*ids, 1, *ids, 1]


def test_tokenizers_that_llama_cpp_has_no_words_for(small: Path) -> None:
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(FormatError, match="written for BPE"):
        tokenizer_metadata(other, 8)
    tokenizer = byte_level(small, "gpt-2")
    with pytest.raises(FormatError, match="without an embedding"):
        tokenizer_metadata(tokenizer, 100)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(FormatError, match="no name for this pre-tokenizer"):
        tokenizer_metadata(tokenizer, 8192)
