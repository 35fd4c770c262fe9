from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.contracts.spec import DataSpec
from tasks.data.state import data_state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images each."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            pixels_HWC = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels_HWC).save(tmp_path / "data" / name / f"{number}.bmp")
    return tmp_path / "data"


def more(folder: Path) -> None:
    shutil.copy(folder / "cat/0.bmp", folder / "cat/3.bmp")


def fewer(folder: Path) -> None:
    (folder / "cat/0.bmp").unlink()


def renamed(folder: Path) -> None:
    (folder / "cat/0.bmp").rename(folder / "cat/9.bmp")


def relabelled(folder: Path) -> None:
    (folder / "cat/0.bmp").rename(folder / "dog/9.bmp")


def replaced(folder: Path) -> None:
    """Of the same size: the time alone tells."""
    path = folder / "cat/0.bmp"
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(before + 1, before + 1))


@pytest.mark.parametrize("change", [more, fewer, renamed, relabelled, replaced])
def test_a_change_in_a_folder_changes_its_state(change: Callable[[Path], None], folder: Path) -> None:
    """Without one it stays."""
    data = DataSpec(source=str(folder))
    before = data_state(data)
    assert data_state(data) == before
    change(folder)
    assert data_state(data) != before


@pytest.mark.parametrize("change", [renamed, replaced])
def test_a_change_behind_the_gate_counts(change: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    """Its own source is looked at too."""
    shutil.copytree(folder, tmp_path / "gate")
    data = DataSpec(source=str(folder), gate_source=str(tmp_path / "gate"))
    before = data_state(data)
    change(tmp_path / "gate")
    assert data_state(data) != before


def test_a_manifest_counts_with_the_files_that_it_lists(folder: Path) -> None:
    """Neither another label nor another image goes unnoticed; a file that it does not list does."""
    manifest = folder / "manifest.csv"
    manifest.write_text("path,label\ncat/0.bmp,cat\ndog/0.bmp,dog\n")
    data = DataSpec(source=str(manifest))
    states = [data_state(data)]
    fewer_listed = folder / "dog/2.bmp"
    fewer_listed.unlink()
    assert data_state(data) == states[0]
    replaced(folder)
    states.append(data_state(data))
    manifest.write_text("path,label\ncat/0.bmp,dog\ndog/0.bmp,cat\n")
    states.append(data_state(data))
    assert len(set(states)) == 3


def test_bundled_digits_are_not_loaded_to_tell_that_they_are_the_same() -> None:
    """Their library's version says it."""
    program = (
        "import sys; from tasks.contracts.spec import DataSpec; from tasks.data.state import data_state; "
        "print(data_state(DataSpec(source='digits'))); assert 'sklearn' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert told.strip() == data_state(DataSpec(source="digits"))


def test_a_share_of_the_same_images_is_another_state(folder: Path) -> None:
    """What the spec says of data counts too."""
    assert data_state(DataSpec(source=str(folder), gate=1)) != data_state(DataSpec(source=str(folder), gate=2))
