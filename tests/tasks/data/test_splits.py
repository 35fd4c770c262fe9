"""Who belongs to which split."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.contracts.errors import DataError
from tasks.contracts.records import SPLITS, SplitName
from tasks.contracts.spec import DataSpec
from tasks.data.cache import DIGEST, DecodedImages
from tasks.data.splits import Splits, split_images


def decoded(labels: Sequence[int], *, contents: Sequence[object] | None = None, num_classes: int = 0) -> DecodedImages:
    """Images whose pixels are told apart by `contents` (default: no two alike)."""
    contents = range(len(labels)) if contents is None else contents
    return DecodedImages(
        pixels_NHWC=np.zeros((len(labels), 1, 1, 1), np.uint8),
        digests=np.array(
            [hashlib.md5(repr(content).encode(), usedforsecurity=False).hexdigest() for content in contents], DIGEST
        ),
        labels=np.array(labels, np.int64),
        names=[f"{row}.png" for row in range(len(labels))],
        class_names=tuple(f"class{label}" for label in range(num_classes or max(labels) + 1)),
        geometry="{}",
    )


def spec(calibration: int = 4, selection: float = 0.2, gate: float = 0.3) -> DataSpec:
    return DataSpec(calibration=calibration, selection=selection, gate=gate)


def members(images: DecodedImages, splits: Splits) -> dict[SplitName, list[bytes]]:
    """The digests in each split, in order."""
    return {name: images.digests[rows].tolist() for name, rows in splits.rows.items()}


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], DataSpec]:
    """Class sizes, some of them zero, and a spec that they can satisfy."""
    counts = draw(st.lists(st.integers(0, 30), min_size=2, max_size=8))
    total = sum(counts)
    assume(total >= 3)
    calibration = draw(st.integers(1, total - 2))
    selection = draw(st.integers(1, total - calibration - 1))
    gate = draw(st.integers(1, total - calibration - selection))
    return counts, spec(calibration, selection, gate)


@given(tables(), st.integers(0, 2**32 - 1))
def test_splits_are_disjoint_complete_and_stratified(table: tuple[list[int], DataSpec], seed: int) -> None:
    """Each image is in one split, sizes are as asked, and each class gives its exact share rounded up or down."""
    counts, data = table
    images = decoded(np.repeat(np.arange(len(counts)), counts).tolist(), num_classes=len(counts))
    splits = split_images(images, data, seed)
    together = np.concatenate(list(splits.rows.values()))
    assert sorted(together.tolist()) == list(range(len(images)))
    asked = {"calibration": data.calibration, "selection": data.selection, "gate": data.gate}
    for name, rows in splits.rows.items():
        assert len(rows) == asked.get(name, len(images) - sum(asked.values()))
        shares = np.array(counts) * len(rows) / len(images)
        found = np.bincount(images.labels[rows], minlength=len(counts))
        assert (np.abs(found - shares) < 1).all()


@given(tables(), st.randoms(use_true_random=False))
def test_members_follow_pixels_and_seed_alone(table: tuple[list[int], DataSpec], random: object) -> None:
    """Another order of the files, as another file system gives it, changes neither members nor their order."""
    counts, data = table
    images = decoded(np.repeat(np.arange(len(counts)), counts).tolist(), num_classes=len(counts))
    order = list(range(len(images)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = replace(images, digests=images.digests[order], labels=images.labels[order])
    assert members(images, split_images(images, data, 7)) == members(shuffled, split_images(shuffled, data, 7))


def test_the_seed_decides() -> None:
    """The same seed gives the same members, another seed others."""
    images = decoded([0, 1] * 50)
    first, again, other = (members(images, split_images(images, spec(), seed)) for seed in (1, 1, 2))
    assert first == again
    assert all(set(first[name]) != set(other[name]) for name in SPLITS)


def test_any_first_part_of_a_split_mixes_the_classes() -> None:
    """Files come class by class; the rows of a split do not."""
    images = decoded(np.repeat(np.arange(4), 100).tolist())
    rows = split_images(images, spec(gate=200), 0).rows["gate"]
    assert np.bincount(images.labels[rows[:60]], minlength=4).min() >= 5


def test_growing_data_moves_few_images() -> None:
    """One more image per class does not reshuffle the rest."""
    images = decoded([0, 1] * 201)
    fewer = decoded([0, 1] * 200)
    grown, before = (members(some, split_images(some, spec(), 0)) for some in (images, fewer))
    assert all(len(set(before[name]) - set(grown[name])) <= 4 for name in SPLITS)


def test_shares_are_of_the_source_and_at_least_one() -> None:
    """A share is rounded; train is the rest."""
    splits = split_images(decoded([0, 1] * 10), spec(4, selection=0.01, gate=0.26), 0)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {
        "train": 10,
        "calibration": 4,
        "selection": 1,
        "gate": 5,
    }


def test_train_may_be_empty() -> None:
    """Calibration alone needs no training images, and an empty train split lacks no class."""
    splits = split_images(decoded([0, 1] * 10), spec(10, selection=4, gate=6), 0)
    assert len(splits.rows["train"]) == 0


def test_duplicates_are_kept_once() -> None:
    """Equal pixels with the same label are one image."""
    images = decoded([0, 1] * 10, contents=[*range(18), 0, 1])
    splits = split_images(images, spec(), 0)
    assert splits.duplicates_dropped == 2
    together = np.concatenate(list(splits.rows.values()))
    assert len(together) == len(np.unique(images.digests[together])) == 18


def test_equal_pixels_with_two_labels_are_refused() -> None:
    """Both files and both classes are named."""
    images = decoded([0, 1] * 10, contents=[*range(19), 0])
    with pytest.raises(DataError, match=r"1 images .*: 0\.png \(class0\) and 19\.png \(class1\)\."):
        split_images(images, spec(), 0)


def test_the_gates_own_source_takes_precedence() -> None:
    """All of it is the gate; its images leave the source and are counted with its own duplicates."""
    source = decoded([0, 1] * 10)
    gate = decoded([0, 1, 0, 0], contents=[0, "new", "newer", "newer"])
    splits = split_images(source, spec(), 0, gate)
    assert sorted(splits.rows["gate"].tolist()) == [0, 1, 2]
    rest = np.concatenate([splits.rows[name] for name in ("train", "calibration", "selection")])
    assert sorted(rest.tolist()) == list(range(1, 20))
    assert splits.duplicates_dropped == 2


def test_labels_must_agree_between_the_sources() -> None:
    """The same pixels under another label in the gate's source are refused."""
    with pytest.raises(DataError, match="same pixels as one of another class"):
        split_images(decoded([0, 1] * 10), spec(), 0, decoded([1, 1], contents=[0, 1]))


@pytest.mark.parametrize(("contents", "dropped"), [(None, r"\."), ([*range(19), 1], " after 1 duplicates")])
def test_fewer_images_than_asked_are_refused(contents: list[int] | None, dropped: str) -> None:
    """The numbers are named."""
    images = decoded([0, 1] * 10, contents=contents)
    message = rf"ask for 24 images \(6 gate \+ 4 selection \+ 14 calibration\), but digits has \d+{dropped}"
    with pytest.raises(DataError, match=message):
        split_images(images, spec(14, selection=4, gate=6), 0)
