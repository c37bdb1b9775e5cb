"""Calibration data: every kind of data set, which samples are chosen, and what is refused."""

from __future__ import annotations

import builtins
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from lowbit.calibration import data, records
from lowbit.calibration.data import Calibration, DataConfig, check_ids, check_length, load_calibration
from lowbit.calibration.named import NAMES
from lowbit.calibration.records import STRETCHES, read_texts
from lowbit.errors import PlanError

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "What is a river?"}, {"role": "assistant", "content": "Water that flows."}]
SHAREGPT = [{"from": "human", "value": "What is a river?"}, {"from": "gpt", "value": "Water that flows."}]
Write = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(small)


@pytest.fixture(scope="module")
def chatty(small: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def sample(small: Path) -> str:
    return (small.parent / "sample.txt").read_bytes().decode("utf-8")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, content: str) -> Path:
        (tmp_path / name).write_bytes(content.encode())
        return tmp_path / name

    return file


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_protocol_of_a_text_file(testbed: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(testbed / "base")
    whole = (testbed / "calib.txt").read_bytes().decode()
    ids = torch.tensor(plain_ids(tokenizer, whole))
    assert len(ids) == 477_120

    def tokenized_before(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert text == whole and not add_special_tokens
        return {"input_ids": ids.tolist()}

    made = load_calibration(testbed / "calib.txt", tokenized_before, DataConfig(128, 1024, seed=20240611))
    windows = ids[: 465 * 1024].view(465, 1024)
    order = torch.randperm(465, generator=torch.Generator().manual_seed(20240611))
    assert torch.equal(torch.stack(made.samples), windows[order[:128].sort().values])
    assert made.tokens == 128 * 1024
    assert made.notes == []
    assert made.description == "128 samples of 1024 tokens from calib.txt, seed 20240611"


def test_windows_of_a_text(tokenizer: Any, sample: str, write: Write) -> None:
    path = write("sample.txt", sample)
    ids = torch.tensor(plain_ids(tokenizer, sample))
    count = len(ids) // 64
    everything = load_calibration(path, tokenizer, DataConfig(count, 64))
    assert torch.equal(torch.cat(everything.samples), ids[: count * 64])
    some = load_calibration(str(path), tokenizer, DataConfig(5, 64, seed=3))
    places = [next(i for i, all_ in enumerate(everything.samples) if torch.equal(all_, one)) for one in some.samples]
    assert places == sorted(set(places)) and len(places) == 5
    other = load_calibration(path, tokenizer, DataConfig(5, 64, seed=4))
    assert some.fingerprint == load_calibration(path, tokenizer, DataConfig(5, 64, seed=3)).fingerprint
    assert some.fingerprint != other.fingerprint


def test_fewer_windows_than_asked_for_are_all_used_and_said(tokenizer: Any, sample: str, write: Write) -> None:
    made = load_calibration(write("sample.txt", sample), tokenizer, DataConfig(1000, 256))
    assert len(made.samples) == len(plain_ids(tokenizer, sample)) // 256
    assert made.notes == [f"sample.txt gives {len(made.samples)} of the 1000 samples that were asked for"]


def test_a_text_shorter_than_a_window_is_one_sample(tokenizer: Any, write: Write) -> None:
    made = load_calibration(write("short.txt", "A river."), tokenizer, DataConfig(1, 256))
    assert [sample.tolist() for sample in made.samples] == [plain_ids(tokenizer, "A river.")]
    assert "less than one window of 256" in made.notes[0]


def test_strings_are_samples_of_their_own(tokenizer: Any, sample: str) -> None:
    texts = ["auto-gptq is an easy-to-use model quantization library.", "A river.", "", sample]
    made = load_calibration(texts, tokenizer, DataConfig(4, 32))
    expected = [tokenizer(text, verbose=False)["input_ids"][:32] for text in texts if text]
    assert [ids.tolist() for ids in made.samples] == expected
    assert made.notes[0] == "1 document without tokens left out"
    assert made.notes[1].startswith("1 document of more than 32 tokens cut to the first")


def test_strings_can_be_packed(tokenizer: Any) -> None:
    made = load_calibration(["A river.", "The town."], tokenizer, DataConfig(1, 4, packing=True))
    assert made.samples[0].tolist() == plain_ids(tokenizer, "A river.\n\nThe town.\n\n")[:4]


def test_a_text_file_can_be_left_unpacked(tokenizer: Any, sample: str, write: Write) -> None:
    made = load_calibration(write("sample.txt", sample), tokenizer, DataConfig(1, 16, packing=False))
    assert [ids.tolist() for ids in made.samples] == [tokenizer(sample, verbose=False)["input_ids"][:16]]


def test_more_strings_than_samples_are_chosen_from(tokenizer: Any) -> None:
    texts = [f"The town number {number}." for number in range(40)]
    made = load_calibration(texts, tokenizer, DataConfig(10, 32, seed=1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:10].sort().values.tolist()
    assert [ids.tolist() for ids in made.samples] == [tokenizer(texts[place])["input_ids"] for place in order]


def test_records_of_jsonl_are_packed(tokenizer: Any, sample: str, write: Write) -> None:
    parts = sample.split("\n")
    path = write("data.jsonl", "\ufeff" + lines([{"text": part, "id": 3} for part in parts]) + "\n")
    made = load_calibration(path, tokenizer, DataConfig(1000, 64))
    ids = plain_ids(tokenizer, "".join(part + "\n\n" for part in parts if part))
    assert torch.cat(made.samples).tolist() == ids[: len(ids) // 64 * 64]
    named = write("data.ndjson", lines([{"body": part, "text": ""} for part in parts]))
    assert load_calibration(named, tokenizer, DataConfig(1000, 64, text_field="body")).fingerprint == made.fingerprint
    array = write("data.json", json.dumps([{"text": part} for part in parts]))
    assert load_calibration(array, tokenizer, DataConfig(1000, 64)).fingerprint == made.fingerprint
    strings = write("strings.jsonl", lines(parts))
    packed = load_calibration(strings, tokenizer, DataConfig(1000, 64, packing=True))
    assert packed.fingerprint == made.fingerprint


@pytest.mark.parametrize("record", [{"messages": CHAT}, {"conversations": SHAREGPT}, {"text": "x", "messages": CHAT}])
def test_conversations_are_rendered(chatty: Any, write: Write, record: dict[str, Any]) -> None:
    rendered = "<|user|>What is a river?\n<|assistant|>Water that flows.\n"
    made = load_calibration(write("chats.jsonl", lines([record, record])), chatty, DataConfig(2, 64))
    assert [ids.tolist() for ids in made.samples] == 2 * [plain_ids(chatty, rendered)]
    packed = load_calibration([record, record], chatty, DataConfig(1, 20, packing=True))
    assert packed.samples[0].tolist() == plain_ids(chatty, rendered + rendered)[:20]


def test_conversations_without_a_template(tokenizer: Any, chatty: Any) -> None:
    plain = [tokenizer("What is a river?\nWater that flows.")["input_ids"]]
    assert [ids.tolist() for ids in load_calibration([CHAT], tokenizer).samples] == plain
    off = DataConfig(chat_template=False)
    assert [ids.tolist() for ids in load_calibration([{"messages": CHAT}], chatty, off).samples] == plain
    text = load_calibration([{"text": "A river.", "messages": CHAT}], chatty, off).samples[0].tolist()
    assert text == plain_ids(chatty, "A river.\n\n")
    with pytest.raises(PlanError, match="the tokenizer has none"):
        load_calibration([CHAT], tokenizer, DataConfig(chat_template=True))


def test_texts_can_be_rendered_too(chatty: Any) -> None:
    made = load_calibration(["A river."], chatty, DataConfig(chat_template=True))
    assert made.samples[0].tolist() == plain_ids(chatty, "<|user|>A river.\n")


def test_parts_of_a_message(chatty: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a river?"}]
    made = load_calibration([[{"role": "user", "content": parts}, *CHAT[1:]]], chatty)
    assert made.fingerprint == load_calibration([CHAT], chatty).fingerprint
    with pytest.raises(PlanError, match="message 0 in record 0 holds a part of type 'image'"):
        load_calibration([[{"role": "user", "content": [{"type": "image"}]}]], chatty)


def test_a_template_that_refuses(chatty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatty, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PlanError, match="can't render a conversation of user, assistant: roles must alternate"):
        load_calibration([CHAT], chatty)


def test_anything_that_yields_records(tokenizer: Any, sample: str) -> None:
    parts = sample.split("\n")

    class Dataset:
        def __iter__(self) -> Iterator[dict[str, str]]:
            return ({"text": part} for part in parts)

    made = load_calibration(Dataset(), tokenizer, DataConfig(1000, 64))
    again = load_calibration([{"text": part} for part in parts], tokenizer, DataConfig(1000, 64))
    assert made.fingerprint == again.fingerprint


def test_a_dataset_of_the_package(tokenizer: Any, sample: str) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"text": part} for part in sample.split("\n")]
    wanted = load_calibration(records, tokenizer, DataConfig(8, 64)).fingerprint
    made = datasets.Dataset.from_list(records)
    for source in (made, made.to_iterable_dataset()):
        assert load_calibration(source, tokenizer, DataConfig(8, 64)).fingerprint == wanted
    with pytest.raises(PlanError, match="mapping with 'train'"):
        load_calibration(datasets.DatasetDict({"train": made}), tokenizer)


def test_streams_without_an_end(tokenizer: Any, sample: str) -> None:
    records = ({"text": sample[:2000]} for _ in itertools.count())
    made = load_calibration(records, tokenizer, DataConfig(4, 64))
    assert len(made.samples) == 4
    assert "others were not read" in made.notes[0]
    made = load_calibration((f"Town {number}." for number in itertools.count()), tokenizer, DataConfig(4, 64))
    assert made.notes == ["the samples are from the first 32 documents of a generator; others were not read"]


READY: dict[str, Any] = {
    "tensor": torch.tensor([[5, 6, 7], [8, 9, 10]]),
    "int32 tensor": torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32),
    "lists": [[5, 6, 7], [8, 9, 10]],
    "tensors [1, n]": [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])],
    "records": [{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([[8, 9, 10]])}],
    "an array": np.array([[5, 6, 7], [8, 9, 10]]),
    "a padded batch": {
        "input_ids": torch.tensor([[0, 5, 6, 7], [8, 9, 10, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]),
    },
    "a batch of lists": {"input_ids": [[5, 6, 7], [8, 9, 10]]},
    "padded records": [
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": torch.tensor([[8, 9, 10, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
    ],
}


@pytest.mark.parametrize("kind", READY)
def test_ready_ids(kind: str) -> None:
    made = load_calibration(READY[kind], None, DataConfig(samples=2, length=2))
    assert [ids.tolist() for ids in made.samples] == [[5, 6, 7], [8, 9, 10]]
    assert all(ids.dtype == torch.int64 for ids in made.samples)
    assert made.notes == []
    assert made.fingerprint == load_calibration(READY["tensor"], None).fingerprint


def test_what_a_tokenizer_returns(tokenizer: Any) -> None:
    texts = ["The town lies on the river.", "A river."]
    wanted = load_calibration(texts, tokenizer).fingerprint
    assert load_calibration([tokenizer(text) for text in texts], tokenizer).fingerprint == wanted
    assert load_calibration([tokenizer(text, return_tensors="pt") for text in texts], tokenizer).fingerprint == wanted
    assert load_calibration(tokenizer(texts, padding=True, return_tensors="pt"), tokenizer).fingerprint == wanted
    one = load_calibration(tokenizer(texts[1]), tokenizer)
    assert [ids.tolist() for ids in one.samples] == [tokenizer(texts[1])["input_ids"]]


def test_samples_don_t_hold_the_whole_text(tokenizer: Any, sample: str, write: Write) -> None:
    made = load_calibration(write("sample.txt", sample), tokenizer, DataConfig(2, 16))
    assert all(ids.untyped_storage().nbytes() == 16 * 8 for ids in made.samples)


def test_the_fingerprint_sees_where_samples_end() -> None:
    made = [Calibration([torch.tensor(ids) for ids in split], "") for split in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2]])]
    assert len({calibration.fingerprint for calibration in made}) == 3


