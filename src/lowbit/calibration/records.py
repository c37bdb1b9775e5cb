"""Calibration documents: out of text files, JSONL files, and anything that yields strings or records."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.errors import PlanError

CHATS: Final = ("messages", "conversations", "conversation")  # columns that hold a list of messages
TEXT: Final = "text"
RECORD_FILES: Final = (".jsonl", ".ndjson", ".json")
# A larger text is represented by stretches spread over it: nothing else bounds what tokenizing takes.
WHOLE_BYTES: Final = 16 * 2**20
STRETCHES: Final = 64
_LONGEST_LINE: Final = 64 * 2**20  # bytes of one record of a file
_ROLES: Final = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_HINT: Final = "give a UTF-8 text file, a JSONL file, or a Dataset of the package 'datasets'"


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with a ``role`` and a ``content``, as chat templates take them."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """A text out of a record; to be told from one that was given as a plain string."""

    text: str


Document = str | Record | Chat | Tensor


def documents(entries: Iterable[Any], field: str | None, chats: bool = True) -> Iterator[Document]:
    """What each entry holds: a plain string, a record's text, a conversation, or token ids ``int64 [n]``.

    Args:
        entries: strings, records (mappings), lists or tensors of token ids; all of one kind.
        field: the field of a record that holds its text or conversation; None finds it.
        chats: whether a conversation goes before a text, where a record has both.

    Raises:
        PlanError: an entry is none of these, or of another kind than the first; names its number, from 0.
    """
    first: type | None = None
    for number, entry in enumerate(entries):
        found = _document(entry, f"record {number}", field, chats)
        first = type(found) if first is None else first
        if type(found) is not first:
            raise PlanError(
                f"record {number} of the dataset is {_kind(found)}, those before it are each {_KINDS[first]};"
                " give records of one kind"
            )
        yield found


_KINDS: Final[dict[type, str]] = {
    str: "a string",
    Record: "a record with a text",
    Chat: "a conversation",
    Tensor: "a list of token ids",
}


def _kind(found: Document) -> str:
    return _KINDS.get(type(found), type(found).__name__)


def _document(entry: Any, where: str, field: str | None, chats: bool) -> Document:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Tensor) or hasattr(entry, "__array__"):
        return token_ids(entry, where)
    if isinstance(entry, Mapping):
        return _of_record(entry, where, field, chats)
    if isinstance(entry, Sequence) and not isinstance(entry, bytes | bytearray):
        if entry and all(isinstance(part, Mapping) for part in entry):
            return Chat(_messages(entry, where))
        return token_ids(entry, where)
    raise PlanError(f"{where} of the dataset is of type '{type(entry).__name__}'; {_EXPECTED}")


_EXPECTED: Final = "expected a string, a record such as {'text': ...}, or a list of token ids"


def _of_record(record: Mapping[Any, Any], where: str, field: str | None, chats: bool) -> Document:
    if field is None and "input_ids" in record:
        return _masked_ids(record, where)
    name = field if field is not None else _find_field(record, chats)
    if name is None or name not in record:
        wanted = f"no field '{field}'" if field is not None else f"none of the fields {', '.join((TEXT, *CHATS))}"
        held = ", ".join(f"'{key}'" for key in record) or "no fields"
        raise PlanError(f"{where} of the dataset has {wanted}, it has {held}; name the one to use with text_field")
    value = record[name]
    if isinstance(value, str):
        return Record(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return Chat(_messages(value, f"field '{name}' of {where}"))
    raise PlanError(
        f"field '{name}' of {where} of the dataset is of type '{type(value).__name__}';"
        " expected a string or a list of messages"
    )


def _find_field(record: Mapping[Any, Any], chats: bool) -> str | None:
    order = (*CHATS, TEXT) if chats else (TEXT, *CHATS)
    return next((name for name in order if record.get(name) is not None), None)


def _messages(value: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Messages under the names that chat templates know."""
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise PlanError(f"message {number} in {where} is of type '{type(message).__name__}'; expected a mapping")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise PlanError(f"message {number} in {where} has no role; expected the fields 'role' and 'content'")
        rest = {key: item for key, item in message.items() if key not in ("role", "from", "content", "value")}
        text = _content(content, f"message {number} in {where}")
        messages.append({"role": _ROLES.get(role, role), "content": text, **rest})
    if not messages:
        raise PlanError(f"{where} is a conversation without messages; leave it out")
    return messages


