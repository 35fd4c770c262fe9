from __future__ import annotations

import hashlib
import os
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tasks.contracts.errors import DataError, RequantError, StoreError
from tasks.data import manifest
from tasks.data.manifest import SCHEMA, build_manifest
from tasks.data.open_source import open_source
from tasks.data.sources import FileSource, Inspected, memory_of, pixels_digest


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    names: list[str] = []
    original = FileSource.inspect

    def counting(self: FileSource, row: int) -> Inspected:
        names.append(self.names[row])
        return original(self, row)

    monkeypatch.setattr(FileSource, "inspect", counting)
    return names


def test_a_row_tells_all_of_an_image(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """File, header, pixels and properties, in the order of the source."""
    folder = write_folder({"cat": 3, "dog": 2})
    source = open_source(str(folder))
    frame = build_manifest(source, tmp_path / "scratch")
    assert [*frame.columns] == [*SCHEMA.names, "label"]
    assert frame["path"].tolist() == list(source.names)
    assert frame["label"].tolist() == ["cat"] * 3 + ["dog"] * 2
    assert frame["fault"].isna().all()
    first, content = frame.iloc[0], (folder / source.names[0]).read_bytes()
    assert (first["bytes"], first["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert first["pixels"] == pixels_digest(memory_of(source.load(0))).decode()
    assert (first["format"], first["mode"], first["width"], first["height"]) == ("PNG", "RGB", 48, 40)
    assert (first["orientation"], first["num_frames"]) == (1, 1)


def test_only_what_changed_is_decoded_again(
    write_folder: Callable[..., Path], tmp_path: Path, inspected: list[str]
) -> None:
    """A changed file, a new one; a removed one is gone from the rows."""
    folder, scratch = write_folder({"cat": 3, "dog": 2}), tmp_path / "scratch"
    before = build_manifest(open_source(str(folder)), scratch)
    assert len(inspected) == 5
    inspected.clear()
    pd.testing.assert_frame_equal(build_manifest(open_source(str(folder)), scratch), before)
    assert inspected == []
    Image.new("RGB", (9, 9)).save(folder / "cat/001.png")
    Image.new("RGB", (8, 8)).save(folder / "dog/new.png")
    (folder / "dog/000.png").unlink()
    after = build_manifest(open_source(str(folder)), scratch)
    assert sorted(inspected) == ["cat/001.png", "dog/new.png"]
    assert after["path"].tolist() == ["cat/000.png", "cat/001.png", "cat/002.png", "dog/001.png", "dog/new.png"]
    assert after["width"].tolist() == [48, 9, 48, 48, 8]


@pytest.mark.parametrize("kind", ["folder", "digits"])
def test_processes_find_what_threads_find(
    kind: str, write_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults included; which of them work is a question of number alone."""
    folder = write_folder({"cat": 70, "dog": 70})
    (folder / "cat/bad.png").write_bytes(b"")
    source = open_source(str(folder) if kind == "folder" else "digits")
    by_threads = build_manifest(source, tmp_path / "threads")
    monkeypatch.setattr(manifest, "MANY", 100)
    told: list[int] = []
    pd.testing.assert_frame_equal(
        build_manifest(source, tmp_path / "processes", lambda done, _: told.append(done)), by_threads
    )
    assert told[-1] == len(source)


def test_a_killed_run_is_gone_on_with(
    write_folder: Callable[..., Path], tmp_path: Path, inspected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole parts, of one chunk at least, are kept; nothing is left of them in the end."""
    monkeypatch.setattr(manifest, "PART", 2)
    folder, scratch = write_folder({"cat": 50, "dog": 50}), tmp_path / "scratch"
    source = open_source(str(folder))

    def kill(done: int, total: int) -> None:
        assert total == 100
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_manifest(source, scratch, kill)
    inspected.clear()
    frame = build_manifest(source, scratch)
    assert len(frame) == 100
    assert set(inspected) == set(source.names[32:])
    assert len(list(scratch.rglob("*.parquet"))) == 1


def test_faults_are_rows_and_no_errors(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Each says why; all other columns are empty then."""
    folder = write_folder({"cat": 2, "dog": 2})
    (folder / "cat/empty.jpg").touch()
    (folder / "cat/page.jpg").write_text("<html>not found</html>")
    png = (folder / "cat/000.png").read_bytes()
    (folder / "cat/cut.png").write_bytes(png[: len(png) // 2])
    Image.open(folder / "cat/000.png").save(folder / "cat/cut.jpg")
    jpeg = (folder / "cat/cut.jpg").read_bytes()
    (folder / "cat/cut.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3])
    Image.new("I;16", (9, 9)).save(folder / "cat/deep.png")
    (tmp_path / "elsewhere.png").write_bytes(png)
    (folder / "cat/link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "cat/loop.png").symlink_to(folder / "cat/loop.png")
    (folder / os.fsdecode(b"cat/caf\xe9.png")).write_bytes(png)
    (folder / "cat/two\nlines and spaces.png").write_bytes(png)
    frame = build_manifest(open_source(str(folder)), tmp_path / "scratch").set_index("path")
    faults = dict(frame["fault"].dropna())
    assert sorted(faults) == [
        "cat/caf\\xe9.png",
        "cat/cut.jpg",
        "cat/cut.png",
        "cat/deep.png",
        "cat/empty.jpg",
        "cat/link.png",
        "cat/loop.png",
        "cat/page.jpg",
    ]
    assert faults["cat/caf\\xe9.png"] == "the name is not UTF-8"
    assert "truncated" in faults["cat/cut.jpg"]
    assert faults["cat/empty.jpg"] == "is empty"
    assert faults["cat/link.png"] == f"leads out of {folder}"
    assert "more than 8 bits" in faults["cat/deep.png"]
    assert "image" in faults["cat/page.jpg"]
    assert frame.loc["cat/cut.png", ["bytes", "pixels", "width"]].isna().all()
    assert frame["pixels"]["cat/two\nlines and spaces.png"] == frame["pixels"]["cat/000.png"]


def test_what_a_file_says_is_kept(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """CMYK, palette, alpha, a turned photo, an animation: decoded, and named."""
    folder = write_folder({"cat": 1, "dog": 1})
    Image.new("CMYK", (20, 10)).save(folder / "cat/cmyk.jpg")
    Image.new("P", (20, 10)).save(folder / "cat/palette.png")
    Image.new("RGBA", (20, 10)).save(folder / "cat/alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(folder / "cat/turned.jpg", exif=exif)
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    for name in ("cat/moving.webp", "cat/moving.gif"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    frame = build_manifest(open_source(str(folder)), tmp_path / "scratch").set_index("path")
    assert frame["fault"].isna().all()
    assert frame.loc["cat/cmyk.jpg", "mode"] == "CMYK"
    assert frame.loc["cat/palette.png", "mode"] == "P"
    assert frame.loc["cat/alpha.png", "mode"] == "RGBA"
    turned = frame.loc["cat/turned.jpg"]
    assert (turned["orientation"], turned["width"], turned["height"]) == (6, 20, 10)
    assert frame.loc["cat/moving.webp", "num_frames"] == 3
    assert frame.loc["cat/moving.gif", "num_frames"] == 3
    assert frame.loc["cat/moving.gif", "mean_r"] == 255  # the first is what counts


@pytest.mark.parametrize("said", [0, 9, 128, 256, 65535])
def test_an_orientation_that_exif_does_not_know_is_zero(
    said: int, write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever a camera wrote: the image is used as it is stored."""
    folder = write_folder({"cat": 1, "dog": 1})
    exif = Image.Exif()
    exif[0x0112] = said
    Image.new("RGB", (20, 10)).save(folder / "cat/odd.jpg", exif=exif)
    source = open_source(str(folder))
    frame = build_manifest(source, tmp_path / "scratch").set_index("path")
    assert frame["fault"].isna().all()
    assert frame.loc["cat/odd.jpg", "orientation"] == 0
    assert source.load(1).size == (20, 10)


def test_a_decompression_bomb_is_a_fault(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A few bytes that claim to be gigapixels are not unpacked."""
    folder = write_folder({"cat": 1, "dog": 1})

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))
    (folder / "cat/bomb.png").write_bytes(png)
    frame = build_manifest(open_source(str(folder)), tmp_path / "scratch").set_index("path")
    assert "decompression bomb" in str(frame.loc["cat/bomb.png", "fault"])


def test_an_unreadable_file_is_a_fault(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """One that vanished since it was listed, a folder, a pipe without writer; but for root, one without rights."""
    folder = write_folder({"cat": 5, "dog": 1})
    source = open_source(str(folder))
    (folder / "cat/000.png").unlink()
    (folder / "cat/001.png").unlink()
    (folder / "cat/001.png").mkdir()
    (folder / "cat/002.png").chmod(0)
    (folder / "cat/003.png").unlink()
    os.mkfifo(folder / "cat/003.png")
    frame = build_manifest(source, tmp_path / "scratch").set_index("path")
    assert frame.loc["cat/000.png", "fault"] == "No such file or directory"
    assert frame.loc["cat/001.png", "fault"] == "Is a directory"
    assert frame.loc["cat/002.png", "fault"] == "Permission denied" or os.geteuid() == 0
    assert frame.loc["cat/003.png", "fault"] == "is empty"
    assert frame["fault"].isna().sum() == (3 if os.geteuid() == 0 else 2)
    with pytest.raises(DataError, match=r"cat/003\.png: is empty"):
        source.load(3)


def test_images_in_memory_have_a_manifest_too(tmp_path: Path) -> None:
    """scikit-learn's digits, once."""
    source, told = open_source("digits"), list[int]()
    frame = build_manifest(source, tmp_path, lambda done, _: told.append(done))
    assert len(frame) == 1797 == told[-1]
    assert frame["mode"].unique().tolist() == ["L"]
    assert len(frame["pixels"].unique()) > 1700
    pd.testing.assert_frame_equal(build_manifest(source, tmp_path, lambda *_: pytest.fail("decoded again")), frame)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """No traceback of the system's."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        build_manifest(open_source("digits"), tmp_path / "file")


def test_a_process_that_dies_is_one_clear_error(
    write_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that the system kills for want of memory."""
    monkeypatch.setattr(manifest, "MANY", 1)
    monkeypatch.setattr(manifest, "measure_rows", lambda chunk: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RequantError, match="was killed") as caught:
        build_manifest(open_source(str(write_folder({"cat": 3, "dog": 3}))), tmp_path / "scratch")
    assert "Run again" in caught.value.remedy
