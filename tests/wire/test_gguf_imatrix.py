"""Importance matrices: read and written, in both forms, under GGUF's names and Transformers'."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.wire.gguf.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from lowbit.wire.gguf.names import architecture_for


def legacy(entries: dict[str, tuple[int, list[float]]], end: bytes = b"") -> bytes:
    """The bytes of the older form."""
    stored = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        stored += struct.pack("<i", len(name.encode())) + name.encode()
        stored += struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return stored + end


def matrix() -> ImportanceMatrix:
    return ImportanceMatrix(
        {
            "blk.0.attn_q.weight": Importance(torch.rand(8), torch.tensor([1024.0])),
            "blk.0.ffn_up_exps.weight": Importance(torch.rand(3, 8), torch.tensor([7.0, 512.0, 505.0])),
            "output.weight": Importance(torch.rand(8), torch.tensor([1024.0])),
        },
        ("calib.txt",), 8, 128,
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    before = matrix()
    write_imatrix(tmp_path / "x.gguf", before)
    after = read_imatrix(tmp_path / "x.gguf")
    assert (after.datasets, after.chunks, after.chunk_size) == (("calib.txt",), 8, 128)
    assert set(after.entries) == set(before.entries)
    for name, entry in before.entries.items():
        assert torch.equal(after.entries[name].counts, entry.counts)
        # A product with the count and a division by it round once each.
        assert bool(((after.entries[name].squares - entry.squares).abs() <= 2.5e-7 * entry.squares).all())
    write_imatrix(tmp_path / "y.gguf", ImportanceMatrix({"a": Importance(torch.arange(4.0), torch.tensor([4.0]))}))
    assert torch.equal(read_imatrix(tmp_path / "y.gguf").entries["a"].squares, torch.arange(4.0))


def test_an_expert_without_tokens_has_ones(tmp_path: Path) -> None:
    squares = torch.tensor([[1.0, 2, 3], [0, 0, 0]])
    write_imatrix(tmp_path / "x.gguf", ImportanceMatrix({"e": Importance(squares, torch.tensor([2.0, 0]))}))
    read = read_imatrix(tmp_path / "x.gguf").entries["e"]
    assert read.squares.tolist() == [[1, 2, 3], [1, 1, 1]] and read.counts.tolist() == [2, 0]


def test_the_older_form(tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": (2, [1.0, 3.0, 0.0]), "output.weight": (0, [5.0])}
    name = b"calib.txt"
    for end, chunks, datasets in (
        (b"", 0, ()),
        (struct.pack("<i", 4), 4, ()),
        (struct.pack("<ii", 4, len(name)) + name, 4, ("calib.txt",)),
    ):
        (tmp_path / "x.dat").write_bytes(legacy(entries, end))
        read = read_imatrix(tmp_path / "x.dat")
        assert read.entries["blk.0.attn_q.weight"].squares.tolist() == [0.5, 1.5, 0]
        assert read.entries["output.weight"].squares.tolist() == [5]
        assert (read.chunks, read.datasets, read.chunk_size) == (chunks, datasets, 0)


def test_names_of_modules_and_back() -> None:
    llama, mixtral = architecture_for({"model_type": "llama"}), architecture_for({"model_type": "mixtral"})
    found = matrix().by_module(llama)
    assert set(found) == {"model.layers.0.self_attn.q_proj", "lm_head"}
    found = matrix().by_module(mixtral)
    experts = [f"model.layers.0.block_sparse_moe.experts.{number}.w3" for number in range(3)]
    assert set(found) == {"model.layers.0.self_attn.q_proj", "lm_head", *experts}
    assert found[experts[1]].counts.tolist() == [512]
    again = ImportanceMatrix.of_modules(mixtral, found, chunks=8)
    assert again.chunks == 8 and set(again.entries) == set(matrix().entries)
    stacked = again.entries["blk.0.ffn_up_exps.weight"]
    assert stacked.squares.shape == (3, 8) and torch.equal(stacked.squares[2], found[experts[2]].squares)
    assert stacked.counts.tolist() == [7, 512, 505]


def test_experts_of_the_older_form_are_told_apart() -> None:
    mixtral = architecture_for({"model_type": "mixtral"})
    flat = ImportanceMatrix({"blk.1.ffn_up_exps.weight": Importance(torch.arange(6.0), torch.tensor([1.0]))})
    found = flat.by_module(mixtral, experts=3)
    assert [entry.squares.tolist() for entry in found.values()] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(FormatError, match="divide into experts"):
        flat.by_module(mixtral, experts=4)


def test_modules_without_a_name_and_missing_experts_are_refused() -> None:
    mixtral, entry = architecture_for({"model_type": "mixtral"}), Importance(torch.ones(4), torch.ones(1))
    with pytest.raises(FormatError, match="no name for this module"):
        ImportanceMatrix.of_modules(mixtral, {"model.layers.0.self_attn.rotary": entry})
    with pytest.raises(FormatError, match="experts are missing"):
        ImportanceMatrix.of_modules(mixtral, {"model.layers.0.block_sparse_moe.experts.1.w1": entry})
    names = [f"model.layers.0.block_sparse_moe.experts.{number}.w1" for number in range(2)]
    wider = Importance(torch.ones(5), torch.ones(1))
    with pytest.raises(FormatError, match="differ in width"):
        ImportanceMatrix.of_modules(mixtral, dict(zip(names, (entry, wider), strict=True)))


@pytest.mark.parametrize(
    ("squares", "counts"),
    [
        (torch.tensor([1.0, -1]), torch.ones(1)),
        (torch.tensor([1.0, torch.nan]), torch.ones(1)),
        (torch.ones(2), torch.tensor([torch.inf])),
        (torch.ones(2), torch.ones(2)),
        (torch.ones(2, 2, 2), torch.ones(1)),
        (torch.ones(0), torch.ones(1)),
    ],
)
def test_what_is_no_mean_of_squares_is_not_written(squares: torch.Tensor, counts: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="negative or not finite|other shapes"):
        write_imatrix(tmp_path / "x.gguf", ImportanceMatrix({"a": Importance(squares, counts)}))
    assert not list(tmp_path.iterdir())
