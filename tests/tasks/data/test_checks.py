from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from tasks.contracts.errors import DataError
from tasks.contracts.spec import PreprocessSpec
from tasks.data.checks import IMAGE_RULES, SHOWN, Finding, Rule, check_images, check_splits
from tasks.data.manifest import build_manifest
from tasks.data.sources import open_source

PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
Plant = Callable[[Path], object]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of sixty different parts of two real photographs."""
    root, random = tmp_path_factory.mktemp("clean"), np.random.default_rng(0)
    for label, photo in enumerate(PHOTOS):
        folder = root / str(label)
        folder.mkdir()
        for number in range(60):
            side = int(random.integers(180, 320))
            left, top = (int(random.integers(0, length - side)) for length in photo.size)
            photo.crop((left, top, left + side, top + side)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture
def photos(clean: Path, tmp_path: Path) -> Path:
    """A copy of them to plant defects in."""
    return Path(shutil.copytree(clean, tmp_path / "photos"))


def findings(folder: Path, scratch: Path) -> dict[str, Finding]:
    frame = build_manifest(open_source(str(folder)), scratch)
    return {finding.rule.column: finding for finding in check_images(frame)}


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8))


def halves() -> Image.Image:
    """Black above, white below."""
    return Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 60)[:, None].repeat(120, axis=1))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


DEFECTS: dict[str, Plant] = {
    "usable": lambda folder: (folder / "0/planted.png").write_bytes(b"<html>"),
    "correlation": lambda folder: noise().save(folder / "0/planted.jpg"),
    "contrast": lambda folder: Image.new("RGB", (50, 50), "grey").save(folder / "0/planted.png"),
    "short_side": lambda folder: PHOTOS[0].resize((30, 6)).save(folder / "0/planted.png"),
    "aspect": lambda folder: PHOTOS[0].crop((0, 100, 600, 160)).save(folder / "0/planted.png"),
    "ordinary": lambda folder: PHOTOS[0].convert("CMYK").save(folder / "0/planted.jpg"),
    "single": lambda folder: PHOTOS[0].save(folder / "0/planted.webp", save_all=True, append_images=[PHOTOS[1]]),
    "upright": lambda folder: PHOTOS[0].save(folder / "0/planted.jpg", exif=turned()),
    "unique": lambda folder: (folder / "0/planted.png").write_bytes((folder / "0/007.png").read_bytes()),
    "distinct": lambda folder: Image.open(folder / "0/007.png").save(folder / "0/planted.jpg", quality=60),
    "brightness": lambda folder: PHOTOS[0].point(lambda value: value // 16).save(folder / "0/planted.png"),
    "entropy": lambda folder: halves().save(folder / "0/planted.png"),
    "sharpness": lambda folder: PHOTOS[0].filter(ImageFilter.GaussianBlur(60)).save(folder / "0/planted.png"),
}


def test_every_rule_has_a_defect() -> None:
    assert [rule.column for rule in IMAGE_RULES] == list(DEFECTS)


def test_clean_images_pass(photos: Path, tmp_path: Path) -> None:
    """Every rule, though parts of one photograph resemble each other."""
    found = findings(photos, tmp_path / "scratch")
    assert {name for name, finding in found.items() if not finding.passed} <= {"distinct"}
    assert found["usable"].observed == "100.00 % of 120"


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_named(defect: str, photos: Path, tmp_path: Path) -> None:
    """One bad file: found by its rule; whether that fails depends on the share that the rule allows."""
    before = findings(photos, tmp_path / "scratch")[defect].offenders
    DEFECTS[defect](photos)
    finding = findings(photos, tmp_path / "scratch")[defect]
    (planted,) = (path.relative_to(photos).as_posix() for path in photos.glob("0/planted.*"))
    new = set(finding.offenders) - set(before)
    assert new == {planted}
    assert finding.passed == (finding.num_offenders <= (1 - finding.rule.share) * 121)
    assert finding.num_offenders == len(finding.offenders) <= SHOWN


def test_a_critical_rule_lets_nothing_pass(photos: Path, tmp_path: Path) -> None:
    """Noise among a hundred and twenty photographs is refused."""
    DEFECTS["correlation"](photos)
    finding = findings(photos, tmp_path / "scratch")["correlation"]
    assert not finding.passed
    assert finding.rule.severity == "critical"


def test_offenders_are_counted_beyond_those_named(photos: Path, tmp_path: Path) -> None:
    """A report is not flooded."""
    for number in range(SHOWN + 5):
        (photos / f"1/bad{number:03}.png").touch()
    finding = findings(photos, tmp_path / "scratch")["usable"]
    assert finding.num_offenders == SHOWN + 5
    assert len(finding.offenders) == SHOWN
    assert finding.offenders[0] == "1/bad000.png"


def test_nothing_to_check_is_an_error() -> None:
    """An empty table would keep every rule."""
    with pytest.raises(DataError, match="lists no images"):
        check_images(pd.DataFrame())


def test_images_that_all_fail_to_decode_are_findings(tmp_path: Path) -> None:
    """And no crash, though there is nothing to measure."""
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    found = findings(tmp_path / "photos", tmp_path / "scratch")
    assert found["usable"].num_offenders == 2
    assert not found["usable"].passed


def test_a_rule_on_a_column_that_is_not_there_is_our_error(photos: Path, tmp_path: Path) -> None:
    """Great Expectations would only note an exception and go on."""
    frame = build_manifest(open_source(str(photos)), tmp_path / "scratch")
    rule = Rule("no_such_column", "is there", 0, 1, "critical", "Mend the rule.")
    with pytest.raises(RuntimeError, match="no_such_column"):
        check_images(frame, (rule,))


RECIPE = PreprocessSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture
def members(tmp_path: Path, write_folder: Callable[..., Path]) -> pd.DataFrame:
    """Two classes, calibration and gate of 150 and 250 images each half."""
    frame = build_manifest(open_source(str(write_folder({"cat": 200, "dog": 200}))), tmp_path / "scratch")
    frame["split"] = np.where(np.arange(400) % 8 < 3, "calibration", "gate")
    return frame


def split_findings(members: pd.DataFrame, preprocess: PreprocessSpec = RECIPE) -> dict[str, Finding]:
    return {finding.rule.column: finding for finding in check_splits(members, preprocess)}


def failing(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if not finding.passed}


def test_clean_splits_pass(members: pd.DataFrame) -> None:
    """Drawn from the same images, none shared."""
    found = split_findings(members)
    assert failing(found) == set()
    assert found["num_calibration"].observed == "150"


def test_an_image_in_two_splits_is_named(members: pd.DataFrame) -> None:
    """Both places of it."""
    gate = members[members["split"] == "gate"].iloc[[0]]
    twin, original = gate.assign(split="calibration", path="cat/twin.png"), str(gate["path"].item())
    found = split_findings(pd.concat([members, twin], ignore_index=True))
    assert failing(found) == {"shared"}
    assert set(found["shared"].offenders) == {"cat/twin.png", original}
    assert found["shared"].num_offenders == 2


def test_an_image_that_only_looks_like_one_of_another_split(members: pd.DataFrame) -> None:
    """A warning: pixels differ."""
    gate = members[members["split"] == "gate"].iloc[[0]]
    twin = gate.assign(split="calibration", path="cat/twin.png", pixels="0" * 64)
    found = split_findings(pd.concat([members, twin], ignore_index=True))
    assert failing(found) == {"alike"}
    assert found["alike"].num_offenders == 2


@pytest.mark.parametrize(
    ("mean", "std", "rules"),
    [
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), {"low_spread"}),  # forgotten
        ((0.485, 0.456, 0.406), (0.0525, 0.05, 0.05), {"high_spread"}),  # applied twice
        ((124.0, 116.0, 104.0), (58.0, 57.0, 57.0), {"offset", "low_spread"}),  # in 0..255
    ],
)
def test_a_wrong_normalisation_is_seen(
    members: pd.DataFrame, mean: tuple[float, ...], std: tuple[float, ...], rules: set[str]
) -> None:
    """Inputs are neither centred nor spread as trained models want them."""
    assert rules <= failing(split_findings(members, PreprocessSpec(mean=mean, std=std))) <= rules | {"offset"}


def test_few_images_a_missing_class_and_imbalance(members: pd.DataFrame) -> None:
    """Counted in the calibration split alone."""
    dogs = (members["label"] == "dog") & (members["split"] == "calibration")
    assert failing(split_findings(members[~dogs])) >= {"num_calibration", "missing_classes"}
    few = members.drop(members[dogs].index[3:])
    assert "imbalance" in failing(split_findings(few))


def test_drift_is_seen(members: pd.DataFrame) -> None:
    """Calibration images by night, gate images by day."""
    night = members["split"] == "calibration"
    members.loc[night, "brightness"] *= 0.5
    assert failing(split_findings(members)) == {"drift"}


def test_an_empty_split_is_an_error(members: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="calibration split has no image"):
        check_splits(members[members["split"] == "gate"], RECIPE)
