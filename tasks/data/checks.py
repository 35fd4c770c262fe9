"""The contract that calibration data must keep, as Great Expectations suites over the manifest.

Two suites: one over the images (a row each), one over facts of the whole set (a single row). Both fail closed: an empty
manifest breaks the row count, and an expectation that raises is an error of ours, never a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from tasks.contracts.errors import DataError
from tasks.data.measure import THUMBNAIL
from tasks.data.near import groups_of, near_pairs

Severity = Literal["critical", "warning"]

SHOWN = 20  # offending files that a finding names; it counts the rest
_ORDINARY = frozenset({"RGB", "L"})


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
    pairs_P2 = near_pairs(
        good["phash"].to_numpy(np.uint64),
        np.frombuffer(b"".join(good["thumbnail"]), np.uint8).reshape(len(good), THUMBNAIL**2),
    )
    groups = pd.Series(groups_of(pairs_P2, len(good)), good.index)
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
