"""The contract that calibration data must keep, as Great Expectations suites over the manifest.

Two suites: one over the images (a row each), one over facts of the whole set (a single row). Both fail closed: an empty
manifest breaks the row count, and an expectation that raises is an error of ours, never a finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from tasks.contracts.errors import DataError
from tasks.contracts.records import SPLITS, Finding, Offender
from tasks.contracts.spec import ChecksSpec, Limit, PreprocessSpec
from tasks.data.drift import ks, ks_by_chance, psi, psi_by_chance, psi_of_counts
from tasks.data.measure import THUMBNAIL
from tasks.data.near import near_groups

SHOWN = 20  # offenders that a finding names; it counts the rest
PROPERTIES = ("brightness", "entropy", "sharpness", "mean_r", "mean_g", "mean_b", "std_r", "std_g", "std_b")

_ALWAYS = Limit(low=1, severity="critical")
_PLAIN = frozenset({"RGB", "L"})
_RECIPE = "Check data.preprocess.mean and std against what the model was trained with, and images for being in 0..255."
_SAME_DRAW = "Draw both from the same images, or give data.gate_source images like those that are calibrated on."
_PAST = "See what changed in the data since that run; if it is meant, calibrate anew and let the gates judge."


@dataclass(frozen=True)
class Rule:
    """What a number says when it keeps its limit, and what to do when not."""

    name: str
    says: str
    remedy: str
    is_claim: bool = False  # its number is 1 or 0

    def limit(self, checks: ChecksSpec) -> Limit:
        """What the spec asks; what no calibration can do without is not the spec's to choose."""
        limit: Limit = getattr(checks, self.name, _ALWAYS)
        return limit


IMAGE_RULES = (
    Rule("decodes", "decodes completely", "Mend or remove these files.", is_claim=True),
    Rule(
        "labelled",
        "has a class of the model",
        "Mend the labels, or name the model's classes in model.class_names.",
        is_claim=True,
    ),
    Rule("agrees", "has one label, also as a copy", "Keep each image in one class only.", is_claim=True),
    Rule(
        "correlation",
        "is no noise: neighbouring pixels resemble one another",
        "Calibrate on real images; ranges measured on noise fit nothing that the model will see.",
    ),
    Rule("contrast", "is not of one colour", "Remove images that show nothing."),
    Rule("short_side", "has enough pixels", "Remove thumbnails and icons."),
    Rule("aspect", "is not much longer than wide", "Crop these images."),
    Rule("plain_mode", "is stored as colour or grey", "Convert palette, CMYK and alpha.", is_claim=True),
    Rule("num_frames", "is a single picture", "Only the first frame is used: export stills."),
    Rule("upright", "is stored upright", "It is turned as EXIF says; does the model's input?", is_claim=True),
    Rule("unique", "has pixels of its own", "Remove copies; one of each is used.", is_claim=True),
    Rule("distinct", "looks like no other image", "Remove near copies, such as frames of one scene.", is_claim=True),
    Rule("brightness", "is neither black nor white", "Look at the exposure."),
    Rule("entropy", "holds some information", "Look for blank and drawn images."),
    Rule("sharpness", "is not blurred", "Look at the focus, and at how it was scaled."),
)
SPLIT_RULES = (
    Rule("num_calibration", "there are enough calibration images", "Raise data.calibration."),
    Rule(
        "missing_classes",
        "every class has an image in every split",
        "Add images of these classes, make the split larger, or allow it by data.checks.missing_classes.",
    ),
    Rule("imbalance", "no class has many times the calibration images of another", "Balance the images."),
    Rule("shared", "no image is in two splits, by its pixels", "Keep each image in one split."),
    Rule("alike", "no image looks like one of another split", "Keep series of images in one split."),
    Rule("offset", "normalised channel means are near zero", _RECIPE),
    Rule("spread", "normalised channel deviations are near one", _RECIPE),
    Rule("drift_psi", "calibration images are like the gate's", _SAME_DRAW),
    Rule("drift_ks", "calibration images are like the gate's, by their distributions", _SAME_DRAW),
)
PAST_RULES = (
    Rule("past_psi", "calibration images are like those of the last accepted run", _PAST),
    Rule("past_ks", "calibration images are like those of the last accepted run, by their distributions", _PAST),
)
MODEL_RULES = (
    Rule("feature_ks", "the float model sees calibration images as it sees the gate's", _SAME_DRAW),
    Rule("answer_psi", "the float model answers calibration images as it answers the gate's", _SAME_DRAW),
)
NUM_COMPONENTS = 8  # of features, in which drift is looked for


@dataclass(frozen=True)
class Fact:
    """A number about the whole set, what sampling alone may make of it, and who is behind it."""

    value: float
    by_chance: float = 0.0
    note: str = ""
    offenders: tuple[Offender, ...] = ()


