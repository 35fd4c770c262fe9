from __future__ import annotations

import math

import numpy as np

from tasks.contracts.records import LayerError
from tasks.contracts.spec import GatesSpec
from tasks.gates.judge import judge
from tasks.report.content import RunReport
from tasks.report.markdown import as_markdown, check_as_markdown, gate_rows


def test_the_verdict_comes_first_and_the_gates_follow(rejected: RunReport) -> None:
    """A reader of one line knows the result."""
    lines = as_markdown(rejected).splitlines()
    assert lines[0] == "# ✗ mobilenet-v3-large: Rejected by 4 of 9 gates"
    assert lines[2] == "> **Note:** This CPU shows no VNNI instructions."
    assert sum("**failed**" in line for line in lines) == 4
    assert sum("✓ passed" in line for line in lines) == 5


def test_what_a_decision_rests_on_is_there(report: RunReport) -> None:
    """Sample size, intervals, worst layers and classes, splits and versions."""
    text = as_markdown(report)
    assert "3,900 gate images" in text
    low, high = report.comparison.top1_drop_interval
    assert f"({low:.2f} to {high:.2f})" in text
    worst = min(report.parity.layers, key=lambda layer: layer.sqnr_db)
    assert f"| {worst.layer} | {worst.op_type} | {worst.sqnr_db:.1f} |" in text
    assert "calibration 512" in text
    assert "torchao 0.17.0" in text
    assert report.engine.engine.sha256 in text
    assert "Training" not in text


def test_training_is_told_when_there_was_any(rejected: RunReport) -> None:
    """One row per epoch."""
    assert "| 8 | 0.1750 | 90.75 | 1.25e-05 |" in as_markdown(rejected)


def test_a_gpus_numbers_are_told_when_there_are_any(on_gpu: RunReport, report: RunReport) -> None:
    """Timings, energy, what the GPU was doing, and the layers that are not INT8; long names are cut."""
    text = as_markdown(on_gpu)
    lines = text.splitlines()
    assert "> **Note:** FP16 is faster than INT8 at batch 1: 0.34 ms against 0.349 ms." in text
    assert "measured with transfers, no graph. Speedup is over the faster of the float engines" in text
    assert sum(line.startswith("| 8 | without transfers, as a CUDA graph | ") for line in lines) == 3
    assert "| 1 | FP16 | 59.00 | 118.00 |" in lines
    assert "- The GPU's clocks were held down after measuring: software power cap." in lines
    assert "| features.0.0 | compute | FP16 | float16 | float16 | 11.00 |" in lines
    assert "97.8 % INT8, 2.1 % FP16, 0.1 % FP32, 0.0 % unknown; the graph asks for 97.9 % INT8" in text
    assert max(len(line) for line in lines if line.startswith("| __myl")) < 180
    for words in ("On the GPU", "Which precision", "over FP16"):
        assert words not in as_markdown(report)


def test_every_table_has_one_width(hostile: RunReport, rejected: RunReport, on_gpu: RunReport) -> None:
    """Names with bars, tags or line breaks do not break a row."""
    for text in (as_markdown(hostile), as_markdown(rejected), as_markdown(on_gpu)):
        table: set[int] = set()
        for line in text.splitlines():
            if line.startswith("|"):
                table.add(line.replace("\\|", "").count("|"))
                assert len(table) == 1, line
            else:
                table = set()
    assert "<script>" not in as_markdown(hostile)
    assert "line break" in as_markdown(hostile)


def test_a_report_on_a_huge_model_stays_small(report: RunReport) -> None:
    """A thousand layers and a thousand classes: tables are cut to the worst."""
    layers = tuple(LayerError(layer=f"block.{i}" * 9, op_type="Conv", max_steps=1, sqnr_db=i) for i in range(1000))
    recall = tuple(float(value) for value in np.linspace(0, 100, 1000))
    huge = report.model_copy(
        update={
            "parity": report.parity.model_copy(update={"layers": layers}),
            "data": report.data.model_copy(update={"class_names": tuple(f"class {i}" for i in range(1000))}),
            "float_accuracy": report.float_accuracy.model_copy(update={"recall": recall, "confusion": None}),
            "engine_accuracy": report.engine_accuracy.model_copy(update={"recall": recall, "confusion": None}),
        }
    )
    assert len(as_markdown(huge).encode()) < 100_000


def test_gate_rows_are_words_with_what_failed_first() -> None:
    """As Prefect's UI shows them: numbers rounded, with unit and limit; every row has the same columns."""
    measured = {"top1_drop": float("nan"), "agreement": np.float64(97.54321), "speedup": math.inf, "parity": None}
    rows = gate_rows(judge(measured, GatesSpec()))
    assert {tuple(row) for row in rows} == {("verdict", "gate", "measured", "limit")}
    assert all(type(value) is str for row in rows for value in row.values())
    by_gate = {row["gate"]: row for row in rows}
    assert by_gate["Agreement"] == {
        "verdict": "✓ passed", "gate": "Agreement", "measured": "97.54 %", "limit": "at least 95 %",
    }  # fmt: skip
    assert by_gate["Top-1 drop"]["measured"] == "not a number"
    assert by_gate["Parity"]["measured"] == "not measured"
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == sorted(verdicts, reverse=True)
    assert verdicts[0] == "✗ failed"


def test_findings_on_the_data_come_with_their_offenders(report: RunReport) -> None:
    """What is broken first; pictures where there are some, names escaped, and how many are not named."""
    kept = report.check.findings[0].model_copy(update={"rule": "kept", "passed": True, "offenders": ()})
    check = report.check.model_copy(update={"findings": (kept, *report.check.findings)})
    text = check_as_markdown("pets", check, {"saw/<b>|0007.jpg": "data:image/jpeg;base64,AAAA"})
    lines = text.splitlines()
    assert lines[0] == "# ✓ pets: The data keep all critical rules, with 1 warning"
    assert "compared with the data of run 20260301T010004-0b54f1d8" in text
    rows = [line for line in lines if line.startswith(("| ! warning", "| ✓"))]
    assert [row.split(" | ")[1].partition(":")[0] for row in rows] == ["sharpness", "kept"]
    assert "| ![](data:image/jpeg;base64,AAAA) | saw/&lt;b>\\|0007.jpg | 3.2 |" in lines
    assert lines[-1] == "And 897 more."
