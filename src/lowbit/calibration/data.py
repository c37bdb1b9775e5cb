"""Calibration data: token ids out of texts, conversations, data sets and ready ids.

Where documents are packed, they are tokenized without special tokens as one text, which is cut into windows of
`length`. Where they are not, each is a sample of its own, tokenized as the tokenizer does by default (so that it begins
with the special tokens that the model expects), and cut where it is longer. Which samples are used is drawn from
`seed`: ``torch.randperm`` of all that there are, the first `samples` of it, in their order in the text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.calibration.named import NAMES, is_rows, named_rows, named_text
from lowbit.calibration.records import (
    RECORD_FILES,
    WHOLE_BYTES,
    Chat,
    Document,
    Record,
    documents,
    read_records,
    read_texts,
    token_ids,
)
from lowbit.errors import PlanError

# From a long data set, as many times the documents or windows that are wanted are read, and then chosen from.
_POOL: Final = 8
_BATCH_CHARACTERS: Final = 2**20  # of packed documents that are tokenized together, at most
_BETWEEN: Final = "\n\n"  # packed documents; what GPTQ's authors put between those of WikiText-2


@dataclass(frozen=True)
class DataConfig:
    """How samples are made of a data set.

    Attributes:
        samples: the most that are used.
        length: tokens in each, at most.
        packing: whether documents are put one after the other and cut into windows of `length`. None does so with the
            text of files and of records, and leaves strings that were given as such and conversations for themselves.
        chat_template: whether texts are rendered with the tokenizer's template. None does so with conversations where
            the tokenizer has one; True renders a plain text as one message of the user's; False joins the messages.
        seed: of the choice of samples.
        text_field: the field of a record that holds its text or its messages; None looks for "messages",
            "conversations", "conversation" and "text".
    """

    samples: int = 128
    length: int = 2048
    packing: bool | None = None
    chat_template: bool | None = None
    seed: int = 0
    text_field: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"{name} of calibration data is {value!r}; expected an integer of at least {least}")
        if self.seed >= 2**63:
            raise PlanError(f"seed of calibration data is {self.seed}; expected an integer below 2^63")


@dataclass(frozen=True)
class Calibration:
    """Samples to calibrate on.

    Attributes:
        samples: ``int64 [n]`` each, on the CPU; usually, but not always, of one length.
        description: one line about what they are.
        notes: what a user should know: fewer samples than were asked for, documents that were cut or left out.
    """

    samples: list[Tensor]
    description: str
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many there are in all samples."""
        return sum(len(sample) for sample in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(len(sample) for sample in self.samples)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(int(sample.max()) for sample in self.samples)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids and of where one sample ends and the next begins, as hexadecimal digits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little"))
            digest.update(sample.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[Tensor]:
        """Samples of equal length together, ``int64 [1..size, length]``.

        Lengths come in the order in which they first occur, samples of one length in theirs.

        Raises:
            PlanError: `size` is below 1.
        """
        if size < 1:
            raise PlanError(f"a batch of {size} samples holds nothing; give at least 1")
        by_length: dict[int, list[Tensor]] = {}
        for sample in self.samples:
            by_length.setdefault(len(sample), []).append(sample)
        for group in by_length.values():
            for start in range(0, len(group), size):
                yield torch.stack(group[start : start + size])


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model's config allows, or None where it names no limit."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(limit: int | None, length: int) -> None:
    """Refuse samples that are longer than a model allows.

    Args:
        limit: the model's positions (``max_position_embeddings``); None where it has no limit.
        length: tokens of the longest sample.

    Raises:
        PlanError: names both.
    """
    if limit is not None and length > limit:
        raise PlanError(
            f"calibration samples of {length} tokens are longer than the model's {limit} positions;"
            f" set their length to {limit} or less"
        )


def check_ids(vocabulary: int, calibration: Calibration) -> None:
    """Refuse token ids that a model's embedding of `vocabulary` rows doesn't have.

    Raises:
        PlanError: names the id. On a GPU the embedding itself would end the process.
    """
    largest = calibration.largest_id
    if largest >= vocabulary:
        raise PlanError(
            f"the calibration data has the token id {largest}, the model has ids below {vocabulary};"
            " tokenize with the tokenizer of this model"
        )


def load_calibration(dataset: Any, tokenizer: Any, config: DataConfig | None = None) -> Calibration:
    """Make samples of a data set.

    Args:
        dataset: a path to a UTF-8 text file or to a file of JSON records (.jsonl, .ndjson, .json); one of the names
            "wikitext2", "c4", "c4-new", "ptb", "ptb-new"; a list of strings; anything that yields strings or records
            (a ``Dataset`` or ``IterableDataset`` of the package ``datasets``), where a record has a text, messages or
            ``input_ids`` with or without an ``attention_mask``; or ready ids, as lists, as an integer tensor
            ``[n, length]``, or as a tokenizer returns them. Ready ids are not cut to ``config.length``.
        tokenizer: the model's, of Transformers; None will do for ready ids.
        config: by default :class:`DataConfig`'s own values.

    Raises:
        PlanError: the data is empty or of another kind; or it can't be read, with what was found and what to do.
    """
    config = config or DataConfig()
    loader = _Loader(tokenizer, config)
    if isinstance(dataset, Tensor):
        return loader.ready(_rows(dataset), f"ready ids, {list(dataset.shape)}")
    if isinstance(dataset, str) and dataset in NAMES:
        if is_rows(dataset):
            return loader.long_documents(named_rows(dataset), dataset)
        return loader.texts([named_text(dataset)], dataset)
    if isinstance(dataset, str | Path):
        return _from_file(loader, _existing(dataset))
    if isinstance(dataset, Mapping) and "input_ids" in dataset:
        return loader.entries(_tokenized(dataset), "tokenized texts")
    if isinstance(dataset, Mapping):
        held = ", ".join(f"'{key}'" for key in dataset)
        raise PlanError(f"the dataset is a mapping with {held}; give one split of it, or a list of records")
    if isinstance(dataset, bytes | bytearray) or not isinstance(dataset, Iterable):
        raise PlanError(f"a dataset of type '{type(dataset).__name__}' can't be read; {_EXPECTED}")
    return loader.entries(dataset, f"a {type(dataset).__name__}")


_EXPECTED: Final = (
    f"expected a text or JSONL file, a list of strings, a Dataset, token ids, or one of the names {', '.join(NAMES)}"
)


def _existing(dataset: str | Path) -> Path:
    path = Path(dataset)
    # The path of a whole text would be too long for the file system to ask about.
    if len(str(dataset)) > 4096 or "\n" in str(dataset) or not path.exists():
        raise PlanError(f"there is no file '{str(dataset)[:200]}'; {_EXPECTED} (a text itself goes into a list)")
    if not path.is_file():
        raise PlanError(f"the dataset '{path}' is {'a folder' if path.is_dir() else 'no regular file'}; {_EXPECTED}")
    return path


def _rows(ids: Tensor) -> list[Tensor]:
    if ids.dim() not in (1, 2):
        raise PlanError(f"ready ids have the shape {list(ids.shape)}; expected [n, length]")
    rows = ids.unsqueeze(0) if ids.dim() == 1 else ids
    return [token_ids(row, f"row {number}") for number, row in enumerate(rows)]


def _tokenized(batch: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """The records of what a tokenizer made of one text or of several."""
    ids, masks = batch["input_ids"], batch.get("attention_mask")
    if not len(ids) or isinstance(ids[0], int) or (isinstance(ids, Tensor) and ids.dim() == 1):
        return [{"input_ids": ids, "attention_mask": masks}]
    if masks is None:
        return [{"input_ids": row} for row in ids]
    if len(masks) != len(ids):
        raise PlanError(f"the dataset has {len(ids)} rows of token ids and {len(masks)} of attention masks")
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


def _from_file(loader: _Loader, path: Path) -> Calibration:
    if path.suffix in RECORD_FILES:
        return loader.entries(read_records(path), path.name)
    # A token takes four bytes of text or so; twice as much is read of a file that is not read whole.
    most = max(WHOLE_BYTES, _POOL * loader.config.samples * loader.config.length)
    texts = read_texts(path, most)
    if len(texts) > 1:
        loader.notes.append(f"'{path.name}' is large: {len(texts)} stretches of it are used, spread evenly")
    return loader.texts(texts, path.name)


class _Loader:
    """Makes a :class:`Calibration`, and keeps notes while it does."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.notes: list[str] = []

    # ------------------------------------------------------------------------------------------------- kinds of data

    def entries(self, entries: Iterable[Any], source: str) -> Calibration:
        """Strings, records or ids, whichever the first one is."""
        found = documents(entries, self.config.text_field, chats=self.config.chat_template is not False)
        first = next(found, None)
        if first is None:
            raise PlanError(f"the dataset ({source}) is empty; {_EXPECTED}")
        rest = itertools.chain([first], found)
        if isinstance(first, Tensor):
            return self.ready([ids for ids in self._pool(rest, source) if isinstance(ids, Tensor)], source)
        packing = isinstance(first, Record) if self.config.packing is None else self.config.packing
        return self._packed(rest, source) if packing else self._separate(rest, source)

    def texts(self, texts: list[str], source: str) -> Calibration:
        """Texts of which each is whole, or a stretch of one."""
        if not any(text.strip() for text in texts):
            raise PlanError(f"the dataset ({source}) is an empty text; {_EXPECTED}")
        if self.config.chat_template or self.config.packing is False:
            return self.entries(texts, source)
        return self._windows(torch.cat([self._ids(text, special=False) for text in texts]), source)

    def ready(self, samples: list[Tensor], source: str) -> Calibration:
        """Ids that somebody else has made."""
        return self._finish(self._chosen(self._without_empty(samples, source)), source)

    def long_documents(self, rows: Any, source: str) -> Calibration:
        """A window out of each of some documents that are long enough, as Optimum takes it from C4."""
        generator = torch.Generator().manual_seed(self.config.seed)
        length, samples = self.config.length, []
        for index in torch.randperm(len(rows), generator=generator).tolist():
            ids = self._ids(rows[index]["text"], special=True)
            if len(ids) < length:
                continue
            start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
            samples.append(ids[start : start + length])
            if len(samples) == self.config.samples:
                break
        if not samples:
            raise PlanError(f"no document of '{source}' has {length} tokens; ask for shorter samples")
        return self._finish(samples, source)

    # ----------------------------------------------------------------------------------------------------- tokenizing

    def _packed(self, found: Iterator[Document], source: str) -> Calibration:
        wanted = _POOL * self.config.samples * self.config.length
        pieces: list[Tensor] = []
        held, used = 0, 0
        rendered = map(self._rendered, found)
        together = min(_BATCH_CHARACTERS, 2 * wanted)  # a stream may be slow, or have no end
        for batch in _batches_of((text for text in rendered if text.strip()), together):
            pieces.append(self._ids("".join(batch), special=False))
            held, used = held + len(pieces[-1]), used + len(batch)
            if held >= wanted:
                self.notes.append(f"the first {used} documents of {source} hold enough; others were not read")
                break
        if not pieces:
            raise PlanError(f"the dataset ({source}) has no tokens: all its documents are empty; {_EXPECTED}")
        return self._windows(torch.cat(pieces), source)

    def _separate(self, found: Iterator[Document], source: str) -> Calibration:
        samples = [self._sample(document) for document in self._pool(found, source)]
        samples = self._chosen(self._without_empty(samples, source))
        longer = sum(len(sample) > self.config.length for sample in samples)
        if longer:
            self.notes.append(
                f"{_counted(longer, 'document')} of more than {self.config.length} tokens cut to the first"
                " (packing=True uses all)"
            )
        return self._finish([sample[: self.config.length] for sample in samples], source)

    def _sample(self, document: Document) -> Tensor:
        text = self._text(document)
        # Of an empty text, a tokenizer may make special tokens.
        return self._ids(text if text.strip() else "", special=bool(text.strip()) and not self._templated(document))

    def _pool(self, found: Iterator[Document], source: str) -> list[Document]:
        """The documents that samples are chosen from; a data set may go on for ever."""
        limit = _POOL * self.config.samples
        pool = list(itertools.islice(found, limit))
        if next(found, None) is not None:
            self.notes.append(f"the samples are from the first {limit} documents of {source}; others were not read")
        return pool

    def _windows(self, ids: Tensor, source: str) -> Calibration:
        length = self.config.length
        count = len(ids) // length
        if count == 0:
            if len(ids) == 0:
                raise PlanError(f"the dataset ({source}) has no tokens; {_EXPECTED}")
            self.notes.append(f"{source} has {len(ids)} tokens, less than one window of {length}; they are one sample")
            return self._finish([ids], source)
        return self._finish(self._chosen(list(ids[: count * length].view(count, length))), source)

    def _rendered(self, document: Document) -> str:
        """A document as it stands among others."""
        return self._text(document) + ("" if self._templated(document) else _BETWEEN)

    def _text(self, document: Document) -> str:
        text = document.text if isinstance(document, Record) else document
        if self._templated(document):
            messages = text.messages if isinstance(text, Chat) else [{"role": "user", "content": text}]
            return self._apply_template(messages)
        if isinstance(text, Chat):
            return "\n".join(message["content"] for message in text.messages)
        return str(text)

    def _templated(self, document: Document) -> bool:
        wanted = self.config.chat_template
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if wanted and not has_template:
            raise PlanError("chat_template is asked for, and the tokenizer has none; leave it out or set False")
        return isinstance(document, Chat) and has_template if wanted is None else wanted

    def _apply_template(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            raise PlanError(f"the chat template can't render a conversation of {roles}: {error}") from error

    def _ids(self, text: str, *, special: bool) -> Tensor:
        if self.tokenizer is None:
            raise PlanError("texts need the model's tokenizer; pass it, or pass token ids")
        # `verbose` would warn about texts that are longer than the model's context.
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    # ------------------------------------------------------------------------------------------------------- choosing

    def _without_empty(self, samples: list[Tensor], source: str) -> list[Tensor]:
        kept = [sample for sample in samples if len(sample)]
        if not kept:
            raise PlanError(f"the dataset ({source}) has no tokens: {len(samples)} samples, all empty; {_EXPECTED}")
        if len(kept) < len(samples):
            self.notes.append(f"{_counted(len(samples) - len(kept), 'document')} without tokens left out")
        return kept

    def _chosen(self, samples: list[Tensor]) -> list[Tensor]:
        """As many as are asked for, drawn from the seed and in order."""
        if len(samples) <= self.config.samples:
            return samples
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.config.seed))
        return [samples[index] for index in sorted(order[: self.config.samples].tolist())]

    def _finish(self, samples: list[Tensor], source: str) -> Calibration:
        if len(samples) < self.config.samples:
            self.notes.append(f"{source} gives {len(samples)} of the {self.config.samples} samples that were asked for")
        lengths = sorted({len(sample) for sample in samples})
        of = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        description = f"{_counted(len(samples), 'sample')} of {of} tokens from {source}, seed {self.config.seed}"
        return Calibration([sample.clone() for sample in samples], description, self.notes)


def _batches_of(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts of so many characters together."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