def check_images(
    frame: pd.DataFrame, class_names: Sequence[str], checks: ChecksSpec, rules: tuple[Rule, ...] = IMAGE_RULES
) -> tuple[Finding, ...]:
    """Findings on each image of a manifest (see `tasks.data.manifest`), a rule each, in the order of `rules`.

    Images that do not decode are judged by the first rule alone. Rules that are off have no finding.

    Raises:
        DataError: if the manifest is empty.
    """
    if not len(frame):
        raise DataError("The manifest lists no images.", remedy="Give the source some images.")
    facts, partners = image_facts(frame, class_names, checks)
    limits = _limits(rules, checks)
    return tuple(
        _finding(rule, limit, result, facts, partners, frame)
        for (rule, limit), result in zip(limits, _validate(facts, limits), strict=True)
    )


def image_facts(
    frame: pd.DataFrame, class_names: Sequence[str], checks: ChecksSpec
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The numbers that IMAGE_RULES judge, null where an image does not decode; and the images that each one resembles.

    Returns:
        facts: a column per rule, with the rows of `frame`.
        partners: positions in `frame`, by row: the first image with the same pixels, the first that looks alike.
    """
    usable = frame["fault"].isna()
    good = frame[usable]
    position = pd.Series(np.arange(len(frame)), frame.index)[usable]
    copies = position.groupby(good["pixels"], sort=False).transform("first")
    looks = position.groupby(_looks(good, checks.distinct), sort=False).transform("first")
    first_label = frame["label"].to_numpy()[copies.to_numpy(int)]
    sides = good[["width", "height"]]
    is_copy = copies != position
    measured = pd.DataFrame(
        {
            "agrees": good["label"].to_numpy() == first_label,
            "correlation": good["correlation"],
            "contrast": good[["std_r", "std_g", "std_b"]].max(axis=1),
            "short_side": sides.min(axis=1),
            "aspect": sides.min(axis=1) / sides.max(axis=1),
            "plain_mode": good["mode"].isin(_PLAIN),
            "num_frames": good["num_frames"],
            "upright": good["orientation"] == 1,
            "unique": ~is_copy,
            "distinct": (looks == position) | is_copy,  # copies are another rule's
            "brightness": good["brightness"],
            "entropy": good["entropy"],
            "sharpness": good["sharpness"],
        }
    ).astype(float)
    facts = measured.reindex(frame.index)
    facts.insert(0, "labelled", frame["label"].isin(class_names).astype(float))
    facts.insert(0, "decodes", usable.astype(float))
    return facts, pd.DataFrame({"unique": copies, "agrees": copies, "distinct": looks})


def check_splits(
    members: pd.DataFrame, preprocess: PreprocessSpec, checks: ChecksSpec, past: pd.DataFrame | None = None
) -> tuple[Finding, ...]:
    """Findings on the splits as a whole, a rule each; those about the past only if there is one.

    Args:
        members: a manifest's rows that decode, with a column `split`; the categories of `label` are the model's.
        preprocess: what the model's inputs are made with.
        past: calibration images that were accepted before: at least the columns PROPERTIES.

    Raises:
        DataError: if a split that is judged has no image.
    """
    for name in ("calibration", "gate"):
        if not (members["split"] == name).any():
            raise DataError(f"The {name} split has no image.", remedy="Raise its size, or give more images.")
    calibration, gate = (members[members["split"] == name] for name in ("calibration", "gate"))
    psi_fact, ks_fact = property_drift(gate, calibration)
    facts = {
        "num_calibration": Fact(len(calibration)),
        **_class_facts(members),
        **_leaks(members, checks),
        **_normalised(calibration, preprocess),
        "drift_psi": psi_fact,
        "drift_ks": ks_fact,
    }
    if past is not None:
        facts["past_psi"], facts["past_ks"] = property_drift(past, calibration)
    return judge_facts(facts, SPLIT_RULES if past is None else SPLIT_RULES + PAST_RULES, checks)


def check_model_view(
    gate: tuple[np.ndarray, np.ndarray],
    calibration: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    checks: ChecksSpec,
) -> tuple[Finding, ...]:
    """Findings on what the float model makes of both: its features (float32 [N, D]) and answers (int64 [N]).

    Features are compared along the principal components of the gate's.
    """
    (gate_ND, gate_answers_N), (calibration_ND, calibration_answers_N) = gate, calibration
    center_D = gate_ND.mean(0)
    _, _, directions_CD = np.linalg.svd(gate_ND - center_D, full_matrices=False)
    components = {
        f"component {number}": ((gate_ND - center_D) @ direction_D, (calibration_ND - center_D) @ direction_D)
        for number, direction_D in enumerate(directions_CD[:NUM_COMPONENTS], start=1)
    }
    counts = [np.bincount(answers_N, minlength=num_classes) for answers_N in (gate_answers_N, calibration_answers_N)]
    facts = {
        "feature_ks": drift_facts(components)[1],
        "answer_psi": Fact(
            psi_of_counts(*counts), psi_by_chance(len(gate_ND), len(calibration_ND), num_bins=num_classes)
        ),
    }
    return judge_facts(facts, MODEL_RULES, checks)


def judge_facts(facts: Mapping[str, Fact], rules: tuple[Rule, ...], checks: ChecksSpec) -> tuple[Finding, ...]:
    """Findings on numbers about the whole set. A limit never asks for less than sampling alone explains."""
    limits = [
        (rule, limit.model_copy(update={"high": max(limit.high, facts[rule.name].by_chance)}))
        if limit.high is not None
        else (rule, limit)
        for rule, limit in _limits(rules, checks)
    ]
    table = pd.DataFrame([{rule.name: float(facts[rule.name].value) for rule, _ in limits}])
    return tuple(
        Finding(
            rule=rule.name,
            says=rule.says,
            severity="critical" if limit.severity == "critical" else "warning",
            passed=bool(result["success"] and np.isfinite(fact.value)),  # Great Expectations passes over NaN
            observed=f"{fact.value:.3g}" + (f" ({fact.note})" if fact.note else ""),
            limit=limit_text(rule, limit),
            num_offenders=len(fact.offenders),
            offenders=fact.offenders[:SHOWN],
            remedy=rule.remedy,
        )
        for (rule, limit), result in zip(limits, _validate(table, limits), strict=True)
        for fact in (facts[rule.name],)
    )


def property_drift(reference: pd.DataFrame, sample: pd.DataFrame) -> tuple[Fact, Fact]:
    """The property that drifted most, by PSI and by Kolmogorov and Smirnov, each with what chance gives once in 100."""
    columns = {name: (reference[name].to_numpy(), sample[name].to_numpy()) for name in PROPERTIES}
    return drift_facts(columns)


def drift_facts(columns: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[Fact, Fact]:
    """PSI and KS of the column that drifted most; each column is a reference and a sample."""
    by_psi = {name: psi(reference, sample) for name, (reference, sample) in columns.items()}
    by_ks = {name: ks(reference, sample) for name, (reference, sample) in columns.items()}
    reference, sample = next(iter(columns.values()))
    chance = 0.01 / len(columns)  # of any of them
    worst_psi, worst_ks = (max(found, key=lambda name: found[name]) for found in (by_psi, by_ks))
    return (
        Fact(by_psi[worst_psi], psi_by_chance(len(reference), len(sample), chance=chance), worst_psi),
        Fact(by_ks[worst_ks], ks_by_chance(len(reference), len(sample), chance=chance), worst_ks),
    )


def _class_facts(members: pd.DataFrame) -> dict[str, Fact]:
    """Classes that a split lacks, and the balance of calibration."""
    class_names = members["label"].cat.categories
    counts = {
        split: np.bincount(part["label"].cat.codes, minlength=len(class_names))
        for split, part in members.groupby("split", sort=False)
    }
    empty = [(str(split), str(name)) for split in SPLITS if split in counts for name in class_names[counts[split] == 0]]
    calibration_K = counts["calibration"]
    return {
        "missing_classes": Fact(
            len({name for _, name in empty}),
            offenders=tuple(Offender(path=f"{split}: {name}", found="no image") for split, name in empty),
        ),
        "imbalance": Fact(float(calibration_K.max() / max(1, calibration_K.min()))),
    }


def _leaks(members: pd.DataFrame, checks: ChecksSpec) -> dict[str, Fact]:
    """Images that another split has too, by pixels, and those that only look like one of another split."""
    members = members.reset_index(drop=True)
    pixels, looks = members["pixels"], pd.Series(_looks(members, checks.alike))
    splits_of = members.groupby(pixels)["split"].transform("nunique")
    mixed = members["split"].groupby(looks).transform("nunique")
    return {
        "shared": _leak(members, pixels, splits_of > 1),
        "alike": _leak(members, looks, (mixed > 1) & (splits_of == 1)),
    }


def _leak(members: pd.DataFrame, groups: pd.Series, is_leak: pd.Series) -> Fact:
    """Named with another image of the same group."""
    leaks = members[is_leak]
    by_group = members[groups.isin(groups[is_leak])].groupby(groups, sort=False)
    others = {group: list(zip(part["path"], part["split"], strict=True)) for group, part in by_group}

    def partner(split: str, group: Any) -> str:
        return next(f"in {split}, and as {name} in {other}" for name, other in others[group] if other != split)

    named = (
        Offender(path=path, found=partner(split, groups[row]))
        for row, path, split in zip(leaks.index, leaks["path"], leaks["split"], strict=True)
    )
    return Fact(len(leaks), offenders=tuple(named))


def _normalised(calibration: pd.DataFrame, preprocess: PreprocessSpec) -> dict[str, Fact]:
    """Channel statistics of the model's input: of all pixels of all images."""
    if len(preprocess.mean) == 1:  # the model is given luma
        means, deviations = calibration[["brightness"]], calibration[["std_luma"]] / 255
    else:
        means, deviations = (calibration[[f"{name}_{channel}" for channel in "rgb"]] / 255 for name in ("mean", "std"))
    within_C = (deviations**2).mean().to_numpy()
    offset_C = (means.mean().to_numpy() - preprocess.mean) / np.array(preprocess.std)
    spread_C = np.sqrt(within_C + means.var(ddof=0).to_numpy()) / np.array(preprocess.std)
    farthest = int(np.abs(np.log(np.maximum(spread_C, 1e-9))).argmax())
    return {"offset": Fact(float(np.abs(offset_C).max())), "spread": Fact(float(spread_C[farthest]))}


def _looks(good: pd.DataFrame, limit: Limit) -> np.ndarray:
    """A number for each image that its look-alikes share; where the limit is off, nobody asks, and none has any."""
    if limit.severity == "off":
        return np.arange(len(good))
    thumbnails_NB = np.frombuffer(b"".join(good["thumbnail"]), np.uint8).reshape(len(good), THUMBNAIL**2)
    return near_groups(good["phash"].to_numpy(np.uint64), thumbnails_NB)


def _limits(rules: tuple[Rule, ...], checks: ChecksSpec) -> list[tuple[Rule, Limit]]:
    limits = ((rule, rule.limit(checks)) for rule in rules)
    return [(rule, limit) for rule, limit in limits if limit.severity != "off"]


def _validate(facts: pd.DataFrame, limits: list[tuple[Rule, Limit]]) -> list[dict[str, Any]]:
    """Great Expectations' result of each rule."""
    import great_expectations as gx  # takes seconds to import
    from great_expectations import expectations as expect
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

    # One for each call, so that no names clash; by default each would leave a folder behind.
    nothing_on_disk = DataContextConfig(store_backend_defaults=InMemoryStoreBackendDefaults())
    context = gx.get_context(mode="ephemeral", project_config=nothing_on_disk)
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
                    column=rule.name,
                    min_value=limit.low,
                    max_value=limit.high,
                    mostly=limit.share,
                    severity=limit.severity,
                )
                for rule, limit in limits
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
    return [by_column[rule.name] for rule, _ in limits]


