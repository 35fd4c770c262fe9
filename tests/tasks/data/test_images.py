"""Prepared images as the other steps use them."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.contracts.errors import DataError, StoreError
from tasks.contracts.records import SPLITS
from tasks.contracts.spec import DataSpec, ModelSpec, PreprocessSpec
from tasks.data.images import PreparedImages, prepare_images
from tasks.data.open_source import open_source
from tasks.data.preprocess import fit_image, normalise

MODEL = ModelSpec(architecture="mine:net")
PLAIN = PreprocessSpec(resize=24, crop=20)

Photo = Callable[..., Image.Image]
WriteFolder = Callable[..., Path]


@pytest.fixture
def folder(write_folder: WriteFolder) -> Path:
    return write_folder({"cat": 20, "dog": 30})


def prepare(folder: Path, scratch: Path, seed: int = 0, **options: object) -> PreparedImages:
    values = {"source": str(folder), "calibration": 10, "preprocess": PLAIN, **options}
    return prepare_images(MODEL, DataSpec.model_validate(values), seed, scratch)


def test_the_bundled_digits_need_nothing(tmp_path: Path) -> None:
    """The defaults give four splits of grey 32x32 images with ten classes."""
    prepared = prepare_images(MODEL, DataSpec(), 0, tmp_path)
    assert prepared.counts == {"train": 566, "calibration": 512, "selection": 270, "gate": 449}
    assert (prepared.height, prepared.width, prepared.channels) == (32, 32, 1)
    assert prepared.class_names == tuple("0123456789")
    values = np.concatenate([values for name in SPLITS for values, _ in prepared.split(name).batches(500)])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_a_second_call_decodes_nothing(folder: Path, tmp_path: Path) -> None:
    """Progress counts all images once, then never again."""
    calls: list[tuple[int, int]] = []
    data = DataSpec(source=str(folder), calibration=10, preprocess=PLAIN)
    first = prepare_images(MODEL, data, 0, tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(count, 50) for count in range(1, 51)]
    again = prepare_images(MODEL, data, 0, tmp_path, lambda *_: pytest.fail("decoded again"))
    assert again.digest == first.digest


def test_batches_are_the_images_of_the_split(folder: Path, tmp_path: Path) -> None:
    """In order, normalised, with their labels; the last batch is what is left."""
    prepared = prepare(folder, tmp_path)
    gate, source = prepared.split("gate"), open_source(str(folder))
    batches = list(gate.batches(5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    expected_NHWC = np.stack([fit_image(source.load(int(row)), PLAIN) for row in gate.rows])
    np.testing.assert_array_equal(np.concatenate([values for values, _ in batches]), normalise(expected_NHWC, PLAIN))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), source.labels[gate.rows])
    np.testing.assert_array_equal(gate.pixels(slice(3, 6)), expected_NHWC[3:6])


@pytest.mark.parametrize(("limit", "sizes"), [(0, []), (5, [5]), (7, [5, 2]), (99, [5, 5, 2])])
def test_limit_takes_the_first_images(folder: Path, tmp_path: Path, limit: int, sizes: list[int]) -> None:
    """A limit above the split's size takes all of it."""
    assert [len(labels) for _, labels in prepare(folder, tmp_path).split("gate").batches(5, limit=limit)] == sizes


def test_pixels_come_in_the_order_asked_for(folder: Path, tmp_path: Path) -> None:
    """For training, which shuffles."""
    train = prepare(folder, tmp_path).split("train")
    order = np.random.default_rng(0).permutation(len(train))
    batches = list(train.batches_uint8(4, order=order))
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in batches]), train.pixels(order))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), train.labels[order])
    assert batches[0][0].dtype == np.uint8
    assert sum(len(labels) for _, labels in train.batches_uint8(4)) == len(train)


