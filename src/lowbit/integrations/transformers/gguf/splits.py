"""How byte-level vocabularies split text before they merge: llama.cpp's names, and the same as `tokenizers` spells it.

Data in both directions: a name gives the JSON of a pre-tokenizer, and the JSON in a model's ``tokenizer.json`` a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Json = dict[str, Any]

_SUFFIX: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD: Final = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_OR_SLASH: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES: Final = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(*alternatives: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": "|".join(alternatives)}, "behavior": "Isolated", "invert": False}


def _sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _by(*alternatives: str) -> Json:
    return _sequence(_split(*alternatives), _byte_level(False))


@dataclass(frozen=True)
class Split:
    """One way of splitting.

    Attributes:
        names: what llama.cpp calls it; the first is written.
        json: the pre-tokenizer.
        ignore_merges: whether a word that is a token is one, whatever the merges say.
        normalizer: what these tokenizers do before; llama.cpp does nothing.
        adds_bos: whether llama.cpp starts texts with the first token unless the file says otherwise.
    """

    names: tuple[str, ...]
    json: Json
    ignore_merges: bool = False
    normalizer: str | None = None
    adds_bos: bool = False


_DIGITS: Final = {"type": "Digits", "individual_digits": True}
_NUMBERS: Final = {"type": "Digits", "individual_digits": False}
_PUNCTUATION: Final = {"type": "Punctuation", "behavior": "Contiguous"}

SPLITS: Final[tuple[Split, ...]] = (
    Split(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum"), _byte_level(True)),
    Split(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _by(_SUFFIX, _WORD, r"\p{N}{1,3}", _SIGNS, *_SPACES),
        ignore_merges=True,
        adds_bos=True,
    ),
    Split(
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan"),
        _by(_SUFFIX, _WORD, r"\p{N}", _SIGNS, *_SPACES),
        normalizer="NFC",
    ),
    Split(("stablelm2",), _by(_SUFFIX, _WORD, r"\p{N}", _SIGNS, *_SPACES)),
    Split(
        ("qwen35",),
        _by(_SUFFIX, _MARKED_WORD, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", *_SPACES),
        normalizer="NFC",
    ),
    Split(("tekken",), _by(*_CASED, r"\p{N}", _SIGNS_OR_SLASH, *_SPACES), ignore_merges=True, adds_bos=True),
    Split(
        ("gpt-4o", "llama4", "kanana2"),
        _by(*(f"{word}{_SUFFIX}?" for word in _CASED), r"\p{N}{1,3}", _SIGNS_OR_SLASH, *_SPACES),
    ),
    Split(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
        _sequence(_DIGITS, _byte_level(True)),
    ),
    Split(("falcon",), _sequence(_PUNCTUATION, _byte_level(True), _split(r"[0-9][0-9][0-9]"))),
    Split(("default",), _sequence(_PUNCTUATION, _byte_level(True), _NUMBERS, _split(r"[0-9][0-9][0-9]"))),
)

BY_NAME: Final[Mapping[str, Split]] = {name: split for split in SPLITS for name in split.names}


def find_split(pre_tokenizer: Any, normalizer: Any) -> Split | None:
    """The way of splitting that a ``tokenizer.json`` describes; None where llama.cpp has no name for it."""
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    matching = [split for split in SPLITS if _plain(split.json) == _plain(pre_tokenizer)]
    exact = [split for split in matching if split.normalizer == kind]
    return next(iter(exact), None)


def _plain(json: Any) -> Any:
    """Without what changes offsets only, and without a sequence of one."""
    if isinstance(json, list):
        return [_plain(entry) for entry in json]
    if not isinstance(json, dict):
        return json
    if json.get("type") == "Sequence" and len(json.get("pretokenizers", ())) == 1:
        return _plain(json["pretokenizers"][0])
    return {key: _plain(value) for key, value in json.items() if key != "trim_offsets"}
