"""The contract that calibration data must keep, as Great Expectations suites over the manifest.

Two suites: one over the images (a row each), one over facts of the whole set (a single row). Both fail closed: an empty
manifest breaks the row count, and an expectation that raises is an error of ours, never a finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from tasks.contracts.errors import DataError
from tasks.contracts.spec import PreprocessSpec
from tasks.data.drift import psi, psi_by_chance
from tasks.data.measure import THUMBNAIL
from tasks.data.near import groups_of, near_pairs

Severity = Literal["critical", "warning"]

SHOWN = 20  # offending files that a finding names; it counts the rest
_MUCH_DRIFT = 0.25
_ORDINARY = frozenset({"RGB", "L"})
_RECIPE = "Check data.preprocess.mean and std against what the model was trained with, and images for being in 0..255."


@dataclass(frozen=True)
class Rule:
    """A column of numbers, the range that they must keep, and the share of rows that must keep it."""

    column: str
    says: str
    low: float | None
    high: float | None
    severity: Severity
    remedy: str
    share: float = 1.0


@dataclass(frozen=True)
class Finding:
    """What came of one rule."""

    rule: Rule
    passed: bool
    observed: str
    num_offenders: int
    offenders: tuple[str, ...]  # the first paths


IMAGE_RULES = (
    Rule("usable", "decodes completely", 1, None, "critical", "Mend or remove these files."),
    Rule(
        "correlation",
        "is no noise: neighbouring pixels resemble one another",
        0.2,
        None,
        "critical",
        "Calibrate on real images; ranges measured on noise fit nothing that the model will see.",
    ),
    Rule("contrast", "is not of one colour", 1.0, None, "critical", "Remove images that show nothing."),
    Rule("short_side", "has a short side of some pixels", 8, None, "warning", "Remove thumbnails and icons."),
    Rule("aspect", "is not much longer than wide", 0.35, None, "warning", "Crop these images.", 0.98),
    Rule("ordinary", "is stored as colour or grey", 1, None, "warning", "Convert palette, CMYK and alpha.", 0.98),
    Rule("single", "is a single picture", 1, None, "warning", "Only the first frame is used: export stills."),
    Rule("upright", "is stored upright", 1, None, "warning", "It is turned as EXIF says; does the model's input?", 0.9),
    Rule("unique", "has pixels of its own", 1, None, "warning", "Remove copies; one of each is used.", 0.99),
    Rule("distinct", "resembles no other image", 1, None, "warning", "Remove near copies, such as frames.", 0.98),
    Rule("brightness", "is neither black nor white", 0.08, 0.95, "warning", "Look at the exposure.", 0.98),
    Rule("entropy", "holds some information", 1.5, None, "warning", "Look for blank and drawn images.", 0.99),
    Rule("sharpness", "is not blurred", 12, None, "warning", "Look at the focus, and at how it was scaled.", 0.95),
)


SPLIT_RULES = (
    Rule("num_calibration", "enough calibration images", 128, None, "critical", "Raise data.calibration."),
    Rule(
        "missing_classes", "no class without a calibration image", None, 0, "critical", "Add images of these classes."
    ),
    Rule("imbalance", "the largest class over the smallest", None, 10, "warning", "Balance the calibration images."),
    Rule("shared", "no image in two splits, by its pixels", None, 0, "critical", "Keep each image in one split."),
    Rule("alike", "no image that resembles one of another split", None, 0, "warning", "Keep series in one split."),
    Rule("offset", "normalised channel means near zero", None, 1.0, "critical", _RECIPE),
    Rule("low_spread", "normalised deviations not far below one", 0.4, None, "critical", _RECIPE),
    Rule("high_spread", "normalised deviations not far above one", None, 2.0, "critical", _RECIPE),
    Rule("drift", "properties as in the gate split", None, 1.0, "warning", "Draw both from the same images."),
)
_DRIFTING = ("brightness", "entropy", "sharpness", "mean_r", "mean_g", "mean_b", "std_r", "std_g", "std_b")


def check_images(frame: pd.DataFrame, rules: tuple[Rule, ...] = IMAGE_RULES) -> tuple[Finding, ...]:
    """Findings on each image of a manifest (see `tasks.data.manifest`), a rule each, in the order of `rules`.

    Images that do not decode are judged by the first rule alone.

    Raises:
        DataError: if the manifest is empty.
    """
    if not len(frame):
        raise DataError("The manifest lists no images.", remedy="Give the source some images.")
    facts = image_facts(frame)
    results = _validate(facts, rules)
    return tuple(_finding(facts, rule, result) for rule, result in zip(rules, results, strict=True))


def image_facts(frame: pd.DataFrame) -> pd.DataFrame:
    """The numbers that IMAGE_RULES judge; null where an image does not decode."""
    usable = frame["fault"].isna()
    good = frame[usable]
    sides = good[["width", "height"]]
    groups = pd.Series(groups_of(_looks(good), len(good)), good.index)
    measured = pd.DataFrame(
        {
            "correlation": good["correlation"],
            "contrast": good[["std_r", "std_g", "std_b"]].max(axis=1),
            "short_side": sides.min(axis=1),
            "aspect": sides.min(axis=1) / sides.max(axis=1),
            "ordinary": good["mode"].isin(_ORDINARY),
            "single": good["num_frames"] == 1,
            "upright": good["orientation"] == 1,
            "unique": ~good["pixels"].duplicated(),
            "distinct": ~groups.duplicated() | good["pixels"].duplicated(),  # copies are another rule's
            "brightness": good["brightness"],
            "entropy": good["entropy"],
            "sharpness": good["sharpness"],
        }
    ).astype(float)
    facts = measured.reindex(frame.index)
    facts.insert(0, "usable", usable.astype(float))
    facts.insert(0, "path", frame["path"])
    return facts


def check_splits(
    members: pd.DataFrame, preprocess: PreprocessSpec, rules: tuple[Rule, ...] = SPLIT_RULES
) -> tuple[Finding, ...]:
    """Findings on the splits as a whole, a rule each, in the order of `rules`.

    Args:
        members: a manifest's rows that decode, with a column `split`.
        preprocess: what the model's inputs are made with.

    Raises:
        DataError: if a split that is judged has no image.
    """
    for name in ("calibration", "gate"):
        if not (members["split"] == name).any():
            raise DataError(f"The {name} split has no image.", remedy="Raise its size, or give more images.")
    offenders = _shared(members)
    facts = pd.DataFrame([split_facts(members, preprocess, offenders)])
    results = _validate(facts, rules)
    return tuple(
        Finding(
            rule=rule,
            passed=bool(result["success"]),
            observed=f"{float(facts[rule.column].iloc[0]):.3g}",
            num_offenders=len(offenders.get(rule.column, ())),
            offenders=tuple(offenders.get(rule.column, ())[:SHOWN]),
        )
        for rule, result in zip(rules, results, strict=True)
    )


def split_facts(
    members: pd.DataFrame, preprocess: PreprocessSpec, offenders: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The numbers that SPLIT_RULES judge.

    `drift` is the worst property's PSI between calibration and gate, over 0.25 (which half a deviation of shift gives)
    or over what chance alone gives in one of a hundred sets, if that is more.
    """
    calibration, gate = (members[members["split"] == name] for name in ("calibration", "gate"))
    counts_K = calibration["label"].value_counts()
    channels = "rgb"[: len(preprocess.mean)]
    means_C = calibration[[f"mean_{channel}" for channel in channels]].mean().to_numpy() / 255
    # Of all pixels of all images: the spread within images, and between them.
    within_C = (calibration[[f"std_{channel}" for channel in channels]] ** 2).mean().to_numpy() / 255**2
    between_C = calibration[[f"mean_{channel}" for channel in channels]].var(ddof=0).to_numpy() / 255**2
    spread_C = np.sqrt(within_C + between_C) / np.array(preprocess.std)
    chance = psi_by_chance(len(gate), len(calibration), chance=0.01 / len(_DRIFTING))
    drift = max(psi(gate[name].to_numpy(), calibration[name].to_numpy()) for name in _DRIFTING)
    return {
        "num_calibration": len(calibration),
        "missing_classes": int((counts_K == 0).sum()),
        "imbalance": float(counts_K.max() / max(1, counts_K.min())),
        "shared": len(offenders["shared"]),
        "alike": len(offenders["alike"]),
        "offset": float(np.abs((means_C - preprocess.mean) / np.array(preprocess.std)).max()),
        "low_spread": float(spread_C.min()),
        "high_spread": float(spread_C.max()),
        "drift": drift / max(_MUCH_DRIFT, chance),
    }