def test_batches() -> None:
    samples = [torch.full((length,), number) for number, length in enumerate([4, 2, 4, 4, 2])]
    made = Calibration(samples, "")
    assert (made.tokens, made.longest, made.largest_id) == (16, 4, 4)
    batches: list[Tensor] = list(made.batches(2))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 2], [3], [1, 4]]
    assert [list(batch.shape) for batch in batches] == [[2, 4], [1, 4], [2, 2]]
    with pytest.raises(PlanError, match="batch of 0 samples"):
        next(made.batches(0))


def test_limits_of_the_model() -> None:
    check_length(1024, 1024)
    check_length(None, 10**6)
    with pytest.raises(PlanError, match="2048 tokens are longer than the model's 1024 positions"):
        check_length(1024, 2048)
    made = Calibration([torch.tensor([3, 99])], "")
    check_ids(100, made)
    with pytest.raises(PlanError, match="token id 99, the model has ids below 99"):
        check_ids(99, made)


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ([], r"the dataset \(a list\) is empty"),
    "an exhausted stream": (iter([]), "is empty"),
    "empty strings": (["", ""], "has no tokens: 2 samples, all empty"),
    "empty texts": ([{"text": ""}], "has no tokens: all its documents are empty"),
    "an empty tensor": (torch.zeros(0, 4, dtype=torch.int64), "has no tokens"),
    "a number": (17, "a dataset of type 'int' can't be read; expected"),
    "none": (None, "a dataset of type 'NoneType' can't be read"),
    "bytes": (b"text", "a dataset of type 'bytes' can't be read"),
    "splits": ({"train": ["x"]}, "a mapping with 'train'; give one split"),
    "a missing file": ("no/such/file.txt", "there is no file 'no/such/file.txt'"),
    "a text": ("Some text.\nAnd more of it.", "a text itself goes into a list"),
    "a folder": (Path(), "is a folder"),
    "a device": ("/dev/null", "is no regular file"),
    "numbers": ([3, 4], "record 0 of the dataset is of type 'int'"),
    "mixed kinds": (["text", {"text": "text"}], "record 1 of the dataset is a record with a text, those before"),
    "no text": ([{"body": "x", "id": 3}], "has none of the fields .* it has 'body', 'id'; name the one"),
    "a text of another type": ([{"text": 3}], "field 'text' of record 0 of the dataset is of type 'int'"),
    "messages of another type": ([{"messages": ["x"]}], "message 0 in field 'messages' of record 0 .* type 'str'"),
    "messages without a role": ([{"messages": [{"content": "x"}]}], "has no role"),
    "no messages": ([{"messages": []}], "a conversation without messages"),
    "a content of another type": ([[{"role": "user", "content": 3}]], "the content of message 0 in record 0"),
    "floats": (torch.rand(2, 8), r"shape \[8\] and dtype torch.float32; expected integers"),
    "bools": (torch.zeros(2, 8, dtype=torch.bool), "dtype torch.bool"),
    "three dimensions": (torch.zeros(2, 2, 2, dtype=torch.int64), r"the shape \[2, 2, 2\]; expected \[n, length\]"),
    "negative ids": ([[3, -1]], "record 0 of the dataset has the token id -1"),
    "ids that are no ids": ([["x"]], "record 0 of the dataset is not a list of token ids"),
    "huge ids": ([[2**70]], "record 0 of the dataset is not a list of token ids"),
    "another mask": ([{"input_ids": [1, 2], "attention_mask": [1]}], "2 token ids and an attention mask of 1"),
    "masks of other rows": (
        {"input_ids": [[1], [2]], "attention_mask": [[1]]},
        "2 rows of token ids and 1 of attention",
    ),
    "all masked": ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "has no tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tokenizer: Any, kind: str) -> None:
    dataset, message = REFUSED[kind]
    with pytest.raises(PlanError, match=message):
        load_calibration(dataset, tokenizer)


FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty text": ("a.txt", b"", "a.txt.* is an empty text"),
    "blanks": ("a.txt", b" \n\n", "is an empty text"),
    "not UTF-8": ("a.txt", b"abc \xff", "'.*a.txt' is not UTF-8: invalid start byte at byte 4; give a UTF-8 text"),
    "cut UTF-8": ("a.txt", "é".encode()[:1], "is not UTF-8: unexpected end of data at byte 0"),
    "a Parquet file": ("a.parquet", b"PAR1\x15\x00\xe9\x15", "or a Dataset of the package 'datasets'"),
    "no records": ("a.jsonl", b"\n\n", "is empty"),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 of '.*a.jsonl' is not JSON"),
    "JSON that is not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "line 1 of '.*a.jsonl' is not UTF-8"),
    "deep JSON": ("a.jsonl", b"[" * 200_000 + b"\n", "line 1 of '.*a.jsonl' is not JSON"),
    "no array": ("a.json", b"[1, 2", "'.*a.json' is not JSON"),
}


@pytest.mark.parametrize("kind", FILES)
def test_refused_files(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    name, content, message = FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_calibration(tmp_path / name, tokenizer)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(PlanError, match="texts need the model's tokenizer"):
        load_calibration(["A river."], None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": 0}, "samples of calibration data is 0; expected an integer of at least 1"),
        ({"length": -1}, "length of calibration data is -1"),
        ({"samples": True}, "samples of calibration data is True"),
        ({"length": 2.5}, "length of calibration data is 2.5"),
        ({"seed": -3}, "seed of calibration data is -3"),
        ({"seed": 2**64}, "below 2\\^63"),
    ],
)
def test_refused_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DataConfig(**setting)


