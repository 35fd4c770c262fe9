"""Decoding once, whole or not at all."""

import fcntl
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.contracts.errors import DataError, StoreError
from tasks.contracts.spec import PreprocessSpec
from tasks.data.cache import decode_images
from tasks.data.open_source import open_source
from tasks.data.preprocess import fit_image

SMALL = PreprocessSpec(resize=24, crop=20)

CHILD = """
import resource, sys, time
from pathlib import Path
from tasks.contracts.errors import StoreError
from tasks.contracts.spec import PreprocessSpec
from tasks.data.cache import decode_images
from tasks.data.open_source import open_source

folder, scratch, mode = sys.argv[1:]
calls = []

def progress(done, total):
    calls.append(done)
    if mode == "stall":
        print("started", flush=True)
        time.sleep(60)

if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    images = decode_images(open_source(folder), PreprocessSpec(resize=24, crop=20), Path(scratch), progress)
    print(images.digest, len(calls))
except StoreError as error:
    print(error)
"""


def test_pixels_are_those_of_fitting_each_image(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Every row holds its own image, resized and cropped, in the source's order."""
    source = open_source(str(write_folder({"a": 30, "b": 25})))
    images = decode_images(source, SMALL, tmp_path)
    assert images.pixels_NHWC.shape == (55, 20, 20, 3)
    for row in range(55):
        np.testing.assert_array_equal(images.pixels_NHWC[row], fit_image(source.load(row), SMALL))


def test_a_second_call_decodes_nothing(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Not even with another mean and std: those are applied later."""
    folder = write_folder({"a": 3, "b": 3})
    done: list[int] = []
    first = decode_images(open_source(str(folder)), SMALL, tmp_path, lambda count, _: done.append(count))
    assert done == [1, 2, 3, 4, 5, 6]
    other = SMALL.model_copy(update={"mean": (0.5,) * 3})
    again = decode_images(open_source(str(folder)), other, tmp_path, lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(first.pixels_NHWC, again.pixels_NHWC)
    assert again.digest == first.digest


@pytest.mark.parametrize(
    "preprocess",
    [
        PreprocessSpec(resize=24, crop=18),
        PreprocessSpec(resize=23, crop=20),
        PreprocessSpec(resize=24, crop=20, interpolation="nearest"),
        PreprocessSpec(resize=24, crop=20, mean=(0.5,), std=(0.5,)),
    ],
    ids=str,
)
def test_another_geometry_is_another_cache(
    write_folder: Callable[..., Path], tmp_path: Path, preprocess: PreprocessSpec
) -> None:
    """Each of resize, crop, interpolation and channels names other pixels, and another digest."""
    source = open_source(str(write_folder({"a": 2, "b": 2})))
    assert decode_images(source, preprocess, tmp_path).digest != decode_images(source, SMALL, tmp_path).digest


def test_a_changed_file_is_decoded_again(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """New content under an old name does not meet old pixels."""
    folder = write_folder({"a": 2, "b": 2})
    before = decode_images(open_source(str(folder)), SMALL, tmp_path)
    photo(99).save(folder / "a" / "000.png")
    source = open_source(str(folder))
    after = decode_images(source, SMALL, tmp_path)
    np.testing.assert_array_equal(after.pixels_NHWC[0], fit_image(source.load(0), SMALL))
    assert after.digest != before.digest


def test_digest_follows_content_not_files(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Moved and renamed files have the same digest; another label has not."""
    folder = write_folder({"a": 3, "b": 3})
    digest = decode_images(open_source(str(folder)), SMALL, tmp_path).digest
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    (moved / "a/000.png").rename(moved / "a/zzz.png")
    assert decode_images(open_source(str(moved)), SMALL, tmp_path).digest == digest
    (moved / "a/zzz.png").rename(moved / "b/zzz.png")
    assert decode_images(open_source(str(moved)), SMALL, tmp_path).digest != digest


def test_equal_pixels_have_equal_digests(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Whatever the file format, and compared before resizing: what differs only in full size differs."""
    folder = write_folder({"a": 1, "b": 1})
    photo(0).save(folder / "a" / "copy.bmp")
    slightly = photo(0)
    slightly.putpixel((0, 0), (1, 2, 3))
    slightly.save(folder / "a" / "other.bmp")
    digests = decode_images(open_source(str(folder)), SMALL, tmp_path).digests
    assert digests[0] == digests[1] != digests[2]


def test_all_bad_files_are_counted_and_the_first_named(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """One message for truncated, empty and foreign files at once, and no cache."""
    folder = write_folder({"a": 40, "b": 40})
    content = (folder / "a/000.png").read_bytes()
    (folder / "a/003.png").write_bytes(content[: len(content) // 2])
    (folder / "a/039.png").write_bytes(b"")
    for index in range(10, 17):
        (folder / f"b/0{index}.png").write_text("hello")
    with pytest.raises(DataError) as caught:
        decode_images(open_source(str(folder)), SMALL, tmp_path / "scratch")
    message = str(caught.value)
    assert message.startswith(f"9 of 80 images of {folder} cannot be used: a/003.png: ")
    assert "a/039.png: is empty; b/010.png: is no JPEG, PNG" in message
    assert message.endswith("and 4 more. Mend or remove what cannot be decoded.")
    assert _left_in(tmp_path / "scratch") == []


def test_images_smaller_than_the_crop_are_named(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """With the remedy that belongs to it."""
    folder = write_folder({"a": 2, "b": 2})
    photo(0, width=30, height=30).save(folder / "b" / "000.png")
    with pytest.raises(DataError, match=r"1 of 4 .* b/000\.png: 30x30 pixels .*Lower data\.preprocess\.crop"):
        decode_images(open_source(str(folder)), PreprocessSpec(crop=40), tmp_path / "scratch")


def test_different_sizes_are_refused(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Without a crop or an exact size, images of different shape do not fit one array."""
    folder, threads = write_folder({"a": 2, "b": 2}), threading.active_count()
    photo(0, width=50, height=60).save(folder / "b" / "000.png")
    with pytest.raises(DataError, match=r"a/000\.png 48x40 but b/000\.png 50x60\. Add data\.preprocess\.crop"):
        decode_images(open_source(str(folder)), PreprocessSpec(), tmp_path / "scratch")
    assert _left_in(tmp_path / "scratch") == []
    assert threading.active_count() == threads


def test_bad_files_go_before_different_sizes(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Once a file is bad, the rest is read only to name every bad file."""
    folder = write_folder({"a": 2, "b": 2})
    (folder / "a" / "000.png").write_text("hello")
    photo(0, width=50, height=60).save(folder / "b" / "000.png")
    with pytest.raises(DataError, match=r"1 of 4 images .* a/000\.png: is no"):
        decode_images(open_source(str(folder)), PreprocessSpec(), tmp_path / "scratch")


def test_an_interrupted_build_leaves_nothing(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C in the middle: no cache, no threads, and the next call builds it."""
    source, threads = open_source(str(write_folder({"a": 50, "b": 50}))), threading.active_count()

    def interrupt(done: int, total: int) -> None:
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_images(source, SMALL, tmp_path / "scratch", interrupt)
    assert _left_in(tmp_path / "scratch") == []
    assert threading.active_count() == threads
    assert len(decode_images(source, SMALL, tmp_path / "scratch")) == 100


def test_what_a_killed_build_leaves_is_cleared(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A killed process frees its lock; the next build clears its leavings and succeeds."""
    folder, scratch = write_folder({"a": 3, "b": 3}), tmp_path / "scratch"
    with _child(folder, scratch, "stall") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        child.send_signal(signal.SIGKILL)
    assert [path.suffix for path in _left_in(scratch)] == [".partial"]
    decode_images(open_source(str(folder)), SMALL, scratch)
    assert [path.suffix for path in _left_in(scratch)] == [""]


def test_two_processes_at_once_both_succeed(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """They see the same images, and only one of them decodes."""
    folder = write_folder({"a": 150, "b": 150})
    children = [_child(folder, tmp_path / "scratch", "build") for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].split() for child in children]
    assert outputs[0][0] == outputs[1][0]
    assert sorted(int(calls) for _, calls in outputs) == [0, 300]


@pytest.fixture
def sets(write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Folders of 50 images, of which two fit into the cache when decoded."""
    monkeypatch.setenv("REQUANT_CACHE_GIB", str(2.5 * 50 * 20 * 20 * 3 / 2**30))
    return lambda name: write_folder({"a": 25, "b": 25}, name=name)


def test_what_was_used_longest_ago_makes_room(sets: Callable[[str], Path], tmp_path: Path) -> None:
    """So data that grow every night do not fill the disk."""
    first, second, third = map(sets, ("first", "second", "third"))
    scratch = tmp_path / "scratch"
    assert [_num_decoded(folder, scratch) for folder in (first, second, first, third)] == [50, 50, 0, 50]
    assert len(_left_in(scratch)) == 2
    assert [_num_decoded(folder, scratch) for folder in (first, third, second)] == [0, 0, 50]


def test_what_a_process_uses_stays(sets: Callable[[str], Path], tmp_path: Path) -> None:
    """However long ago it began to, and however little room there is; another set gets its place all the same."""
    first, second, third = map(sets, ("first", "second", "third"))
    images = decode_images(open_source(str(first)), SMALL, tmp_path / "scratch")
    before = images.pixels_NHWC.copy()
    assert [_num_decoded(folder, tmp_path / "scratch") for folder in (second, third, first, second)] == [50, 50, 0, 50]
    assert len(_left_in(tmp_path / "scratch")) == 2
    decode_images(open_source(str(second)), SMALL, tmp_path / "scratch")
    decode_images(open_source(str(third)), SMALL, tmp_path / "scratch")
    assert len(_left_in(tmp_path / "scratch")) == 3
    np.testing.assert_array_equal(images.pixels_NHWC, before)


def test_a_set_that_is_removed_while_it_is_asked_for_is_built_again(
    write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever waits for its lock gets a whole one."""
    folder, scratch = write_folder({"a": 3, "b": 3}), tmp_path / "scratch"
    assert _num_decoded(folder, scratch) == 6
    (built,) = _left_in(scratch)
    with ThreadPoolExecutor(1) as pool, (built / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        images = pool.submit(decode_images, open_source(str(folder)), SMALL, scratch)
        built.rename(scratch / "images/0.removed")
        file.close()
        assert len(images.result()) == 6
    assert (built / "pixels.npy").is_file()


def test_what_killed_processes_left_goes_before_the_next_build(
    write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Of other data too, which may never be decoded again; not what another process is building."""
    folders = [write_folder({"a": 3, "b": 3}, name=name) for name in ("killed", "alive", "new")]
    scratch = tmp_path / "scratch"
    with _child(folders[0], scratch, "stall") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "started\n"
        killed.kill()
    (unfinished,) = _left_in(scratch)
    (scratch / "images/0.removed").mkdir()
    (scratch / "images/0.removed/pixels.npy").touch()
    with _child(folders[1], scratch, "stall") as alive:
        assert alive.stdout is not None
        assert alive.stdout.readline() == "started\n"
        (building,) = set(_left_in(scratch)) - {unfinished}
        decode_images(open_source(str(folders[2])), SMALL, scratch)
        assert sorted(path.suffix for path in _left_in(scratch)) == ["", ".partial"]
        assert building.is_dir()
        alive.kill()


@pytest.fixture(params=["tmpfs", "limit"])
def full_scratch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that holds 20 kB, on a disk of its own or by a limit on file sizes; and the child's mode."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if request.param == "limit":
        yield scratch, "limit"
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(scratch)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield scratch, "build"
    subprocess.run(["umount", str(scratch)], check=True)


def test_a_full_disk_is_one_clear_error(write_folder: Callable[..., Path], full_scratch: tuple[Path, str]) -> None:
    """It names the folder and the remedy, and nothing half-written stays."""
    scratch, mode = full_scratch
    output = _child(write_folder({"a": 20, "b": 20}), scratch, mode).communicate(timeout=60)[0]
    reason = "File too large" if mode == "limit" else "No space left on device"
    assert output == (
        f"{scratch / 'images'} cannot be written: {reason}. "
        "Free space there, or set REQUANT_SCRATCH to a writable folder on a larger disk.\n"
    )
    assert _left_in(scratch) == []


def test_a_file_in_place_of_scratch_is_one_clear_error(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The scratch folder cannot be made."""
    (tmp_path / "scratch").write_text("")
    with pytest.raises(StoreError, match=r"scratch/images cannot be written: Not a directory\."):
        decode_images(open_source(str(write_folder({"a": 1, "b": 1}))), SMALL, tmp_path / "scratch")


def test_a_damaged_cache_is_refused(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Cut short by someone else: an error that says what to delete, never other pixels."""
    source = open_source(str(write_folder({"a": 2, "b": 2})))
    decode_images(source, SMALL, tmp_path)
    (pixels,) = tmp_path.glob("images/*/pixels.npy")
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"is damaged: .* Delete this folder"):
        decode_images(source, SMALL, tmp_path)


def test_images_in_memory_are_decoded_too(tmp_path: Path) -> None:
    """Digits go the same way as files."""
    images = decode_images(open_source("digits"), PreprocessSpec(mean=(0.5,), std=(0.5,)), tmp_path)
    assert images.pixels_NHWC.shape == (1797, 8, 8, 1)
    assert len(np.unique(images.digests)) == 1797


@pytest.mark.parametrize(
    ("channels", "digest"), [(1, b"9c09ab74a01c93832280c1d248f752ed"), (3, b"df625399d9d43f27cd65d1434ff5ad1c")]
)
def test_digests_are_a_format(channels: int, digest: bytes, tmp_path: Path) -> None:
    """Splits are drawn by them: with others every user's images would change places between two versions."""
    pixels_HWC = np.arange(6 * channels, dtype=np.uint8).reshape(2, 3, channels)
    image = Image.fromarray(pixels_HWC.squeeze())
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        image.save(tmp_path / "images" / name / "one.png")
    preprocess = PreprocessSpec(mean=(0.0,) * channels, std=(1.0,) * channels)
    images = decode_images(open_source(str(tmp_path / "images")), preprocess, tmp_path / "scratch")
    assert images.digests.tolist() == [digest, digest]


def test_colour_and_grey_files_of_one_image_are_the_same(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Pixels are compared as the model takes them."""
    folder = write_folder({"a": 1, "b": 1})
    grey = photo(0, mode="L")
    grey.save(folder / "a" / "grey.bmp")
    Image.merge("RGB", [grey] * 3).save(folder / "a" / "rgb.bmp")
    digests = decode_images(open_source(str(folder)), SMALL, tmp_path).digests
    assert digests[1] == digests[2] != digests[0]


def _child(folder: Path, scratch: Path, mode: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(scratch), mode], stdout=subprocess.PIPE, text=True
    )


def _num_decoded(folder: Path, scratch: Path) -> int:
    """By a process of its own, which has ended."""
    return int(_child(folder, scratch, "build").communicate(timeout=60)[0].split()[1])


def _left_in(scratch: Path) -> list[Path]:
    """What lies among the caches, but for empty lock files."""
    return [path for path in scratch.glob("images/*") if path.suffix != ".lock"]
