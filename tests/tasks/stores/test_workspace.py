from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.errors import StoreError, TransientStoreError
from tasks.stores.workspace import replacing, resuming, workspace


def fail_in(path: Path, error: BaseException) -> None:
    with path.open("a") as file:
        file.write("half")
    raise error


def test_a_workspace_is_gone_at_the_end(tmp_path: Path) -> None:
    """Its folder is made under scratch and removed with all it holds."""
    with workspace(tmp_path / "scratch") as folder:
        assert folder.parent == tmp_path / "scratch"
        (folder / "a").mkdir()
        (folder / "a" / "file").write_text("x")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_workspace_is_gone_after_an_error(tmp_path: Path) -> None:
    """The error comes through as it was."""
    with pytest.raises(OSError, match="mine"), workspace(tmp_path) as folder:
        fail_in(folder / "file", OSError("mine"))
    assert list(tmp_path.iterdir()) == []


def test_workspaces_do_not_meet(tmp_path: Path) -> None:
    """Two at once are two folders."""
    with workspace(tmp_path) as one, workspace(tmp_path) as other:
        assert one != other


def test_scratch_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """The remedy names the setting."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"No work folder can be made in .*REQUANT_SCRATCH"),
        workspace(tmp_path / "file"),
    ):
        pass


def test_replacing_keeps_the_old_file_after_an_error(tmp_path: Path) -> None:
    """Half of a new file is removed; the old one is as it was."""
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OSError, match="mine"), replacing(target) as partial:
        fail_in(partial, OSError("mine"))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_needs_something_written(tmp_path: Path) -> None:
    """A writer that wrote nothing does not leave an empty file."""
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_resuming_finds_what_was_left(tmp_path: Path) -> None:
    """After trouble that can pass, and after an end by force, the next one has the same file under the same name."""
    target = tmp_path / "file"
    for error in (TransientStoreError("busy"), KeyboardInterrupt()):
        with pytest.raises(type(error)), resuming(target) as partial:
            fail_in(partial, error)
        assert not target.exists()
    with resuming(target) as partial:
        assert partial.read_text() == "halfhalf"
    assert list(tmp_path.iterdir()) == [target]


def test_resuming_leaves_nothing_after_a_final_error(tmp_path: Path) -> None:
    """What was there before stays as it was."""
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OSError, match="mine"), resuming(target) as partial:
        fail_in(partial, OSError("mine"))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_that_resume_at_once_do_not_meet(tmp_path: Path) -> None:
    """The second one gets a name of its own and starts from nothing; the last to finish is what is there."""
    target = tmp_path / "file"
    with resuming(target) as one:
        one.write_text("one")
        with resuming(target) as other:
            assert other != one
            other.write_text("other")
        assert target.read_text() == "other"
    assert target.read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]