@pytest.mark.parametrize("line", ["A river flows.\n", "Ein Fluß, 川.\n", "川"])
def test_stretches_of_a_large_file(tmp_path: Path, line: str) -> None:
    file = tmp_path / "large.txt"
    file.write_bytes((line * 5000).encode())
    texts = read_texts(file, most=64 * 100)
    assert len(texts) == STRETCHES
    assert 40 * STRETCHES < sum(len(text.encode()) for text in texts) <= 64 * 100
    assert all(text and text.replace(line, "") == "" for text in texts)
    assert read_texts(file, most=10**6) == [line * 5000]
    file.write_bytes((line * 5000).encode() + b"\xff" * 40 + (line * 5000).encode())
    with pytest.raises(PlanError, match="is not UTF-8"):
        read_texts(file, most=file.stat().st_size - 1)


def test_a_large_text_is_represented_and_said_to_be(
    tokenizer: Any, sample: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "WHOLE_BYTES", 64 * 200)
    made = load_calibration(write("large.txt", sample), tokenizer, DataConfig(4, 8))
    assert made.notes == ["'large.txt' is large: 64 stretches of it are used, spread evenly"]
    assert [len(ids) for ids in made.samples] == [8] * 4
    whole = load_calibration(write("small.txt", sample[:9000]), tokenizer, DataConfig(4, 8))
    assert whole.notes == []