def _finding(
    rule: Rule,
    limit: Limit,
    result: dict[str, Any],
    facts: pd.DataFrame,
    partners: pd.DataFrame,
    frame: pd.DataFrame,
) -> Finding:
    details = result["result"]
    rows = details.get("unexpected_index_list") or []
    judged = details["element_count"] - (details.get("missing_count") or 0)
    share = f"{100.0 - (details.get('unexpected_percent') or 0.0):.2f} %"
    if share == "100.00 %" and details["unexpected_count"]:  # rounded away
        share = f"all but {details['unexpected_count']}"
    return Finding(
        rule=rule.name,
        says=rule.says,
        severity="critical" if limit.severity == "critical" else "warning",
        passed=bool(result["success"]),
        observed=f"{share} of {judged:,} images",
        limit=limit_text(rule, limit),
        num_offenders=int(details["unexpected_count"]),
        offenders=tuple(_offender(rule.name, row, facts, partners, frame) for row in rows[:SHOWN]),
        remedy=rule.remedy,
    )


def _offender(rule: str, row: Any, facts: pd.DataFrame, partners: pd.DataFrame, frame: pd.DataFrame) -> Offender:
    image = frame.loc[row]
    found = {
        "decodes": "fault",
        "labelled": "label",
        "plain_mode": "mode",
        "num_frames": "num_frames",
        "upright": "orientation",
    }
    if rule in found:
        text = str(image[found[rule]])
    elif rule in partners:
        other = frame.iloc[int(partners.loc[row, rule])]
        text = f"like {other['path']}"
        if rule == "agrees":
            text = f"{image['label']}; {other['path']} is {other['label']}"
    else:
        text = f"{facts.loc[row, rule]:.3g}"
    return Offender(path=image["path"], found=text)


def limit_text(rule: Rule, limit: Limit) -> str:
    """The limit as people say it."""
    sides = chain(
        () if limit.low is None else (f"at least {limit.low:.3g}",),
        () if limit.high is None else (f"at most {limit.high:.3g}",),
    )
    if rule not in IMAGE_RULES:
        return " and ".join(sides)
    images = "all images" if limit.share == 1 else f"{100 * limit.share:g} % of images"
    return f"true of {images}" if rule.is_claim else f"{' and '.join(sides)} in {images}"
