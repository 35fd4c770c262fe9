"""Where images come from, and what is refused there."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tasks.contracts.errors import DataError, RequantError, SpecError
from tasks.data.open_source import open_source
from tasks.data.sources import memory_of


def test_folder_gives_sorted_classes_and_files(write_folder: Callable[..., Path]) -> None:
    """Classes and files are sorted by name; hidden files and other endings are no images."""
    folder = write_folder({"dog": 2, "cat": 1})
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / "._000.png").write_bytes(b"resource fork")
    (folder / ".git").mkdir()
    source = open_source(str(folder))
    assert source.class_names == ("cat", "dog")
    assert list(source.names) == ["cat/000.png", "dog/000.png", "dog/001.png"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.labels.dtype == np.int64


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"])
def test_every_supported_ending_is_decoded(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], ending: str
) -> None:
    """Each of the file formats loads as RGB of the right size."""
    folder = write_folder({"a": 1, "b": 1})
    path = folder / "a" / f"photo{ending}"
    photo(0).save(path)
    source = open_source(str(folder))
    image = source.load(list(source.names).index(f"a/photo{ending}"))
    assert (image.mode, image.size) == ("RGB", (48, 40))


@pytest.mark.parametrize(
    ("mode", "decoded"),
    [("1", "L"), ("L", "L"), ("LA", "L"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGB"), ("CMYK", "RGB")],
)
def test_images_load_as_colour_or_grey(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], mode: str, decoded: str
) -> None:
    """Palettes, transparency and CMYK become RGB, all greys L."""
    folder = write_folder({"a": 0, "b": 1})
    photo(0, mode=mode).save(folder / "a" / "photo.tif")
    assert open_source(str(folder)).load(0).mode == decoded


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_memory_holds_what_is_seen_and_no_more(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], mode: str
) -> None:
    """Whatever an image was converted from, the byte that no one sees is 255: else a digest would tell twins apart."""
    folder = write_folder({"a": 0, "b": 1})
    photo(0, mode=mode).save(folder / "a" / "photo.tif")
    image = open_source(str(folder)).load(0)
    seen = np.asarray(image)
    expected = seen[..., None] if image.mode == "L" else np.dstack([seen, np.full(seen.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(memory_of(image), expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_memory_of_a_large_image_is_that_of_its_pieces(mode: str) -> None:
    """Pillow keeps an image of more than 16 MiB in several."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(noise).convert(mode).resize((4000, 5000), Image.Resampling.NEAREST)
    with pytest.raises(ValueError, match="not contiguous"):
        pa.array(image)
    pixels_HWC = memory_of(image)
    np.testing.assert_array_equal(pixels_HWC[..., : len(mode)], np.asarray(image).reshape(5000, 4000, -1))
    assert mode == "L" or (pixels_HWC[..., 3] == 255).all()


def test_sixteen_bits_are_refused_rather_than_clipped(write_folder: Callable[..., Path]) -> None:
    """Pillow would clip 16-bit greys at 255 without a word."""
    folder = write_folder({"a": 0, "b": 1})
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "a" / "deep.png")
    with pytest.raises(DataError, match=r"a/deep\.png: mode I;16 has more than 8 bits"):
        open_source(str(folder)).load(0)


def test_orientation_is_applied(write_folder: Callable[..., Path], photo: Callable[..., Image.Image]) -> None:
    """A photo taken upright on a turned sensor is decoded upright."""
    folder = write_folder({"a": 0, "b": 1})
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    photo(0, width=30, height=20).save(folder / "a" / "photo.png", exif=exif)
    upright = open_source(str(folder)).load(0)
    assert upright.size == (20, 30)
    assert upright.tobytes() == photo(0, width=30, height=20).transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("spoil", ["truncated", "empty", "text", "tga", "missing", "folder"])
def test_a_file_that_is_no_image_is_named(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], spoil: str
) -> None:
    """What cannot be decoded is refused with its path, whatever is wrong with it."""
    folder = write_folder({"a": 0, "b": 1})
    path = folder / "a" / "bad.png"
    photo(0).save(path)
    content = path.read_bytes()
    source = open_source(str(folder))
    if spoil == "tga":
        photo(0).save(path, format="TGA")
    elif spoil in ("missing", "folder"):
        path.unlink()
        if spoil == "folder":
            path.mkdir()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[spoil])
    with pytest.raises(DataError, match=r"^a/bad\.png: \w+"):
        source.load(0)