def _shared(members: pd.DataFrame) -> dict[str, list[str]]:
    """Paths of images that another split has too, by pixels, and of those that only look like one of another split."""
    splits_of = members.groupby("pixels")["split"].transform("nunique")
    shared = members["path"][splits_of > 1]
    groups_N = groups_of(_looks(members), len(members))
    mixed = members["split"].groupby(groups_N).transform("nunique")
    alike = members["path"][(mixed > 1) & (splits_of == 1)]
    return {"shared": shared.tolist(), "alike": alike.tolist()}


def _looks(good: pd.DataFrame) -> np.ndarray:
    """Pairs of images that look alike, by position."""
    thumbnails_NB = np.frombuffer(b"".join(good["thumbnail"]), np.uint8).reshape(len(good), THUMBNAIL**2)
    return near_pairs(good["phash"].to_numpy(np.uint64), thumbnails_NB)


def _validate(facts: pd.DataFrame, rules: tuple[Rule, ...]) -> list[dict[str, Any]]:
    """Great Expectations' result of each rule."""
    import great_expectations as gx  # takes seconds to import
    from great_expectations import expectations as expect

    context = gx.get_context(mode="ephemeral")  # one for each call: no names clash
    context.variables.progress_bars = {"globally": False}
    batch = (
        context.data_sources.add_pandas("manifest")
        .add_dataframe_asset("rows")
        .add_batch_definition_whole_dataframe("all")
    )
    suite = gx.ExpectationSuite(
        name="contract",
        expectations=[
            expect.ExpectTableRowCountToBeBetween(min_value=len(facts), max_value=len(facts), severity="critical"),
            *(
                expect.ExpectColumnValuesToBeBetween(
                    column=rule.column,
                    min_value=rule.low,
                    max_value=rule.high,
                    mostly=rule.share,
                    severity=rule.severity,
                )
                for rule in rules
            ),
        ],
    )
    definition = gx.ValidationDefinition(name="contract", data=batch, suite=context.suites.add(suite))
    checkpoint = gx.Checkpoint(
        name="contract",
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={"result_format": "COMPLETE"},
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": facts})
    (validation,) = outcome.run_results.values()
    results = [result.to_json_dict() for result in validation.results]
    by_column = {result["expectation_config"]["kwargs"].get("column"): result for result in results}
    broken = [str(column) for column, result in by_column.items() if "element_count" not in result["result"]]
    broken.remove("None")  # the row count has no elements
    if broken or not by_column[None]["success"]:
        raise RuntimeError(f"Great Expectations could not judge {', '.join(broken) or 'the number of rows'}.")
    return [by_column[rule.column] for rule in rules]


def _finding(facts: pd.DataFrame, rule: Rule, result: dict[str, Any]) -> Finding:
    details = result["result"]
    rows = details.get("unexpected_index_list") or []
    share = 100.0 - (details.get("unexpected_percent") or 0.0)
    return Finding(
        rule=rule,
        passed=bool(result["success"]),
        observed=f"{share:.2f} % of {details['element_count']:,}",
        num_offenders=int(details["unexpected_count"]),
        offenders=tuple(facts["path"].loc[rows[:SHOWN]]),
    )
