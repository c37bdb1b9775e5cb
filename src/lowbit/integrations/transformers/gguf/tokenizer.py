"""Tokenizers in a GGUF file's metadata, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.errors import FormatError
from lowbit.integrations.transformers.gguf.splits import BY_NAME, Split, find_split
from lowbit.wire.gguf.values import Typed, ValueType

_PREFIX: Final = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE: Final = "\u2581"
_SPECIAL: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes.

    Raises:
        FormatError: there is none, its arrays don't fit together, or it is of a kind that lowbit doesn't know.
    """
    kind, tokens = metadata.get(f"{_PREFIX}model"), _tokens(metadata)
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(metadata, tokens), True
    else:
        raise FormatError("unknown kind of tokenizer", found=repr(kind)[:80], expected="gpt2 or llama")
    _add_tokens(tokenizer, tokens, _types(metadata, len(tokens)))
    special = {name: tokens[index] for name, index in _special_ids(metadata, len(tokens)).items()}
    _frame(tokenizer, metadata, special, adds_bos)
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **special,
        **({"chat_template": template} if isinstance(template, str) else {}),
        **({"model_max_length": context} if type(context) is int else {}),
    )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise FormatError("the file has no list of tokens", tensor=f"{_PREFIX}tokens", found=type(tokens).__name__)
    return tokens


def _array(metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...], length: int) -> list[Any] | None:
    """An array beside the tokens, or None where there is none."""
    values = metadata.get(f"{_PREFIX}{name}")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != length or not all(isinstance(value, kind) for value in values):
        raise FormatError(
            "an array doesn't fit the tokens", tensor=f"{_PREFIX}{name}",
            found=len(values) if isinstance(values, list) else type(values).__name__, expected=length,
        )  # fmt: skip
    return values


def _types(metadata: Mapping[str, Any], length: int) -> list[int]:
    return _array(metadata, "token_type", int, length) or [_NORMAL] * length