def test_records_without_an_end(tokenizer: Any, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_LONGEST_LINE", 100)
    fits, too_long = json.dumps({"text": "x" * 50}), json.dumps({"text": "x" * 100})
    with pytest.raises(PlanError, match="line 2 of '.*long.jsonl' has more than 100 bytes"):
        load_calibration(write("long.jsonl", f"{fits}\n{too_long}\n"), tokenizer)
    with pytest.raises(PlanError, match="one JSON array of more than 100 bytes; write one record per line"):
        load_calibration(write("long.json", f"[{too_long}]"), tokenizer)


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_names_without_the_package(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=f"'{name}' needs the package 'datasets'.*pip install datasets.*local text"):
        load_calibration(name, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_names_without_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, name: str) -> None:
    def load(*arguments: str, **options: Any) -> Any:
        raise builtins.ConnectionError("Couldn't reach\nthe hub")

    hub(monkeypatch, load)
    with pytest.raises(PlanError, match=f"'{name}' .* can't be loaded: Couldn't reach the hub;.*local text"):
        load_calibration(name, tokenizer)


def test_texts_by_name(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    asked: list[Any] = []

    def load(*arguments: str, **options: Any) -> Any:
        asked.append((*arguments, options))
        return {"text": ["", " = River = \n", "", " It flows . \n"] * 20, "sentence": ["a river", "it flows"] * 20}

    hub(monkeypatch, load)
    texts = {"wikitext2": " \n = River = \n \n It flows . \n" * 20, "ptb-new": " ".join(["a river", "it flows"] * 20)}
    for name, text in texts.items():
        made = load_calibration(name, tokenizer, DataConfig(100, 8))
        ids = plain_ids(tokenizer, text)
        assert torch.cat(made.samples).tolist() == ids[: len(ids) // 8 * 8]
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train"}),
        ("ptb_text_only", "penn_treebank", {"split": "train"}),
    ]


def test_c4_gives_a_window_of_long_documents(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, sample: str) -> None:
    rows = [{"text": "Short."}, {"text": sample[:600]}, {"text": "Too short."}, {"text": sample[600:1400]}]
    hub(monkeypatch, lambda *arguments, **options: rows)
    made = load_calibration("c4", tokenizer, DataConfig(3, 32, seed=5))
    texts = [" ".join(map(str, tokenizer(row["text"])["input_ids"])) for row in (rows[1], rows[3])]
    assert len(made.samples) == 2
    found = [" ".join(map(str, ids.tolist())) for ids in made.samples]
    assert sorted(next(i for i, text in enumerate(texts) if window in text) for window in found) == [0, 1]
    assert made.notes == ["c4 gives 2 of the 3 samples that were asked for"]
    assert made.fingerprint == load_calibration("c4", tokenizer, DataConfig(3, 32, seed=5)).fingerprint
    with pytest.raises(PlanError, match="no document of 'c4-new' has 5000 tokens"):
        load_calibration("c4-new", tokenizer, DataConfig(3, 5000))
