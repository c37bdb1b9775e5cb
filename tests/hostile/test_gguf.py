"""GGUF files that are damaged or made to harm: one `FormatError` each, in bounded time and memory."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.integrations.transformers.gguf.tokenizer import tokenizer_of
from lowbit.wire.gguf import (
    Entry,
    GgmlType,
    Gguf,
    GgufFile,
    Typed,
    ValueType,
    open_gguf,
    read_blocks,
    write_gguf,
)
from lowbit.wire.gguf.config import config_of

U64 = 2**64 - 1


def text(value: str | bytes, length: int | None = None) -> bytes:
    stored = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(stored) if length is None else length) + stored


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(
    name: str = "a.weight",
    dims: Iterable[int] = (32, 2),
    kind: int = 8,
    offset: int = 0,
    count: int | None = None,
) -> bytes:
    dims = tuple(dims)
    sides = b"".join(struct.pack("<Q", side % 2**64) for side in dims)
    return (
        text(name) + struct.pack("<I", len(dims) if count is None else count) + sides + struct.pack("<IQ", kind, offset)
    )


ARCHITECTURE = pair("general.architecture", 8, text("llama"))


def build(
    pairs: Iterable[bytes] = (ARCHITECTURE,),
    entries: Iterable[bytes] = (entry(),),
    *,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int | None, int | None] = (None, None),
    data: bytes = bytes(96),
    alignment: int = 32,
) -> bytes:
    pairs, entries = list(pairs), list(entries)
    tensors, values = counts
    header = magic + version
    header += struct.pack("<Q", len(entries) if tensors is None else tensors)
    header += struct.pack("<Q", len(pairs) if values is None else values)
    header += b"".join(pairs) + b"".join(entries)
    return header + bytes(-len(header) % alignment) + data


def refused(folder: Path, content: bytes, match: str) -> FormatError:
    path = folder / "x.gguf"
    path.write_bytes(content)
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=match) as error:
        open_gguf(path)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KB
    assert error.value.file == str(path)
    return error.value


def test_the_file_that_the_others_are_made_from_is_valid(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(build())
    opened = open_gguf(tmp_path / "x.gguf")
    assert opened.metadata == {"general.architecture": "llama"}
    assert opened.tensors["a.weight"].shape == (2, 32) and opened.raw("a.weight").shape == (2, 34)


def test_bad_magic(tmp_path: Path) -> None:
    for magic in (b"GGML", b"\0\0\0\0", b"FUGG"):
        refused(tmp_path, build(magic=magic), "not a GGUF file")


def test_empty_short_and_pointer_files(tmp_path: Path) -> None:
    refused(tmp_path, b"", "ends within its header")
    refused(tmp_path, b"GGUF\3\0\0\0", "ends within its header")
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer")
    with pytest.raises(FormatError, match="no such file"):
        open_gguf(tmp_path)
    with pytest.raises(FormatError, match="no such file"):
        open_gguf(tmp_path / "missing.gguf")


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_unknown_versions(version: int, tmp_path: Path) -> None:
    refused(tmp_path, build(version=struct.pack("<I", version)), "unknown version")


def test_big_endian(tmp_path: Path) -> None:
    refused(tmp_path, build(version=struct.pack(">I", 3)), "big-endian")


@pytest.mark.parametrize("count", [2**63, U64, 2**40, 100])
def test_counts_that_the_file_has_no_room_for(count: int, tmp_path: Path) -> None:
    refused(tmp_path, build(counts=(count, None)), "more tensors|ends within|too long")
    refused(tmp_path, build(counts=(None, count)), "more key-value pairs|ends within|too long")


def test_strings_longer_than_the_rest(tmp_path: Path) -> None:
    for length in (U64, 2**63, 10**6):
        refused(tmp_path, build([pair("a", 8, text("b", length))]), "too long")
        refused(tmp_path, build([text("a", length)]), "too long")
        refused(tmp_path, build(entries=[text("a", length) + entry()]), "too long")


def test_empty_and_broken_keys(tmp_path: Path) -> None:
    refused(tmp_path, build([pair("", 4, struct.pack("<I", 1))]), "empty key")
    refused(tmp_path, build([pair(b"\xff\xfe", 4, struct.pack("<I", 1))]), "not UTF-8")
    refused(tmp_path, build([pair("a", 8, text(b"\xff"))]), "not UTF-8")
    refused(tmp_path, build(entries=[entry("")]), "empty name")


def test_duplicate_keys_and_tensors(tmp_path: Path) -> None:
    refused(tmp_path, build([ARCHITECTURE, ARCHITECTURE]), "stands twice")
    refused(tmp_path, build(entries=[entry(), entry(offset=96)], data=bytes(300)), "stands twice")


def test_unknown_types_of_values(tmp_path: Path) -> None:
    for kind in (13, 2**31, 2**32 - 1):
        refused(tmp_path, build([pair("a", kind, bytes(8))]), "unknown type")
        refused(tmp_path, build([pair("a", 9, struct.pack("<IQ", kind, 1) + bytes(8))]), "unknown type")


def test_arrays_nested_deep(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 50_000 + struct.pack("<IQ", 0, 1) + b"\0"
    refused(tmp_path, build([pair("a", 9, nested)]), "nested too deep")


def test_arrays_longer_than_the_rest(tmp_path: Path) -> None:
    for kind in (0, 4, 8, 9, 12):
        for count in (U64, 2**62, 10**6):
            refused(tmp_path, build([pair("a", 9, struct.pack("<IQ", kind, count))]), "longer than the rest")


def test_arrays_of_more_values_than_any_model_has(tmp_path: Path) -> None:
    count = (1 << 23) + 1
    refused(tmp_path, build([pair("a", 9, struct.pack("<IQ", 0, count) + bytes(count))]), "too many values")


def test_a_bool_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path, build([pair("a", 7, b"\2")]), "neither 0 nor 1")


@pytest.mark.parametrize("value", [0, 3, 33, 2**31, 2**32 - 1])
def test_alignments_that_are_none(value: int, tmp_path: Path) -> None:
    refused(tmp_path, build([pair("general.alignment", 4, struct.pack("<I", value))]), "not an alignment")


def test_an_alignment_of_another_type(tmp_path: Path) -> None:
    for kind, stored in ((10, struct.pack("<Q", 32)), (5, struct.pack("<i", 32)), (8, text("32")), (7, b"\1")):
        refused(tmp_path, build([pair("general.alignment", kind, stored)]), "wrong type")


@pytest.mark.parametrize("count", [0, 5, 2**32 - 1])
def test_numbers_of_dimensions(count: int, tmp_path: Path) -> None:
    refused(tmp_path, build(entries=[entry(count=count)]), "number of dimensions")


def test_negative_dimensions(tmp_path: Path) -> None:
    refused(tmp_path, build(entries=[entry(dims=(32, -1))]), "negative dimension")
    refused(tmp_path, build(entries=[entry(dims=(-32, -2))]), "negative dimension")


def test_sizes_that_overflow(tmp_path: Path) -> None:
    for dims in ((2**62, 2), (2**32, 2**32), (2**21,) * 4, (32, 2**63 - 1), (2**60, 0), (32, 0, 2**62)):
        for kind in (8, 0, 28):
            refused(tmp_path, build(entries=[entry(dims=dims, kind=kind)]), "larger than the file")


def test_sizes_that_overflow_together(tmp_path: Path) -> None:
    """Each fits into 64 bits with its offset, the sum of both does not."""
    entries = [entry("a"), entry("b", offset=2**64 - 32)]
    refused(tmp_path, build(entries=entries), "past the end")


@pytest.mark.parametrize("kind", [4, 5, 9, 15, 31, 33, 36, 38, 99, 2**32 - 1])
def test_types_of_tensors_that_nothing_reads(kind: int, tmp_path: Path) -> None:
    refused(tmp_path, build(entries=[entry(kind=kind)]), "doesn't read")


def test_rows_that_are_not_whole_blocks(tmp_path: Path) -> None:
    refused(tmp_path, build(entries=[entry(dims=(33, 2))]), "whole number of Q8_0 blocks")
    refused(tmp_path, build(entries=[entry(dims=(128, 2), kind=12)]), "whole number of Q4_K blocks")


def test_offsets(tmp_path: Path) -> None:
    refused(tmp_path, build(entries=[entry(offset=8)], data=bytes(200)), "not aligned")
    refused(tmp_path, build(entries=[entry("a"), entry("b", offset=32)], data=bytes(200)), "overlap")
    refused(tmp_path, build(entries=[entry("a", offset=64), entry("b", offset=0)], data=bytes(200)), "overlap")
    refused(tmp_path, build(entries=[entry(offset=64)]), "past the end")
    refused(tmp_path, build(entries=[entry(offset=2**63)]), "past the end")


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    whole = build([ARCHITECTURE, pair("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz"))], data=bytes(68))
    path = tmp_path / "x.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            open_gguf(path)
    path.write_bytes(whole)
    open_gguf(path)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 32), (2, 0, 32), (1, 1, 1, 0)])
def test_tensors_without_elements_are_read_but_are_no_weights(shape: tuple[int, ...], tmp_path: Path) -> None:
    kinds = [GgmlType.F32, GgmlType.BF16, GgmlType.Q8_0, GgmlType.IQ2_S]
    fitting = [kind for kind in kinds if shape[-1] % kind.block_elements == 0]
    write_gguf(tmp_path / "x.gguf", {}, [Entry(kind.name, shape, kind, bytes) for kind in fitting])
    opened = open_gguf(tmp_path / "x.gguf")
    for kind in fitting:
        raw, rows = opened.raw(kind.name), opened.tensors[kind.name].rows
        if kind.dense:
            assert opened.dense(kind.name).shape == shape
        else:
            with pytest.raises(FormatError, match="without elements"):
                read_blocks(kind, raw, (rows, shape[-1]))


def test_many_tensors_take_no_square_of_time(tmp_path: Path) -> None:
    entries = [entry(f"{number}", offset=96 * number) for number in range(20_000)]
    (tmp_path / "x.gguf").write_bytes(build(entries=entries, data=bytes(96 * 20_000)))
    started = time.monotonic()
    assert len(open_gguf(tmp_path / "x.gguf").tensors) == 20_000
    assert time.monotonic() - started < 5


SCALED = [kind for kind in GgmlType if not kind.dense]
# Where the scale of a block begins, from the front or the back.
SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}


@pytest.mark.parametrize("kind", SCALED, ids=lambda kind: kind.name)
def test_a_scale_that_is_no_finite_number(kind: GgmlType) -> None:
    raw = torch.zeros(3, kind.row_bytes(2 * kind.block_elements), dtype=torch.uint8)
    shape = (3, 2 * kind.block_elements)
    read_blocks(kind, raw, shape)
    at = kind.block_bytes + SCALE_AT.get(kind.name, 0)
    for bits in (0x7C00, 0xFC00, 0x7E00, 0xFFFF):
        bad = raw.clone()
        if kind is GgmlType.MXFP4:
            bad[1, at] = 0xFF
        elif kind is GgmlType.NVFP4:
            bad[1, at + 2] = 0x7F
        elif kind is GgmlType.IQ1_M:
            for word in range(4):
                bad[1, kind.block_bytes + 49 + 2 * word] = (bits >> 4 * word & 15) << 4
        else:
            bad[1, at], bad[1, at + 1] = bits & 255, bits >> 8
        with pytest.raises(FormatError, match="not finite"):
            read_blocks(kind, bad, shape)


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1"])
def test_a_min_that_is_no_finite_number(name: str) -> None:
    kind = GgmlType[name]
    raw = torch.zeros(1, kind.block_bytes, dtype=torch.uint8)
    at = 82 if name == "Q2_K" else 2
    raw[0, at + 1] = 0x7C
    with pytest.raises(FormatError, match="not finite"):
        read_blocks(kind, raw, (1, kind.block_elements))


def split(folder: Path, **overrides: Any) -> list[Path]:
    entries = [Entry(f"{number}", (2, 32), GgmlType.Q8_0, lambda: bytes(68)) for number in range(4)]
    return write_gguf(folder / "m.gguf", {"general.architecture": "llama", **overrides}, entries, part_bytes=140)


def rewritten(path: Path, changes: dict[str, Any], drop: str = "", extra: str = "") -> None:
    old = GgufFile(path)
    metadata = {key: Typed(value, old.types[key][-1]) for key, value in old.metadata.items()} | changes
    metadata.pop(drop, None)
    names = [*old.tensors, *([extra] if extra else [])]
    write_gguf(path, metadata, [Entry(name, (2, 32), GgmlType.Q8_0, lambda: bytes(68)) for name in names])


def test_inconsistent_splits(tmp_path: Path) -> None:
    cases: tuple[tuple[int, dict[str, Any], str, str, str], ...] = (
        (1, {"split.no": Typed(0, ValueType.UINT16)}, "", "", "split.no contradicts"),
        (1, {"split.count": Typed(3, ValueType.UINT16)}, "", "", "split.count contradicts"),
        (0, {"split.count": Typed(3, ValueType.UINT16)}, "", "", "which it is"),
        (0, {"split.count": Typed(65535, ValueType.UINT16)}, "", "", "which it is"),
        (0, {"split.count": "2"}, "", "", "not a count"),
        (0, {"split.count": Typed(-2, ValueType.INT16)}, "", "", "not a count"),
        (1, {"split.tensors.count": Typed(9, ValueType.INT32)}, "", "", "split.tensors.count contradicts"),
        (1, {}, "split.no", "", "not a count"),
        (1, {}, "", "0", "contradicts|same tensor"),
        (1, {}, "", "another", "split.tensors.count contradicts"),
    )
    for number, changes, drop, extra, match in cases:
        parts = split(tmp_path)
        assert len(parts) == 2 and len(open_gguf(parts[0]).tensors) == 4 and len(open_gguf(parts[1]).tensors) == 4
        rewritten(parts[number], changes, drop, extra)
        with pytest.raises(FormatError, match=match):
            open_gguf(parts[0])


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    for part in parts:
        rewritten(part, {"split.tensors.count": Typed(5, ValueType.INT32)}, extra="0" if part == parts[1] else "")
    with pytest.raises(FormatError, match="same tensor"):
        open_gguf(parts[0])


def test_missing_and_renamed_parts(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    moved = first.rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="which it is"):
        open_gguf(moved)
    moved.rename(first)
    second.unlink()
    with pytest.raises(FormatError, match="missing"):
        open_gguf(first)


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
}


def llama(folder: Path, **changes: Any) -> Gguf:
    """The metadata of a small model, with tensors enough for its configuration."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = ["token_embd.weight", *(f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts)]
    made = [Entry(name, (4, 32), GgmlType.F32, lambda: bytes(512)) for name in names]
    write_gguf(folder / "m.gguf", LLAMA | changes, made)
    return open_gguf(folder / "m.gguf")


