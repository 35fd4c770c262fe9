from __future__ import annotations

import math

import pytest

from tasks.contracts.records import Decision, LayerError, Verdict
from tasks.report.content import (
    RunReport,
    broken_first,
    calibration_text,
    cautions,
    champion_text,
    check_headline,
    class_changes,
    costs_by_op,
    duration,
    headline,
    limit_of,
    noisiest_first,
    number,
    title_of,
    with_unit,
)


def verdict(gate: str = "max_top1_drop", *, passed: bool = True) -> Verdict:
    return Verdict(gate=gate, metric=gate[4:], unit="points", limit=0.125, measured=0.1, passed=passed)


def test_a_report_survives_its_json_form(rejected: RunReport) -> None:
    """What is stored is what was known."""
    assert RunReport.model_validate_json(rejected.model_dump_json()) == rejected


def test_the_headline_counts() -> None:
    """Passed, rejected, or never judged."""
    assert headline(Decision(verdicts=(verdict(), verdict()), passed=True)) == "Passed all 2 gates"
    assert headline(Decision(verdicts=(verdict(), verdict(passed=False)), passed=False)) == "Rejected by 1 of 2 gates"
    assert headline(Decision(verdicts=(), passed=True)) == "Passed: no gate is on"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234.5, 2, "1,234.50"),
        (-0.5, 1, "\N{MINUS SIGN}0.5"),
        (-0.001, 2, "0.00"),
        (None, 2, "not measured"),
        (math.nan, 2, "not a number"),
        (math.inf, 2, "infinite"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, digits: int, text: str) -> None:
    """Also those that are none."""
    assert number(value, digits) == text


def test_units_limits_and_titles() -> None:
    """A limit keeps its digits; a factor has its sign."""
    assert with_unit(3.9, "x") == "3.900\N{MULTIPLICATION SIGN}"
    assert with_unit(None, "ms") == "not measured"
    assert with_unit(math.nan, "ms") == "not a number"
    assert limit_of(verdict()) == "at most 0.125 points"
    assert title_of(verdict()) == "Top-1 drop"
    assert title_of(verdict("min_int8_macs")) == "INT8 multiply-accumulates"


def test_a_drop_whose_interval_crosses_its_limit_is_doubted(report: RunReport) -> None:
    """Between proof and failure lies a caution; the run's own notes stay."""
    change = report.comparison.model_copy(update={"top1_drop": 0.8, "top1_drop_interval": (0.2, 1.4)})
    doubtful = report.model_copy(update={"comparison": change, "notes": ("Noted.",)})
    assert cautions(doubtful)[:2] == ("Noted.", *cautions(report))
    assert "interval reaches 1.40: 3,900 gate images are too few" in cautions(doubtful)[-1]
    clear = change.model_copy(update={"top1_drop_interval": (0.6, 1.0)})
    assert cautions(report.model_copy(update={"comparison": clear})) == cautions(report)
    failed = change.model_copy(update={"top1_drop": 1.2})
    assert cautions(report.model_copy(update={"comparison": failed})) == cautions(report)


def test_what_the_data_are_warned_of_is_a_caution(report: RunReport) -> None:
    """With what was found and what to do."""
    assert cautions(report) == (
        "Data: sharpness is 93.10 % of 13,017, not at least 12 in 95 % of images. Look at the focus.",
    )


def test_the_choice_of_calibration_images_is_told(report: RunReport, rejected: RunReport) -> None:
    """By draw or by coverage, and what other draws came to if that was asked."""
    assert calibration_text(report).startswith("512 images, a stratified draw. What other draws")
    text = calibration_text(rejected)
    assert "cover the float model's features of 7,312" in text
    assert "91.10 % of 1,500 selection images; on 3 other draws it is 90.90 to 91.30 % (mean 91.07 %)" in text


def test_the_champion_stands_beside_the_challenger(report: RunReport, rejected: RunReport) -> None:
    """On the same images, with the interval; nothing is said where there is none."""
    assert champion_text(report) == ""
    assert rejected.champion is not None
    lost = f"this engine loses {number(rejected.champion.comparison.top1_drop)} points to it"
    assert champion_text(rejected).startswith("Release 3, the champion, has a top-1 of ")
    assert lost in champion_text(rejected)


def test_findings_are_told_by_their_weight(report: RunReport) -> None:
    """The headline counts them, and what fails the run comes first."""
    (warning,) = report.check.findings
    kept = warning.model_copy(update={"passed": True, "rule": "kept"})
    critical = warning.model_copy(update={"severity": "critical", "rule": "worse"})
    assert check_headline([kept]) == "The data keep all 1 rules"
    assert check_headline([kept, warning]) == "The data keep all critical rules, with 1 warning"
    assert (
        check_headline([warning, critical, warning]) == "Rejected: the data break 1 of 3 rules, with 2 warnings besides"
    )
    assert [finding.rule for finding in broken_first([kept, warning, critical])] == ["worse", "sharpness", "kept"]


@pytest.mark.parametrize(
    ("finished", "text"),
    [
        ("2026-03-02T01:00:09+00:00", "5 s"),
        ("2026-03-02T01:14:51+00:00", "14 min 47 s"),
        ("2026-03-02T04:00:04+01:00", "2 h 0 min"),
    ],
)
def test_a_duration_is_read_at_a_glance(report: RunReport, finished: str, text: str) -> None:
    """Seconds, minutes or hours; zones are respected."""
    assert duration(report.model_copy(update={"finished": finished})) == text


def test_costs_by_op_add_up(report: RunReport) -> None:
    """Every layer is in one group, the most costly group first."""
    compression = report.export.compression
    costs = costs_by_op(compression)
    assert [(cost.op_type, cost.num_layers, cost.num_int8) for cost in costs] == [
        ("Conv", 48, 47),
        ("Gemm", 2, 2),
        ("GlobalAveragePool", 1, 1),
    ]
    assert sum(cost.macs for cost in costs) == compression.macs
    assert sum(cost.int8_macs for cost in costs) == compression.int8_macs
    assert sum(cost.parameters for cost in costs) == compression.parameters


def test_noise_that_is_no_number_comes_first() -> None:
    """A layer without noise comes last."""
    ratios = {"a": 20.0, "b": math.inf, "c": math.nan, "d": -3.0}
    layers = tuple(LayerError(layer=name, op_type="Conv", max_steps=0, sqnr_db=db) for name, db in ratios.items())
    assert [layer.layer for layer in noisiest_first(layers)] == ["c", "d", "a", "b"]


def test_classes_are_listed_by_what_they_lose(report: RunReport) -> None:
    """With their images, where those are known; a class without any is left out."""
    changes = class_changes(report)
    assert [change.drop for change in changes] == sorted((change.drop for change in changes), reverse=True)
    assert sum(change.num_images or 0 for change in changes) == 3900
    assert changes[0].name == report.comparison.worst_class
    blind = report.float_accuracy.model_copy(
        update={"confusion": None, "recall": (None, *report.float_accuracy.recall[1:])}
    )
    changes = class_changes(report.model_copy(update={"float_accuracy": blind}))
    assert len(changes) == 9
    assert {change.num_images for change in changes} == {None}
