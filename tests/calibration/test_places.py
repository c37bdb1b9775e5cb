"""Activations between blocks: the same bits, wherever they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit.calibration import activations
from lowbit.calibration.activations import Activations, Place, choose_place
from lowbit.calibration.memory import free_memory

CPU = torch.device("cpu")
PLACES: list[Place] = ["device", "host", "disk"]


@pytest.fixture(params=PLACES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Activations:
    return Activations(request.param, CPU, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_place_gives_the_same_bits(kept: Activations, dtype: torch.dtype) -> None:
    batches = {5: torch.randn(2, 3, 8).to(dtype), 0: torch.randn(1, 7, 8).to(dtype), 12: torch.randn(3, 1, 8).to(dtype)}
    batches[0][0, 0, 0] = torch.inf
    batches[12] = batches[12].transpose(0, 1)  # not contiguous
    for number, hidden in batches.items():
        kept.put(number, hidden)
    assert list(kept) == [0, 5, 12] and len(kept) == 3
    for number, hidden in batches.items():
        found = kept.get(number)
        assert torch.equal(found, hidden) and found.dtype == dtype and found.shape == hidden.shape
        assert torch.equal(kept.get(number), hidden)  # more than once


def test_what_is_put_later_takes_the_place(kept: Activations) -> None:
    kept.put(1, torch.zeros(1, 2, 4))
    later = torch.randn(1, 5, 4)
    kept.put(1, later)
    assert torch.equal(kept.get(1), later) and len(kept) == 1


def test_gradients_are_not_kept(kept: Activations) -> None:
    kept.put(0, torch.randn(1, 2, 4, requires_grad=True) * 2)
    assert not kept.get(0).requires_grad


def test_what_is_dropped_is_gone(kept: Activations, tmp_path: Path) -> None:
    for number in (0, 1):
        kept.put(number, torch.randn(1, 2, 4))
    kept.drop(0)
    kept.drop(0)
    kept.drop(7)
    assert list(kept) == [1] and len(list(tmp_path.iterdir())) == (kept.place == "disk")
    with pytest.raises(KeyError):
        kept.get(0)


def test_files_hold_no_memory(tmp_path: Path) -> None:
    kept = Activations("disk", CPU, tmp_path)
    kept.put(3, torch.randn(2, 3, 4))
    assert not kept._held and [path.name for path in tmp_path.iterdir()] == ["000003.safetensors"]


def test_a_folder_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    kept = Activations("disk", CPU, tmp_path / "missing")
    with pytest.raises(OSError, match=r"missing/000000\.safetensors can't be written"):
        kept.put(0, torch.randn(1, 2, 4))
    assert len(kept) == 0


def test_the_host_holds_three_gigabytes_and_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "free_memory", lambda device: 100 << 30)
    assert choose_place(3 << 30, CPU) == "host"
    assert choose_place((3 << 30) + 1, CPU) == "disk"
    assert choose_place(100, CPU, host_limit=99) == "disk"
    monkeypatch.setattr(activations, "free_memory", lambda device: 4 << 30)
    assert choose_place(1 << 30, CPU) == "host"
    assert choose_place((1 << 30) + 1, CPU) == "disk"


def test_a_device_holds_them_where_it_has_four_times_as_much_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 8 << 30, "cpu": 100 << 30}
    monkeypatch.setattr(activations, "free_memory", lambda device: free[device.type])
    assert choose_place(2 << 30, torch.device("cuda")) == "device"
    assert choose_place((2 << 30) + 1, torch.device("cuda")) == "host"


def test_what_torch_may_not_take_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # torch gives the share of a device only by its number.
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", {0: 1.0, 1: 0.1}.__getitem__)
    assert free_memory(torch.device("cuda", 0)) == 60 << 30
    assert free_memory(torch.device("cuda", 1)) == free_memory(torch.device("cuda")) == 5 << 30