def test_decompression_bombs_are_refused(write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image above Pillow's warning threshold is an error, not a warning."""
    folder = write_folder({"a": 1, "b": 1})
    source = open_source(str(folder))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40)
    assert source.load(0).size == (48, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 - 1)
    with pytest.raises(DataError, match=r"a/000\.png: "):
        source.load(0)


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".pgm"])
def test_rarer_endings_are_decoded(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image], ending: str
) -> None:
    """Other names of JPEG, and greys."""
    folder = write_folder({"a": 1, "b": 1})
    photo(0).convert("L").save(folder / "a" / f"photo{ending}", format="PPM" if ending == ".pgm" else "JPEG")
    source = open_source(str(folder))
    assert source.load(list(source.names).index(f"a/photo{ending}")).mode == "L"


def test_folders_below_a_class_are_its_too(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image]
) -> None:
    """The same images as torchvision's ImageFolder finds, whatever their depth; none that are hidden."""
    folder = write_folder({"a": 2, "b": 1})
    for name in ("a/2024/x/1.png", "a/2023/1.png", "a/0.d/1.pgm", "b/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0).save(folder / name, format="PNG")
    (folder / "a/2023/notes.txt").write_text("not an image")
    source = open_source(str(folder))
    found = [(str((folder / name).resolve()), label) for name, label in zip(source.names, source.labels, strict=True)]
    assert sorted(found) == sorted(ImageFolder(str(folder.resolve())).samples)
    assert list(source.names) == sorted(source.names)
    for name in ("a/.cache/1.png", "a/2023/.1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        photo(0).save(folder / name)
    assert open_source(str(folder)).names == source.names


def test_links_among_folders_end(write_folder: Callable[..., Path], photo: Callable[..., Image.Image]) -> None:
    """Each folder is taken once per class, by the name that sorts first, however many links lead to it."""
    folder = write_folder({"a": 1, "b": 1})
    (folder / "a/deep").mkdir()
    photo(0).save(folder / "a/deep/1.png")
    (folder / "a/deep/up").symlink_to(folder / "a")
    (folder / "a/loop").symlink_to(folder / "a/loop")
    (folder / "a/again").symlink_to("deep")
    (folder / "b/other").symlink_to(folder / "a/deep")
    source = open_source(str(folder))
    assert list(source.names) == ["a/000.png", "a/again/1.png", "b/000.png", "b/other/1.png", "b/other/up/000.png"]


def test_a_folder_that_cannot_be_listed_is_named(
    write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are not passed over."""
    folder = write_folder({"a": 1, "b": 1})
    (folder / "a/locked").mkdir(mode=0)
    folder.chmod(0o755)
    monkeypatch.chdir(folder)  # the folders above are closed to others
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may list any folder
    try:
        with pytest.raises(DataError, match=r"a/locked cannot be listed: Permission denied"):
            open_source(".")
    finally:
        os.seteuid(user)


def test_halves_are_no_classes(write_folder: Callable[..., Path], photo: Callable[..., Image.Image]) -> None:
    """As with train/ and val/, each with a folder per class."""
    folder = write_folder({"train": 0, "val": 0})
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        photo(0).save(folder / name)
    with pytest.raises(DataError, match=r"only in folders below its 2 sub-folders: train/cat/1\.png, val/cat/1\.png"):
        open_source(str(folder))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """A source that is nothing known names what a source can be."""
    with pytest.raises(DataError, match=r"There is no folder .*nowhere\. .*manifest"):
        open_source(str(tmp_path / "nowhere"))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    """No images at all, with or without class folders."""
    with pytest.raises(DataError, match="holds no images in 0 sub-folders"):
        open_source(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds no images in 1 sub-folders"):
        open_source(str(tmp_path))


def test_an_empty_class_folder_is_refused(write_folder: Callable[..., Path]) -> None:
    """A class that would have no images is named."""
    with pytest.raises(DataError, match="classes without images: owl"):
        open_source(str(write_folder({"cat": 1, "dog": 1, "owl": 0})))


def test_a_class_whose_name_is_not_utf8_is_refused(write_folder: Callable[..., Path]) -> None:
    """A record could not hold it."""
    folder = write_folder({"a": 1, "b": 1})
    (folder / "a").rename(folder / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"classes whose names are not UTF-8: caf\\xe9\. Rename"):
        open_source(str(folder))


def test_one_class_is_refused(write_folder: Callable[..., Path]) -> None:
    """A classifier of one class is none."""
    with pytest.raises(DataError, match=r"one class only \(cat\)"):
        open_source(str(write_folder({"cat": 3})))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_manifest_gives_paths_and_labels(write_folder: Callable[..., Path], tmp_path: Path, ending: str) -> None:
    """A manifest's order is kept, its classes are sorted, its paths start from its own folder."""
    write_folder({"a": 2, "b": 1})
    table = pd.DataFrame(
        {"split": ["x"] * 3, "path": ["photos/b/000.png", "photos/a/001.png", "photos/a/000.png"], "label": list("zyy")}
    )
    manifest = tmp_path / f"list.{ending}"
    table.to_csv(manifest, index=False) if ending == "csv" else table.to_parquet(manifest)
    source = open_source(str(manifest))
    assert source.class_names == ("y", "z")
    assert list(source.names) == table["path"].tolist()
    assert source.labels.tolist() == [1, 0, 0]
    assert source.load(0).size == (48, 40)


def test_whole_numbers_sort_by_value(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Class 10 comes after class 9, from CSV and from Parquet."""
    write_folder({"a": 3})
    table = pd.DataFrame({"path": [f"photos/a/00{index}.png" for index in range(3)], "label": [10, 9, 100]})
    table.to_csv(tmp_path / "list.csv", index=False)
    table.to_parquet(tmp_path / "list.parquet")
    for manifest in ("list.csv", "list.parquet"):
        assert open_source(str(tmp_path / manifest)).class_names == ("9", "10", "100")


def test_labels_of_csv_are_taken_literally(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """NA and 007 are class names, not a missing value and a seven."""
    write_folder({"a": 2})
    (tmp_path / "list.csv").write_text("path,label\nphotos/a/000.png,NA\nphotos/a/001.png,007\n")
    assert open_source(str(tmp_path / "list.csv")).class_names == ("007", "NA")


def test_root_moves_where_paths_start(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """`root` wins over the manifest's own folder."""
    folder = write_folder({"a": 1, "b": 1})
    (tmp_path / "list.csv").write_text("path,label\na/000.png,a\nb/000.png,b\n")
    assert open_source(str(tmp_path / "list.csv"), folder).load(1).size == (48, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,class\na,b\n", "no column path and no column label; found file, class"),
        ("path,name\na,b\n", "no column label; found path, name"),
        ("path,path,label\na/000.png,a/000.png,a\n", "2 columns path; found path, path, label"),
        ("path,label\n", "lists no images"),
        ("", "cannot be read"),
        ("path,label\na/000.png\n", "cannot be read"),
        ("path,label\na/000.png,\nb/000.png,b\n", "label .* is empty in 1 of 2 rows: 0"),
        ("path,label\n../a/000.png,a\n/etc/b.png,b\n", r"2 of 2 paths lead out of .*: \.\./a/000\.png, /etc/b\.png"),
        ("path,label\na/000.png,a\nb/7.png,b\n", r"1 of 2 files are not in .*: b/7\.png\."),
        (f"path,label\na/000.png,a\n{'b' * 300}.png,b\n", r"1 of 2 files are not in .*: b+\.png\."),
        ("path,label\na/000.png,a\nb/000.png,a\n", "one class only"),
    ],
)
def test_unusable_manifests_are_refused(write_folder: Callable[..., Path], content: str, message: str) -> None:
    """Each mistake in a manifest has its own message."""
    folder = write_folder({"a": 1, "b": 1})
    (folder / "list.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(str(folder / "list.csv"))


def test_a_missing_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    """No such file, and a file that is not Parquet."""
    with pytest.raises(DataError, match=r"list\.csv cannot be read"):
        open_source(str(tmp_path / "list.csv"))
    (tmp_path / "list.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match=r"list\.parquet cannot be read"):
        open_source(str(tmp_path / "list.parquet"))


def test_one_bad_row_in_a_million_is_named(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """In seconds, and by its path."""
    folder = write_folder({"a": 1, "b": 1})
    paths = ["a/000.png", "b/000.png"] * 500_000
    paths[777_777] = "/etc/passwd"
    pq.write_table(pa.table({"path": paths, "label": ["a", "b"] * 500_000}), folder / "images.parquet")
    with pytest.raises(DataError, match=r"1 of 1000000 paths lead out of .*: /etc/passwd\.") as caught:
        open_source(str(folder / "images.parquet"))
    assert "relative to data.root" in caught.value.remedy


def test_endings_of_manifests_may_be_capital(write_folder: Callable[..., Path]) -> None:
    """As Windows writes them."""
    folder = write_folder({"a": 1, "b": 1})
    table = pd.DataFrame({"path": ["a/000.png", "b/000.png"], "label": ["x", "y"]})
    table.to_csv(folder / "TRAIN.CSV", index=False)
    table.to_parquet(folder / "Train.Parquet")
    for manifest in ("TRAIN.CSV", "Train.Parquet"):
        assert open_source(str(folder / manifest)).class_names == ("x", "y")


@pytest.mark.parametrize(("labels", "class_names"), [(["owl", "cat"], ("cat", "owl")), ([10, 9], ("9", "10"))])
def test_labels_may_be_categories(
    write_folder: Callable[..., Path], labels: list[object], class_names: tuple[str, ...]
) -> None:
    """Of text or whole numbers, as pandas writes them; fractions stay refused."""
    folder = write_folder({"a": 1, "b": 1})
    table = pd.DataFrame({"path": ["a/000.png", "b/000.png"], "label": pd.Categorical(labels)})
    table.to_parquet(folder / "list.parquet")
    assert open_source(str(folder / "list.parquet")).class_names == class_names
    table.assign(label=pd.Categorical([0.5, 1.0])).to_parquet(folder / "list.parquet")
    with pytest.raises(DataError, match=r"label .* holds double"):
        open_source(str(folder / "list.parquet"))


def test_fractional_labels_are_refused(tmp_path: Path) -> None:
    """A float is no class."""
    pd.DataFrame({"path": ["a", "b"], "label": [0.5, 1.0]}).to_parquet(tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"label .* holds double"):
        open_source(str(tmp_path / "list.parquet"))


def test_long_lists_of_offenders_are_cut(write_folder: Callable[..., Path]) -> None:
    """A message names the first five and counts the rest."""
    folder = write_folder({"a": 1, "b": 1})
    (folder / "list.csv").write_text("path,label\n" + "".join(f"{index}.png,{index}\n" for index in range(9)))
    with pytest.raises(DataError, match=r"9 of 9 files .*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png, and 4 more\."):
        open_source(str(folder / "list.csv"))


def test_digits_are_bundled() -> None:
    """All 1797 digits of scikit-learn, white at 255."""
    source = open_source("digits")
    assert len(source) == 1797
    assert source.class_names == tuple("0123456789")
    image = np.asarray(source.load(0))
    assert image.shape == (8, 8)
    assert image.dtype == np.uint8
    assert image[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16


def test_torchvision_halves_are_train_and_test(fashion_mnist: Callable[..., Path]) -> None:
    """The source is the training half; the gate's source is the test half."""
    root = fashion_mnist(train=[3, 0, 9], t10k=[1, 2])
    train, test = (open_source("torchvision:FashionMNIST", root, for_gate=gate) for gate in (False, True))
    assert train.labels.tolist() == [3, 0, 9]
    assert test.labels.tolist() == [1, 2]
    assert train.class_names[0] == "T-shirt/top"
    assert (test.load(1).mode, test.load(1).size) == ("L", (28, 28))
    assert np.asarray(test.load(1)).tolist() != np.asarray(test.load(0)).tolist()


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10"])
def test_torchvision_never_downloads(tmp_path: Path, name: str) -> None:
    """A data set that is not there is an error that says how to fetch it."""
    with pytest.raises(DataError, match=rf"does not hold torchvision's {name}.*download=True"):
        open_source(f"torchvision:{name}", tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("source", "root"), [("torchvision:FakeData", Path()), ("torchvision:CIFAR10", None)])
def test_unknown_torchvision_sets_and_a_missing_root_are_refused(source: str, root: Path | None) -> None:
    """The spec is wrong, not the data."""
    with pytest.raises(SpecError, match=r"data\.source torchvision:"):
        open_source(source, root)


def test_fingerprint_follows_files_labels_and_classes(
    write_folder: Callable[..., Path], photo: Callable[..., Image.Image]
) -> None:
    """It stays while nothing changes, and changes with a file's time or size, a new file, and a class's name."""
    folder = write_folder({"a": 1, "b": 1})

    def fingerprint() -> str:
        return open_source(str(folder)).fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    state = (folder / "a/000.png").stat()
    os.utime(folder / "a/000.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    seen.append(fingerprint())
    (folder / "b/000.png").write_bytes((folder / "b/000.png").read_bytes() + b"\0")
    seen.append(fingerprint())
    photo(9).save(folder / "b" / "new.png")
    seen.append(fingerprint())
    (folder / "b").rename(folder / "c")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_fingerprint_holds_names_that_are_not_utf8(write_folder: Callable[..., Path]) -> None:
    """Whether they can be used is for the manifest to say; an error can be written to any file."""
    folder = write_folder({"a": 1, "b": 1})
    fingerprints = [open_source(str(folder)).fingerprint()]
    odd = folder / "a" / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes((folder / "a/000.png").read_bytes())
    fingerprints.append(open_source(str(folder)).fingerprint())
    folder = folder.rename(folder.with_name(os.fsdecode(b"caf\xe9s")))
    fingerprints.append(open_source(str(folder)).fingerprint())
    assert len(set(fingerprints)) == 3
    source = open_source(str(folder))
    (folder / "a" / odd.name).unlink()
    with pytest.raises(DataError, match=r"a/caf\\xe9\.png: No such file"):
        source.fingerprint()


def test_fingerprint_of_a_vanished_file_is_an_error(write_folder: Callable[..., Path]) -> None:
    """A broken link among the images is named."""
    folder = write_folder({"a": 1, "b": 1})
    (folder / "a" / "link.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(RequantError, match=r"a/link\.png: No such file"):
        open_source(str(folder)).fingerprint()
