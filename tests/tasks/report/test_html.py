from __future__ import annotations

import html
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from tasks.contracts.records import Decision
from tasks.contracts.spec import spec_from
from tasks.report.content import RunReport
from tasks.report.html import as_html, check_as_html

VOID = {"meta", "source", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def passed_page(report: RunReport) -> str:
    return as_html(report)


@pytest.fixture(scope="module")
def rejected_page(rejected: RunReport) -> str:
    return as_html(rejected)


def test_the_page_loads_nothing(passed_page: str, rejected_page: str) -> None:
    """Every picture is inside, and the browser is told to fetch nothing."""
    for text in (passed_page, rejected_page):
        page = Page(text)
        addresses = [
            value
            for _, attributes in page.elements
            for name, value in attributes.items()
            if name in {"src", "srcset", "href", "action", "data", "poster"}
        ]
        assert addresses
        assert all(address and address.startswith("data:image/svg+xml;base64,") for address in addresses)
        assert "url(" not in text
        assert "@import" not in text
        assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
        policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert policy.startswith("default-src 'none'")


def test_the_verdict_is_said_in_words(passed_page: str, rejected_page: str) -> None:
    """Colour alone would hide it from some."""
    assert "Passed all 9 gates" in Page(passed_page).text()
    text = Page(rejected_page).text()
    assert "Rejected by 4 of 9 gates" in text
    assert text.count("failed Top-1 drop") == 1
    assert text.count(" passed ") == 5


def test_a_long_story_is_complete(rejected: RunReport, rejected_page: str) -> None:
    """Numbers of every part are on the page."""
    text = Page(rejected_page).text()
    for part in (
        f"{rejected.comparison.top1_drop:.2f}",
        f"{rejected.latencies[2].speedup_quartiles[1]:.2f}",
        "This CPU shows no VNNI instructions.",
        "GlobalAveragePool",
        "classifier.3",
        "8 epochs",
        "calibration 512",
        "torchao 0.17.0",
        "intra_op_num_threads=1",
        rejected.hardware,
        rejected.engine.engine.sha256,
    ):
        assert part in text, part


def test_training_is_left_out_when_there_was_none(passed_page: str, rejected_page: str) -> None:
    """A calibrated model has no curve."""
    assert passed_page.count("<picture>") == 1
    assert rejected_page.count("<picture>") == 2


def test_a_gpus_numbers_are_shown_when_there_are_any(on_gpu: RunReport, passed_page: str) -> None:
    """Every timing is a row; the audit has a picture and its layers; without either there is no section."""
    text = as_html(on_gpu)
    page = Page(text)
    assert on_gpu.gpu
    assert on_gpu.engine.audit
    assert text.count("<picture>") == 2
    assert text.count('<tr class="group">') == len(on_gpu.gpu.timings) / 3
    timing = on_gpu.gpu.timings[0]
    for part in (
        f"{timing.latency.p99:.3f} {timing.latency.min:.3f} {timing.latency.max:.3f}",
        "FP16 is faster than INT8 at batch 1",
        "over FP16",
        "energy counter",
        "software power cap",
        "INT8 41.5 MiB",
        "Not found in the engine, or contradicted: classifier.3.",
        "Reformatting CopyNode for Input Tensor 0 to features.0.1 reformat float16 int8",
        "classifier.0 + <b>|relu",
    ):
        assert part in page.text(), part
    assert "<b>" not in text
    for words in ("On the GPU", "Which precision each layer runs in", "over FP16"):
        assert words not in passed_page


def test_names_from_outside_stay_text(hostile: RunReport) -> None:
    """A class may be called what it likes."""
    text = as_html(hostile)
    assert "<script>alert" not in text
    assert "<script>alert(1)</script>" in Page(text).text()


def test_the_spec_on_the_page_makes_the_same_run(rejected: RunReport, rejected_page: str) -> None:
    """Copied into a file it is the run's spec again."""
    block = re.search(r"<pre[^>]*>(.*?)</pre>", rejected_page, re.DOTALL)
    assert block
    assert spec_from(yaml.safe_load(html.unescape(block.group(1))), origin="page") == rejected.spec


def test_a_confusion_matrix_too_large_to_read_is_left_out(report: RunReport, passed_page: str) -> None:
    """Twenty classes fit, more do not."""
    names = tuple(f"class {index}" for index in range(21))
    matrix = tuple(tuple(int(row == column) for column in range(21)) for row in range(21))
    wide = {"confusion": matrix, "recall": (100.0,) * 21}
    many = report.model_copy(
        update={
            "data": report.data.model_copy(update={"class_names": names}),
            "float_accuracy": report.float_accuracy.model_copy(update=wide),
            "engine_accuracy": report.engine_accuracy.model_copy(update=wide),
        }
    )
    assert "Confusion of the engine" not in as_html(many)
    assert "Confusion of the engine" in passed_page


def test_no_gates_are_said_to_be_none(report: RunReport) -> None:
    """An empty table would look like a mistake."""
    assert "No gate is on" in as_html(report.model_copy(update={"decision": Decision(verdicts=(), passed=True)}))


def test_scoring_gates_and_report_do_without_torch_and_pyplot() -> None:
    """What judges and tells must not load what trains, nor what needs a screen."""
    modules = "tasks.report.html, tasks.report.markdown, tasks.scoring.latency, tasks.scoring.memory, tasks.gates.judge"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "prefect", "matplotlib.pyplot"}.isdisjoint(loaded)
    assert "matplotlib.figure" in loaded


def test_the_page_on_the_data_shows_offenders_and_loads_nothing(report: RunReport) -> None:
    """Pictures are inside; names from outside open no tag."""
    picture = "data:image/jpeg;base64,AAAA"
    text = check_as_html("pets", report.check, {"saw/<b>|0007.jpg": picture})
    page = Page(text)
    assert [attributes["src"] for tag, attributes in page.elements if tag == "img"] == [picture]
    assert {"script", "link", "iframe", "b"}.isdisjoint(tag for tag, _ in page.elements)
    for words in (
        "with 1 warning",
        "sharpness: is not blurred",
        "93.10 %",
        "Look at the focus.",
        "<b>|0007.jpg",
        "of 898",
    ):
        assert words in page.text()
