"""A model's runs over time: what is read, what is shown, and what is drawn."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tasks.report.content import RunReport
from tasks.report.history import COLUMNS, NO_RECORD, Night, aligned, cells, night_from, nights_of
from tasks.report.html import history_as_html
from tasks.report.plots import DARK, history_figure, image_of
from tasks.stores.local import LocalStore

HOME = "models/birds"


def keep(store: LocalStore, run: str, report: RunReport) -> None:
    store.write_text(f"{HOME}/runs/{run}/data.html", "")
    started = datetime.strptime(run[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).isoformat()
    store.write_text(f"{HOME}/runs/{run}/record.json", report.model_copy(update={"started": started}).model_dump_json())


@pytest.fixture
def store(tmp_path: Path, report: RunReport, rejected: RunReport) -> LocalStore:
    """Three nights: released, rejected by gates, and ended before there was a record."""
    store = LocalStore(tmp_path)
    keep(store, "20261118T020000-aaaaaaaa", report.model_copy(update={"trigger": "nightly"}))
    keep(store, "20261119T020000-bbbbbbbb", rejected)
    store.write_text(f"{HOME}/runs/20261120T020000-cccccccc/data.html", "")
    store.write_text(f"{HOME}/releases/7", json.dumps({"run": "20261118T020000-aaaaaaaa"}))
    return store


def test_every_run_is_told_released_or_not(store: LocalStore, report: RunReport, rejected: RunReport) -> None:
    """In the order of time, with the numbers of its record."""
    one, two, three = nights_of(store, "birds", last=100)
    assert (one.trigger, one.outcome, one.release, one.passed) == ("nightly", "released", 7, True)
    assert one.int8_top1 == report.engine_accuracy.top1
    assert one.size_bytes == report.export.compression.int8_bytes
    assert one.latency_ms == report.latencies[0].int8_ms["median"]
    broken = [verdict.metric for verdict in rejected.decision.verdicts if not verdict.passed]
    assert (two.outcome, two.release, two.passed) == (f"rejected: {', '.join(broken)}", None, False)
    assert (three.outcome, three.started) == (NO_RECORD, datetime(2026, 11, 20, 2, tzinfo=UTC))


def test_only_the_last_runs_are_read(store: LocalStore) -> None:
    """A year of nights costs one listing and as many documents as are shown."""
    read: list[str] = []

    class Counting(LocalStore):
        def read_text(self, key: str) -> str | None:
            read.append(key)
            return super().read_text(key)

    assert [night.run[-8:] for night in nights_of(Counting(store._root), "birds", last=2)] == ["bbbbbbbb", "cccccccc"]
    assert sorted(read) == [f"{HOME}/releases/7", f"{HOME}/runs/20261119T020000-bbbbbbbb/record.json"]


def test_records_of_other_versions_are_read(report: RunReport) -> None:
    """What an old record lacks has a default, what a new one adds is left alone, and damage is said."""
    record = report.model_dump(mode="json")
    del record["trigger"]
    night = night_from(json.dumps({**record, "added_later": 1}), "20261118T020000-aaaaaaaa")
    assert (night.trigger, night.outcome) == ("by hand", "passed")
    assert night_from('{"run_id": 1}', "20261118T020000-aaaaaaaa").outcome == "unreadable record"


def test_the_table_stands_in_columns(store: LocalStore) -> None:
    """Numbers end where numbers end."""
    lines = [*aligned([COLUMNS, *map(cells, nights_of(store, "birds", last=100))])]
    assert lines[0].startswith("started, UTC      trigger")
    assert lines[3].startswith("2026-11-20 02:00")
    assert len({line.index(end) + len(end) for line, end in zip(lines[:2], ("MiB", "5.38"), strict=True)}) == 1


def test_three_plots_share_their_time(store: LocalStore) -> None:
    """Rejected runs are crosses, and one without a result is a line."""
    nights = nights_of(store, "birds", last=100)
    figure = history_figure(nights, DARK)
    accuracy, size, latency = figure.axes
    assert accuracy.get_title(loc="left").startswith("Top-1 (%)")
    assert accuracy.texts[0].get_text() == "7"
    for axes in (accuracy, size, latency):
        assert sum(line.get_marker() == "X" for line in axes.lines) == 1
        assert sum(line.get_linestyle() == ":" for line in axes.lines) == 1
        assert axes.get_xlim() == latency.get_xlim()
    assert image_of(figure, "svg").startswith(b"<?xml")


@pytest.mark.parametrize("kept", [0, 1])
def test_few_runs_are_drawn_too(store: LocalStore, kept: int) -> None:
    """Of one run without a result, or of one alone, there is a picture without years of nothing around it."""
    figure = history_figure([nights_of(store, "birds", last=100)[2 * (1 - kept)]])
    low, high = figure.axes[-1].get_xlim()
    assert high - low < 1
    assert image_of(figure, "png")


def test_the_page_shows_picture_and_table(store: LocalStore) -> None:
    """The newest first, names escaped, nothing loaded from elsewhere."""
    nights = nights_of(store, "birds", last=100)
    odd = Night(run="20261121T020000-dddddddd", outcome="<script>", started=datetime(2026, 11, 21, 2, tzinfo=UTC))
    page = history_as_html("birds", (*nights, odd))
    assert page.index("2026-11-21 02:00") < page.index("2026-11-18 02:00")
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "//" not in page.replace("http://www.w3.org", "")
