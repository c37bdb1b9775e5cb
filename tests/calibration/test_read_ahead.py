"""What is read before it is asked for, added up in place, and checked once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowbit.algorithms import integer_spec, quantize
from lowbit.algorithms.statistics import HESSIAN, Collector
from lowbit.calibration import job as jobs
from lowbit.calibration.activations import Activations
from lowbit.calibration.distributed import TreeSum
from lowbit.calibration.job import BlockResult, Job
from lowbit.calibration.streaming import ReadAhead, load_block, missing_names
from lowbit.integrations.transformers.assemble import Results


class Recorded(Mapping[str, Tensor]):
    """Weights that note who reads them."""

    def __init__(self, weights: dict[str, Tensor], broken: str = "") -> None:
        self.weights, self.broken = weights, broken
        self.reads: list[tuple[str, bool]] = []

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append((name, threading.current_thread() is threading.main_thread()))
        if name == self.broken:
            raise OSError(f"{name} can't be read")
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {f"block.{name}": torch.randn(4, 4) for name in ("a", "b", "c")}


def test_what_was_read_ahead_is_the_same_and_not_read_again(weights: dict[str, Tensor]) -> None:
    recorded = Recorded(weights)
    ahead = ReadAhead(recorded)
    ahead.start(list(weights))
    found = {name: ahead[name] for name in weights}
    assert recorded.reads == [(name, False) for name in weights]
    for name, value in weights.items():
        assert torch.equal(found[name], value)
        assert found[name].data_ptr() != value.data_ptr()  # read, not mapped
    assert ahead["block.a"] is weights["block.a"]  # given out once
    assert (len(ahead), list(ahead)) == (3, list(weights))


def test_no_more_is_read_ahead_than_the_limit(weights: dict[str, Tensor]) -> None:
    recorded = Recorded(weights)
    ahead = ReadAhead(recorded, limit=2 * 64)
    ahead.start(list(weights))
    assert all(torch.equal(ahead[name], value) for name, value in weights.items())
    assert recorded.reads[-1] == ("block.c", True)


def test_whoever_asks_is_told_what_could_not_be_read(weights: dict[str, Tensor]) -> None:
    ahead = ReadAhead(Recorded(weights, broken="block.b"))
    ahead.start(list(weights))
    assert torch.equal(ahead["block.a"], weights["block.a"])
    with pytest.raises(OSError, match=r"block\.b can't be read"):
        ahead["block.b"]


def test_a_block_is_loaded_from_what_was_read_ahead() -> None:
    dense = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    weights = {f"block.{name}": value.detach() for name, value in dense.named_parameters()}
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    recorded = Recorded(weights)
    ahead = ReadAhead(recorded)
    names = missing_names(block, "block")
    assert names == list(weights)
    ahead.start(names)
    load_block(block, "block", ahead, torch.device("cpu"))
    inputs = torch.randn(3, 4)
    assert torch.equal(block(inputs), dense(inputs))
    assert not any(main for _, main in recorded.reads)
    assert missing_names(block, "block") == []


def test_sums_take_the_place_of_what_they_are_made_of() -> None:
    parts = [torch.randn(3, 3) for _ in range(8)]
    tree = TreeSum()
    for part in parts:
        tree.push(part.clone())
    pairs = [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]
    wanted = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    assert torch.equal(tree.total(), wanted)  # type: ignore[arg-type]
    first = torch.ones(2)
    tree = TreeSum()
    tree.push(first)
    tree.push(torch.ones(2))
    assert tree.total() is first


def test_a_hessian_is_added_up_in_one_matrix() -> None:
    batches = [torch.randn(5, 7, 6, dtype=torch.float64).float() for _ in range(3)]
    collector = Collector(frozenset({HESSIAN}))
    collector.add(batches[0])
    matrix = collector.sums[HESSIAN]
    for batch in batches[1:]:
        collector.add(batch)
    assert collector.sums[HESSIAN] is matrix
    rows = torch.cat(batches).reshape(-1, 6).double()
    torch.testing.assert_close(collector.finish().hessian, (rows.t() @ rows / len(rows)).float())


def test_a_batch_in_memory_is_not_written_over_while_someone_has_it() -> None:
    kept = Activations("host", torch.device("cpu"))
    kept.put(0, torch.zeros(2))
    before = kept.get(0)
    kept.put(0, torch.ones(2))
    assert torch.equal(before, torch.zeros(2))
    assert torch.equal(kept.get(0), torch.ones(2))


def test_finished_blocks_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layer{number}": quantize(torch.randn(8, 32), integer_spec(4, 32)) for number in range(4)}
    with Job(tmp_path / "job", {"name": "test"}) as job:
        for number in range(2):
            units = {name: tensors[name] for name in (f"layer{2 * number}", f"layer{2 * number + 1}")}
            job.save(number, BlockResult(units, {}, {}))
        checked: list[Path] = []
        real = jobs._checksum
        monkeypatch.setattr(jobs, "_checksum", lambda path: (checked.append(path), real(path))[1])
        results = Results(job, 2, "blocks")
        for name in ("layer0", "layer3", "layer1", "layer2"):  # from block to block and back
            assert results.outline(name) == (tensors[name].spec, (8, 32))
            assert torch.equal(results.unit(name).tensors["codes"], tensors[name].tensors["codes"])
        assert len(checked) == 2
