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
from tasks.contracts.records import Finding
from tasks.contracts.spec import ChecksSpec, Limit, PreprocessSpec
from tasks.data.checks import IMAGE_RULES, MODEL_RULES, SHOWN, Fact, Rule, check_images, check_splits, judge_facts
from tasks.data.manifest import SCHEMA, build_manifest
from tasks.data.open_source import open_source

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


CLASSES = ("0", "1")
CHECKS = ChecksSpec()


def findings(folder: Path, scratch: Path, checks: ChecksSpec = CHECKS) -> dict[str, Finding]:
    frame = build_manifest(open_source(str(folder)), scratch)
    return {finding.rule: finding for finding in check_images(frame, CLASSES, checks)}


def paths(finding: Finding) -> list[str]:
    return [offender.path for offender in finding.offenders]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8))


def halves() -> Image.Image:
    """Black above, white below."""
    return Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 60)[:, None].repeat(120, axis=1))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


def strange(folder: Path) -> None:
    (folder / "2").mkdir()
    PHOTOS[0].crop((0, 0, 200, 200)).save(folder / "2/planted.png")


DEFECTS: dict[str, Plant] = {
    "decodes": lambda folder: (folder / "0/planted.png").write_bytes(b"<html>"),
    "labelled": strange,
    "agrees": lambda folder: (folder / "1/planted.png").write_bytes((folder / "0/007.png").read_bytes()),
    "correlation": lambda folder: noise().save(folder / "0/planted.jpg"),
    "contrast": lambda folder: Image.new("RGB", (50, 50), "grey").save(folder / "0/planted.png"),
    "short_side": lambda folder: PHOTOS[0].resize((30, 6)).save(folder / "0/planted.png"),
    "aspect": lambda folder: PHOTOS[0].crop((0, 100, 600, 160)).save(folder / "0/planted.png"),
    "plain_mode": lambda folder: PHOTOS[0].convert("CMYK").save(folder / "0/planted.jpg"),
    "num_frames": lambda folder: PHOTOS[0].save(folder / "0/planted.webp", save_all=True, append_images=[PHOTOS[1]]),
    "upright": lambda folder: PHOTOS[0].save(folder / "0/planted.jpg", exif=turned()),
    "unique": lambda folder: (folder / "0/planted.png").write_bytes((folder / "0/007.png").read_bytes()),
    "distinct": lambda folder: Image.open(folder / "0/007.png").save(folder / "0/planted.jpg", quality=60),
    "brightness": lambda folder: PHOTOS[0].point(lambda value: value // 16).save(folder / "0/planted.png"),
    "entropy": lambda folder: halves().save(folder / "0/planted.png"),
    "sharpness": lambda folder: PHOTOS[0].filter(ImageFilter.GaussianBlur(60)).save(folder / "0/planted.png"),
}


FOUND = {  # what a finding tells of it
    "decodes": "is no JPEG", "labelled": "2", "agrees": "1; 0/007.png is 0", "contrast": "0", "short_side": "6",
    "plain_mode": "CMYK", "num_frames": "2", "upright": "3", "unique": "like 0/007.png", "distinct": "like 0/007.png",
}  # fmt: skip


def test_every_rule_has_a_defect() -> None:
    assert [rule.name for rule in IMAGE_RULES] == list(DEFECTS)


def test_clean_images_pass(photos: Path, tmp_path: Path) -> None:
    """Every rule, though parts of one photograph resemble each other."""
    found = findings(photos, tmp_path / "scratch")
    assert {name for name, finding in found.items() if not finding.passed} <= {"distinct"}
    assert found["decodes"].observed == "100.00 % of 120 images"


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_named(defect: str, photos: Path, tmp_path: Path) -> None:
    """One bad file: found by its rule; whether that fails depends on the share that the rule allows."""
    before = paths(findings(photos, tmp_path / "scratch")[defect])
    DEFECTS[defect](photos)
    finding = findings(photos, tmp_path / "scratch")[defect]
    (planted,) = (path.relative_to(photos).as_posix() for path in photos.glob("*/planted.*"))
    assert set(paths(finding)) - set(before) == {planted}
    share = getattr(CHECKS, defect).share if hasattr(CHECKS, defect) else 1
    assert finding.passed == (finding.num_offenders <= (1 - share) * 121)
    assert finding.num_offenders == len(finding.offenders) <= SHOWN
    assert FOUND.get(defect, "") in {offender.path: offender.found for offender in finding.offenders}[planted]


def test_a_critical_rule_lets_nothing_pass(photos: Path, tmp_path: Path) -> None:
    """Noise among a hundred and twenty photographs is refused."""
    DEFECTS["correlation"](photos)
    finding = findings(photos, tmp_path / "scratch")["correlation"]
    assert not finding.passed
    assert finding.severity == "critical"


def test_offenders_are_counted_beyond_those_named(photos: Path, tmp_path: Path) -> None:
    """A report is not flooded."""
    for number in range(SHOWN + 5):
        (photos / f"1/bad{number:03}.png").touch()
    finding = findings(photos, tmp_path / "scratch")["decodes"]
    assert finding.num_offenders == SHOWN + 5
    assert len(finding.offenders) == SHOWN
    assert paths(finding)[0] == "1/bad000.png"


def test_nothing_to_check_is_an_error() -> None:
    """An empty table would keep every rule."""
    with pytest.raises(DataError, match="lists no images"):
        check_images(pd.DataFrame(), CLASSES, CHECKS)


def test_images_that_all_fail_to_decode_are_findings(tmp_path: Path) -> None:
    """And no crash, though there is nothing to measure."""
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    found = findings(tmp_path / "photos", tmp_path / "scratch")
    assert found["decodes"].num_offenders == 2
    assert not found["decodes"].passed


def test_a_rule_on_a_column_that_is_not_there_is_our_error(photos: Path, tmp_path: Path) -> None:
    """Great Expectations would only note an exception and go on."""
    frame = build_manifest(open_source(str(photos)), tmp_path / "scratch")
    rule = Rule("no_such_column", "is there", "Mend the rule.")
    with pytest.raises(RuntimeError, match="no_such_column"):
        check_images(frame, CLASSES, CHECKS, (rule,))


def test_a_limit_of_the_spec_is_what_counts(photos: Path, tmp_path: Path) -> None:
    """One of the data's own, one that is switched off, and one that fails the run now."""
    DEFECTS["brightness"](photos)
    checks = ChecksSpec(
        brightness=Limit(low=0.01), sharpness=Limit(low=0, severity="off"), entropy=Limit(low=7.9, severity="critical")
    )
    found = findings(photos, tmp_path / "scratch", checks)
    assert found["brightness"].num_offenders == 0
    assert found["brightness"].limit == "at least 0.01 in all images"
    assert "sharpness" not in found
    assert (found["entropy"].passed, found["entropy"].severity) == (False, "critical")


def test_one_offender_among_many_is_not_rounded_away() -> None:
    """Of 40,000 images 99.9975 % would read as all of them."""
    count = 40_000
    frame = pd.DataFrame({"path": [f"{row}.png" for row in range(count)], "label": ["0"] * (count - 1) + ["2"]})
    frame = pd.concat([frame, pd.DataFrame(index=frame.index, columns=pd.Index(SCHEMA.names[3:]))], axis=1)
    frame["fault"] = "is empty"  # so that nothing else is judged
    labelled = next(rule for rule in IMAGE_RULES if rule.name == "labelled")
    (finding,) = check_images(frame, CLASSES, CHECKS, (labelled,))
    assert (finding.passed, finding.num_offenders) == (False, 1)
    assert finding.observed == "all but 1 of 40,000 images"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_keeps_no_rule(value: float) -> None:
    """Great Expectations takes it for a missing value, which it passes over."""
    facts = {"feature_ks": Fact(value), "answer_psi": Fact(0.0)}
    assert [finding.passed for finding in judge_facts(facts, MODEL_RULES, CHECKS)] == [False, True]


def test_look_alikes_are_not_sought_where_no_rule_asks(members: pd.DataFrame) -> None:
    """Not even hashes are needed then."""
    off = Limit(low=1, severity="off")
    checks = ChecksSpec(distinct=off, alike=off)
    blind = members.drop(columns=["phash", "thumbnail"])
    found = [*check_images(blind, ("cat", "dog"), checks), *check_splits(blind, RECIPE, checks)]
    assert not {"distinct", "alike"} & {finding.rule for finding in found}


RECIPE = PreprocessSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture
def members(tmp_path: Path, write_folder: Callable[..., Path]) -> pd.DataFrame:
    """Two classes, calibration and gate of 150 and 250 images each half."""
    frame = build_manifest(open_source(str(write_folder({"cat": 200, "dog": 200}))), tmp_path / "scratch")
    frame["split"] = np.where(np.arange(400) % 8 < 3, "calibration", "gate")
    return frame


def split_findings(
    members: pd.DataFrame, preprocess: PreprocessSpec = RECIPE, past: pd.DataFrame | None = None
) -> dict[str, Finding]:
    return {finding.rule: finding for finding in check_splits(members, preprocess, CHECKS, past)}


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
    assert {offender.path: offender.found for offender in found["shared"].offenders} == {
        original: "in gate, and as cat/twin.png in calibration",
        "cat/twin.png": f"in calibration, and as {original} in gate",
    }
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
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), {"spread"}),  # forgotten
        ((0.485, 0.456, 0.406), (0.0525, 0.05, 0.05), {"spread"}),  # applied twice
        ((124.0, 116.0, 104.0), (58.0, 57.0, 57.0), {"offset", "spread"}),  # in 0..255
    ],
)
def test_a_wrong_normalisation_is_seen(
    members: pd.DataFrame, mean: tuple[float, ...], std: tuple[float, ...], rules: set[str]
) -> None:
    """Inputs are neither centred nor spread as trained models want them."""
    assert rules <= failing(split_findings(members, PreprocessSpec(mean=mean, std=std))) <= rules | {"offset"}