def test_the_configuration_that_the_others_are_made_from_is_valid(tmp_path: Path) -> None:
    opened = llama(tmp_path)
    assert config_of(opened)["num_hidden_layers"] == 2
    assert tokenizer_of(opened.metadata)("ab").input_ids == [3]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 10**9), ("llama.block_count", 0), ("llama.block_count", 1), ("llama.block_count", "2"),
        ("llama.block_count", 2.0), ("llama.context_length", True),
        ("llama.embedding_length", 2**31), ("llama.attention.head_count", 0),
        ("llama.attention.head_count", -1), ("llama.attention.head_count_kv", 3),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("general.architecture", "nosuch"), ("general.architecture", 3), ("tokenizer.ggml.tokens", "text"),
        ("tokenizer.ggml.bos_token_id", 10**6),
    ],
)  # fmt: skip
def test_configurations_that_make_no_model(key: str, value: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError):
        config_of(llama(tmp_path, **{key: value}))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", []), ("tokens", [1, 2, 3, 4]), ("tokens", "text"), ("tokens", ["a"]), ("token_type", [1]),
        ("token_type", [1] * 5), ("token_type", ["a"] * 4), ("merges", [1]), ("merges", ["ab"]), ("merges", ["a c"]),
        ("bos_token_id", 4), ("bos_token_id", "a"), ("model", "nosuch"),
    ],
)  # fmt: skip
def test_vocabularies_that_make_no_tokenizer(name: str, value: Any, tmp_path: Path) -> None:
    """Among them arrays of a length or of elements that aren't the expected."""
    opened = llama(tmp_path, **{f"tokenizer.ggml.{name}": value})
    with pytest.raises(FormatError):
        tokenizer_of(opened.metadata)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_bytes_give_a_file_or_one_error(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    pairs = [
        ARCHITECTURE,
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")),
        pair("scores", 9, struct.pack("<IQ", 6, 2) + bytes(8)),
    ]
    content = bytearray(build(pairs, [entry(), entry("b", (256,), 12, 96)], data=bytes(256)))
    for at, value in changes:
        content[at % len(content)] = value
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    try:
        opened = open_gguf(path)
        for name, info in opened.tensors.items():
            raw = opened.raw(name)
            if not info.type.dense:
                read_blocks(info.type, raw, (info.rows, info.shape[-1]))
    except FormatError:
        pass