def test_one_batch_is_made_ahead_and_no_more(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the caller works on the first batch, the second is read, the third is not."""
    gate = prepare(folder, tmp_path).split("gate")
    made: list[int] = []

    def counted(pixels_NHWC: np.ndarray, preprocess: PreprocessSpec) -> np.ndarray:
        made.append(len(pixels_NHWC))
        return normalise(pixels_NHWC, preprocess)

    monkeypatch.setattr("tasks.data.images.normalise", counted)
    threads = threading.active_count()
    batches = gate.batches(2)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(made) == 2
    batches.close()
    assert len(made) == 2
    assert threading.active_count() == threads


def test_digest_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    """Moved files are the same data; another seed, split, label or mean is not."""
    digest = prepare(folder, tmp_path / "a").digest
    others = [
        prepare(folder, tmp_path / "a", seed=1).digest,
        prepare(folder, tmp_path / "a", gate=11).digest,
        prepare(folder, tmp_path / "a", preprocess=PLAIN.model_copy(update={"mean": (0.5,) * 3})).digest,
    ]
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert prepare(moved, tmp_path / "b").digest == digest
    (moved / "cat").rename(moved / "lynx")
    others.append(prepare(moved, tmp_path / "b").digest)
    assert len({digest, *others}) == 5


def test_the_gate_may_have_a_source_of_its_own(folder: Path, write_folder: WriteFolder, tmp_path: Path) -> None:
    """Its classes are matched by name, and progress counts both sources."""
    gate_folder = write_folder({"dog": 4, "cat": 3}, name="gate", first_seed=1000)
    shutil.copy(folder / "dog" / "005.png", gate_folder / "dog" / "copy.png")
    calls: list[tuple[int, int]] = []
    data = DataSpec(source=str(folder), gate_source=str(gate_folder), calibration=10, preprocess=PLAIN)
    prepared = prepare_images(MODEL, data, 0, tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == [(count, 58) for count in range(1, 59)]
    assert prepared.counts["gate"] == 8
    assert sum(prepared.counts.values()) == 57
    assert prepared.duplicates_dropped == 1
    gate, source = prepared.split("gate"), open_source(str(gate_folder))
    for position, row in enumerate(gate.rows):
        np.testing.assert_array_equal(
            gate.pixels(slice(position, position + 1))[0], fit_image(source.load(int(row)), PLAIN)
        )


def test_a_gate_with_fewer_classes_keeps_their_labels(write_folder: WriteFolder, tmp_path: Path) -> None:
    """Label numbers are those of the source."""
    source = write_folder({"ape": 10, "bee": 10, "cow": 10})
    gate = write_folder({"cow": 2, "bee": 2}, name="gate", first_seed=1000)
    prepared = prepare(source, tmp_path, gate_source=str(gate), calibration=5)
    assert sorted(prepared.split("gate").labels.tolist()) == [1, 1, 2, 2]


def test_an_unknown_class_in_the_gate_is_refused(folder: Path, write_folder: WriteFolder, tmp_path: Path) -> None:
    """The model has no output for it."""
    gate = write_folder({"cat": 1, "owl": 1}, name="gate", first_seed=1000)
    with pytest.raises(DataError, match=r"gate has classes that are not the model's: owl"):
        prepare(folder, tmp_path, gate_source=str(gate))


def test_sources_of_two_sizes_are_refused(
    folder: Path, write_folder: WriteFolder, photo: Photo, tmp_path: Path
) -> None:
    """Each source is uniform, but not both together."""
    gate = write_folder({"cat": 2, "dog": 2}, name="gate", first_seed=1000)
    for seed, path in enumerate(gate.rglob("*.png")):
        photo(seed, width=40, height=48).save(path)
    with pytest.raises(DataError, match=r"end as \(40, 48\) .*gate as \(48, 40\)"):
        prepare(folder, tmp_path, gate_source=str(gate), preprocess=PreprocessSpec())


def test_torchvisions_test_half_is_the_gate(fashion_mnist: Callable[..., Path]) -> None:
    """A data set that comes in two halves brings its own gate."""
    root = fashion_mnist(train=list(range(10)) * 4, t10k=list(range(10)) * 2)
    data = DataSpec(
        source="torchvision:FashionMNIST",
        root=str(root),
        calibration=10,
        selection=10,
        preprocess=PreprocessSpec(mean=(0.5,), std=(0.5,)),
    )
    prepared = prepare_images(MODEL, data, 0, root / "scratch")
    assert prepared.counts == {"train": 20, "calibration": 10, "selection": 10, "gate": 20}
    assert (prepared.height, prepared.width, prepared.channels) == (28, 28, 1)


def test_members_are_listed(folder: Path, tmp_path: Path) -> None:
    """A line per image: where it came from, its label, its split, and the digest of its pixels."""
    prepared = prepare(folder, tmp_path)
    prepared.write_members(tmp_path / "members.parquet")
    table = pd.read_parquet(tmp_path / "members.parquet")
    assert list(table) == ["row", "path", "label", "split", "pixels"]
    assert table.groupby("split").size().to_dict() == prepared.counts
    assert table["pixels"].is_unique
    assert sorted(table["path"]) == sorted(open_source(str(folder)).names)
    line = table[table["path"] == "dog/007.png"].iloc[0]
    assert line["label"] == 1
    assert line["row"] in prepared.split(line["split"]).rows
    first = (tmp_path / "members.parquet").read_bytes()
    prepared.write_members(tmp_path / "members.parquet")
    assert (tmp_path / "members.parquet").read_bytes() == first


def test_members_that_cannot_be_written_are_an_error(folder: Path, tmp_path: Path) -> None:
    """One clear message names the folder."""
    with pytest.raises(StoreError, match="nowhere cannot be written: No such file or directory"):
        prepare(folder, tmp_path).write_members(tmp_path / "nowhere" / "members.parquet")
