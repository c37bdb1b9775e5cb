"""Where in the model a weight is, read from its name: which stack of blocks, which block, which kind, which expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

# The order in which a block uses its weights; the files have them by the alphabet.
_ORDER: Final = (
    *("q_proj", "q", "query", "k_proj", "k", "key", "v_proj", "v", "value", "qkv_proj", "query_key_value", "c_attn"),
    *("o_proj", "o", "out_proj", "dense", "c_proj", "gate", "gate_proj", "w1", "up_proj", "w3", "gate_up_proj"),
    *("fc1", "c_fc", "dense_h_to_4h", "wi", "wi_0", "wi_1", "down_proj", "w2", "fc2", "dense_4h_to_h", "wo"),
)
_LONGEST_BLOCK: Final = 5  # digits


@dataclass(frozen=True)
class Place:
    """A weight's place.

    Attributes:
        stack: the path of the list of blocks (``model.layers``); empty outside of blocks.
        block: its number there.
        path: the rest of the name, with ``*`` for numbers (``mlp.experts.*.gate_proj``).
        kind: the shortest end of `path` that tells it from the others.
        expert: the number that `path` leaves out.
    """

    stack: str
    block: int | None
    path: str
    kind: str
    expert: int | None = None


def places(names: Collection[str]) -> dict[str, Place]:
    """The place of every weight, by name; in the order of the model."""
    parsed = {name: _parse(name) for name in names}
    kinds = _kinds({place.path for place in parsed.values()})
    found = {
        name: Place(place.stack, place.block, place.path, kinds[place.path], place.expert)
        for name, place in parsed.items()
    }
    ranks = {place: rank for rank, place in enumerate(_ORDER)}

    def key(name: str) -> tuple[bool, str, int, bool, int, str, int]:
        place = found[name]
        rank = ranks.get(place.path.rpartition(".")[2], len(ranks))
        is_expert = "*" in place.path or "expert" in place.path or "mlp" in place.path
        return (
            place.block is None,
            place.stack,
            place.block if place.block is not None else -1,
            is_expert,
            rank,
            place.path,
            place.expert if place.expert is not None else -1,
        )

    return {name: found[name] for name in sorted(found, key=key)}


def _parse(name: str) -> Place:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if _is_number(part) and position + 1 < len(parts):
            rest = parts[position + 1 :]
            numbers = [int(part) for part in rest if _is_number(part)]
            path = ".".join("*" if _is_number(part) else part for part in rest)
            is_expert = "expert" in path and numbers
            # Numbers that are no expert's belong to the kind (T5's ``layer.1.DenseReluDense.wi_0``).
            path = path if is_expert else ".".join(rest)
            return Place(".".join(parts[:position]), int(part), path, "", numbers[-1] if is_expert else None)
    return Place("", None, name, "")


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= _LONGEST_BLOCK


def _kinds(paths: Collection[str]) -> dict[str, str]:
    """The last words of each path, as many as tell it from all others."""
    words = {path: [part for part in path.split(".") if part != "*"] or [path] for path in paths}
    lengths = {path: _expert_words(words[path]) for path in paths}
    for _ in range(max(map(len, words.values()), default=0)):
        shared = defaultdict(list)
        for path in paths:
            shared[tuple(words[path][-lengths[path] :])].append(path)
        clashing = [path for group in shared.values() if len(group) > 1 for path in group]
        if not clashing:
            break
        for path in clashing:
            lengths[path] = min(lengths[path] + 1, len(words[path]))
    return {path: " ".join(words[path][-lengths[path] :]) for path in paths}


def _expert_words(words: list[str]) -> int:
    """How many words at the end say that a weight is an expert's; at least one."""
    first = next((number for number, word in enumerate(words) if "expert" in word), len(words) - 1)
    return len(words) - first