def _special_ids(metadata: Mapping[str, Any], length: int) -> dict[str, int]:
    found = {}
    for name, key in _SPECIAL.items():
        index = metadata.get(f"{_PREFIX}{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < length:
            raise FormatError("no such token", tensor=f"{_PREFIX}{key}_token_id", found=repr(index)[:40])
        found[name] = index
    return found


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    name = metadata.get(f"{_PREFIX}pre", "default")
    split = BY_NAME.get(name) if isinstance(name, str) else None
    if split is None:
        raise FormatError(
            "unknown pre-tokenizer", tensor=f"{_PREFIX}pre", found=repr(name)[:80], expected=sorted(BY_NAME)
        )
    merges = metadata.get(f"{_PREFIX}merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise FormatError("a byte-level vocabulary has merges", tensor=f"{_PREFIX}merges", found=type(merges).__name__)
    model = _bpe(tokens, [_pair(merge) for merge in merges], ignore_merges=split.ignore_merges)
    data = json.loads(Tokenizer(model).to_str())
    data["pre_tokenizer"] = split.json
    data["normalizer"] = {"type": split.normalizer} if split.normalizer else None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.adds_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise FormatError("a merge is two tokens", tensor=f"{_PREFIX}merges", found=merge[:40])
    return left, right


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # tokenizers raises nothing more special
        raise FormatError(f"the merges don't fit the tokens: {error}", tensor=f"{_PREFIX}merges") from error


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = _array(metadata, "scores", (int, float), len(tokens))
    if scores is None:
        raise FormatError("a SentencePiece vocabulary has scores", tensor=f"{_PREFIX}scores")
    types = _types(metadata, len(tokens))
    # Tokens of spaces stand in the file as spaces, and in the text as what replaces them.
    spelled = [token.replace(" ", _SPACE) if token.isspace() and " " in token else token for token in tokens]
    unknown = _special_ids(metadata, len(tokens)).get("unk_token", next(iter(_of(types, _UNKNOWN)), None))
    options = {} if unknown is None else {"unk_token": spelled[unknown], "fuse_unk": True}
    tokenizer = Tokenizer(_bpe(spelled, merges_of(spelled, scores, types), byte_fallback=True, **options))
    prefix = metadata.get(f"{_PREFIX}add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _of(types: list[int], kind: int) -> Iterable[int]:
    return (index for index, found in enumerate(types) if found == kind)


def merges_of(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores stands for, best first: every way to make a token of two others."""
    known = {token: index for index, token in enumerate(tokens) if types[index] not in (_CONTROL, _UNUSED, _BYTE)}
    found = []
    for token, index in known.items():
        for cut in range(1, len(token)):
            left, right = known.get(token[:cut]), known.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are found in the text as they are."""
    known = tokenizer.get_vocab()
    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
        listed = [tokens[index] for index in _of(types, kind) if tokens[index] in known]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in listed])


def _frame(tokenizer: Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str], adds_bos: bool) -> None:
    """Begin and end texts as the file says."""
    wanted = {
        "bos_token": metadata.get(f"{_PREFIX}add_bos_token", adds_bos),
        "eos_token": metadata.get(f"{_PREFIX}add_eos_token", False),
    }
    start, end = (
        [special[name]] if wanted[name] is True and name in special else [] for name in ("bos_token", "eos_token")
    )
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if _is_byte_level(tokenizer) else []
    if start or end:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*start, *end])]
        steps.append(
            processors.TemplateProcessing(
                single=[*start, "$A", *end],
                pair=[*start, "$A", *end, *(f"{token}:1" for token in start), "$B:1", *(f"{t}:1" for t in end)],
                special_tokens=ids,
            )
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


# ---------------------------------------------------------------- writing


def tokenizer_metadata(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """The metadata of a Transformers tokenizer for a model with `vocabulary` rows of embeddings.

    Raises:
        FormatError: llama.cpp has no tokenizer of this kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError("the tokenizer has no tokenizer.json", found=type(tokenizer).__name__)
    data = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise FormatError("llama.cpp's tokenizers are written for BPE", found=model.get("type"))
    known = dict(model["vocab"]) | {token["content"]: token["id"] for token in data["added_tokens"]}
    if max(known.values(), default=-1) >= vocabulary:
        raise FormatError("the tokenizer has tokens without an embedding", found=max(known.values()) + 1)
    names = {index: token for token, index in known.items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    types = [_NORMAL if index in names else _UNUSED for index in range(vocabulary)]
    for token in data["added_tokens"]:
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    merges = [_pair(merge) if isinstance(merge, str) else (merge[0], merge[1]) for merge in model["merges"]]
    if (data.get("decoder") or {}).get("type") == "ByteLevel":
        body = _write_byte_level(data, tokens, types, merges)
    else:
        body = _write_sentencepiece(data, tokens, types, merges)
    return {**body, **_write_special(tokenizer)}


def _write_byte_level(
    data: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    split: Split | None = find_split(data.get("pre_tokenizer"), data.get("normalizer"))
    if split is None:
        found = {"normalizer": data.get("normalizer"), "pre_tokenizer": data.get("pre_tokenizer")}
        raise FormatError("llama.cpp has no name for this pre-tokenizer", found=json.dumps(found)[:400])
    return {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": split.names[0],
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}token_type": Typed(types, ValueType.INT32),
        f"{_PREFIX}merges": Typed([f"{left} {right}" for left, right in merges], ValueType.STRING),
    }


def _write_sentencepiece(
    data: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    """Scores are made of the order of the merges, which is what llama.cpp merges by."""
    if not data["model"].get("byte_fallback"):
        raise FormatError("llama.cpp has no tokenizer of this kind", found="BPE, neither byte-level nor SentencePiece")
    known = {token: index for index, token in enumerate(tokens)}
    scores = [0.0] * len(tokens)
    for rank, (left, right) in enumerate(merges):
        index = known.get(left + right)
        if index is not None and not scores[index]:
            scores[index] = -1.0 - rank
    for index, token in enumerate(tokens):
        if types[index] == _NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = _BYTE
    unknown = data["model"].get("unk_token")
    if unknown in known:
        types[known[unknown]] = _UNKNOWN
    spelled = [
        token.replace(_SPACE, " ") if kind == _USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    return {
        f"{_PREFIX}model": "llama",
        f"{_PREFIX}pre": "default",
        f"{_PREFIX}tokens": spelled,
        f"{_PREFIX}scores": Typed(scores, ValueType.FLOAT32),
        f"{_PREFIX}token_type": Typed(types, ValueType.INT32),
        f"{_PREFIX}add_space_prefix": '"prepend"' in json.dumps(data.get("normalizer"))
        or _prepends(data.get("pre_tokenizer")),
    }


def _prepends(pre_tokenizer: Any) -> bool:
    """Whether a `Metaspace` puts a space before the text."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    return any(part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)


def _write_special(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        index = getattr(tokenizer, f"{name}_id", None)
        if index is not None:
            found[f"{_PREFIX}{key}_token_id"] = int(index)
    ids = tokenizer.encode("a")
    found[f"{_PREFIX}add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    found[f"{_PREFIX}add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found