def _content(content: Any, where: str) -> str:
    if content is None:  # a message that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise PlanError(f"the content of {where} is of type '{type(content).__name__}'; expected a string")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PlanError(f"the content of {where} holds a part of type '{kind}'; calibration takes text only")
    return "".join(part["text"] for part in content)


def token_ids(value: Any, where: str) -> Tensor:
    """Token ids as ``int64 [n]`` on the CPU, out of a list or tensor ``[n]`` or ``[1, n]``.

    Raises:
        PlanError: they are something else, or one of them is negative.
    """
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise PlanError(f"{where} of the dataset is not a list of token ids: {error}; {_EXPECTED}") from error
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    integers = ids.numel() == 0 or not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 1 or not integers:
        raise PlanError(
            f"{where} of the dataset has token ids of shape {list(ids.shape)} and dtype {ids.dtype};"
            " expected integers of shape [n] or [1, n]"
        )
    ids = ids.detach().to("cpu", torch.int64)
    if ids.numel() and int(ids.min()) < 0:
        raise PlanError(f"{where} of the dataset has the token id {int(ids.min())}; expected none below 0")
    return ids


def _masked_ids(record: Mapping[Any, Any], where: str) -> Tensor:
    """The ids of a tokenized record without its padding."""
    ids = token_ids(record["input_ids"], where)
    if record.get("attention_mask") is None:
        return ids
    mask = token_ids(record["attention_mask"], f"the attention mask of {where}")
    if mask.shape != ids.shape:
        raise PlanError(f"{where} of the dataset has {len(ids)} token ids and an attention mask of {len(mask)}")
    return ids[mask.bool()]


def read_texts(file: Path, most: int = WHOLE_BYTES) -> list[str]:
    """The text of a UTF-8 file, whole; of one with more than `most` bytes, evenly spread stretches of whole lines.

    Raises:
        PlanError: it can't be read, or is not UTF-8.
    """
    try:
        size = file.stat().st_size
        if size <= most:
            return [_decoded(file.read_bytes(), file, 0)]
        return _stretches(file, size, most // STRETCHES)
    except OSError as error:
        raise PlanError(f"the dataset '{file}' can't be read: {error.strerror}") from error


def _stretches(file: Path, size: int, each: int) -> list[str]:
    texts = []
    with file.open("rb") as handle:
        for number in range(STRETCHES):
            handle.seek(number * size // STRETCHES)
            if number:  # the line that this place lies in has begun before
                handle.readline(each)
            start = handle.tell()
            content = handle.read(each)
            cut = next((at for at, byte in enumerate(content[:3]) if byte & 0xC0 != 0x80), 0)  # inside a character
            texts.append(_whole_lines(_decoded(content[cut:], file, start + cut, final=False)))
    return texts


def _whole_lines(text: str) -> str:
    """Without the line that was cut off, except where there is no other."""
    return text[: text.rfind("\n") + 1] or text


def _decoded(content: bytes, file: Path, start: int, final: bool = True) -> str:
    """The text of bytes that begin at `start` of a file; unless `final`, they may end within a character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError as error:
        where = start + error.start
        raise PlanError(f"the dataset '{file}' is not UTF-8: {error.reason} at byte {where}; {_HINT}") from error


def read_records(file: Path) -> Iterator[Any]:
    """The values of a JSONL file, or of a file that is one JSON array.

    Raises:
        PlanError: it can't be read, or a line is not JSON; names the line.
    """
    try:
        with file.open("rb") as handle:
            start = handle.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
            handle.seek(0)
            if file.suffix == ".json" and start.startswith(b"["):
                yield from _array(file)
                return
            number = 0
            while line := handle.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise PlanError(f"line {number} of '{file}' has more than {_LONGEST_LINE} bytes; {_HINT}")
                if line.strip():
                    yield _parsed(line, f"line {number} of '{file}'")
    except OSError as error:
        raise PlanError(f"the dataset '{file}' can't be read: {error.strerror}") from error


def _array(file: Path) -> Iterable[Any]:
    if file.stat().st_size > _LONGEST_LINE:
        raise PlanError(f"'{file}' is one JSON array of more than {_LONGEST_LINE} bytes; write one record per line")
    value = _parsed(file.read_bytes(), f"'{file}'")
    return value if isinstance(value, list) else [value]


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PlanError(f"{where} is not UTF-8: {error.reason} at byte {error.start}; {_HINT}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{where} is not JSON: {error or 'nested too deep'}; {_HINT}") from error