def test_a_model_of_one_channel_is_judged_by_luma(
    tmp_path: Path, write_folder: Callable[..., Path], photo: Callable[..., Image.Image]
) -> None:
    """Of green pictures: the recipe of what the model is given is right, that of their dark red channel is wrong."""
    folder = write_folder({"cat": 0, "dog": 0})
    inputs = []
    for seed in range(300):
        red, green, blue = photo(seed).split()
        green_photo = Image.merge("RGB", [red.point(lambda value: value // 10), green, blue.point(lambda _: 0)])
        green_photo.save(folder / ("cat", "dog")[seed % 2] / f"{seed:03}.png")
        inputs.append(np.asarray(green_photo.convert("L"), np.float64) / 255)
    members = build_manifest(open_source(str(folder)), tmp_path / "scratch")
    members["split"] = np.where(np.arange(300) % 2, "calibration", "gate")
    right = split_findings(members, PreprocessSpec(mean=(float(np.mean(inputs)),), std=(float(np.std(inputs)),)))
    assert not {"offset", "spread"} & failing(right)
    assert abs(float(right["offset"].observed)) < 0.1
    assert float(right["spread"].observed) == pytest.approx(1, abs=0.1)
    of_red = members[["mean_r", "std_r"]].mean() / 255
    assert {"offset", "spread"} <= failing(
        split_findings(members, PreprocessSpec(mean=(of_red["mean_r"],), std=(of_red["std_r"],)))
    )


def test_few_images_a_missing_class_and_imbalance(members: pd.DataFrame) -> None:
    """Counted in the calibration split alone."""
    dogs = (members["label"] == "dog") & (members["split"] == "calibration")
    found = split_findings(members[~dogs])
    assert failing(found) >= {"num_calibration", "missing_classes"}
    assert paths(found["missing_classes"]) == ["calibration: dog"]
    few = members.drop(members[dogs].index[3:])
    assert "imbalance" in failing(split_findings(few))


def test_drift_is_seen(members: pd.DataFrame) -> None:
    """Calibration images by night, gate images by day."""
    night = members["split"] == "calibration"
    members.loc[night, "brightness"] *= 0.5
    found = split_findings(members)
    assert failing(found) == {"drift_psi", "drift_ks"}
    assert found["drift_psi"].observed.endswith("(brightness)")


def test_chance_is_no_drift(members: pd.DataFrame) -> None:
    """The fewer images, the farther they may be apart before it means anything."""
    few = members.groupby("split").head(12)
    found = split_findings(few)
    assert float(found["drift_psi"].observed.split()[0]) > CHECKS.drift_psi.high  # type: ignore[operator]
    assert not {"drift_psi", "drift_ks"} & failing(found)
    assert found["drift_psi"].limit != split_findings(members)["drift_psi"].limit


def test_drift_from_what_was_accepted_before(members: pd.DataFrame) -> None:
    """Judged only if there is a past."""
    past = members[members["split"] == "calibration"].copy()
    assert failing(split_findings(members, past=past)) == set()
    past["sharpness"] *= 2
    found = split_findings(members, past=past)
    assert failing(found) == {"past_psi", "past_ks"}
    assert "past_psi" not in split_findings(members)


def test_an_empty_split_is_an_error(members: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="calibration split has no image"):
        check_splits(members[members["split"] == "gate"], RECIPE, CHECKS)
