"""A folder is written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.cli.replace import check_target, replaced
from lowbit.errors import PlanError


def _checkpoint(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    return folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_creates_the_folder_and_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with replaced(target) as partial:
        (partial / "file").write_text("new")
        assert not target.exists()
        assert partial.parent == target.parent
    assert _names(target) == ["file"]
    assert _names(target.parent) == ["b"]


def test_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with replaced(target) as partial:
        (partial / "file").touch()
    assert _names(tmp_path) == ["target"]
    assert _names(target) == ["file"]


def test_replaces_everything(tmp_path: Path) -> None:
    target = _checkpoint(tmp_path / "target")
    (target / "stale").touch()
    with replaced(target) as partial:
        (partial / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert _names(tmp_path) == ["target"]
    assert _names(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    target = _checkpoint(tmp_path / "target")

    def fail() -> None:
        with replaced(target) as partial:
            (partial / "config.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert _names(tmp_path) == ["target"]
    assert (target / "config.json").read_text() == "old"


def test_an_error_leaves_nothing_new(tmp_path: Path) -> None:
    def fail() -> None:
        with replaced(tmp_path / "target") as partial:
            (partial / "config.json").write_text("half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert _names(tmp_path) == []


def test_the_old_one_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = _checkpoint(tmp_path / "target"), Path.rename

    def no_second_rename(source: Path, destination: Path) -> Path:
        if ".partial-" in source.name:
            raise PermissionError("no")
        return rename(source, destination)

    monkeypatch.setattr(Path, "rename", no_second_rename)
    with pytest.raises(PermissionError), replaced(target):
        pass
    assert _names(tmp_path) == ["target"]
    assert (target / "config.json").read_text() == "old"


def test_follows_a_link_to_the_folder(tmp_path: Path) -> None:
    target, link = _checkpoint(tmp_path / "target"), tmp_path / "link"
    link.symlink_to(target)
    with replaced(link) as partial:
        (partial / "config.json").write_text("new")
    assert link.is_symlink()
    assert (target / "config.json").read_text() == "new"


def test_refusals(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "models" / "source")
    (tmp_path / "file").touch()
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "thesis.txt").touch()
    link = tmp_path / "link"
    link.symlink_to(source)
    for target, overwrite, reason in [
        (source, True, "the source itself"),
        (link, True, "the source itself"),
        (tmp_path / "models", True, "holds the source"),
        (tmp_path / "file", True, "is a file"),
        (_checkpoint(tmp_path / "other"), False, "is not empty; --overwrite replaces it"),
        (junk, True, "not a checkpoint"),
    ]:
        with pytest.raises(PlanError, match=reason):
            check_target(source, target, overwrite)
    check_target(source, tmp_path / "new", False)
    check_target(source, tmp_path / "other", True)
