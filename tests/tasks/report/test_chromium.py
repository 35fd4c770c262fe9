"""The pages as a reader meets them: in a real browser, on a desk and on a phone, by day and by night."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.report.content import RunReport
from tasks.report.history import night_from
from tasks.report.html import as_html, history_as_html
from tests.chromium import Chromium, chromium, why_no_chromium

pytestmark = pytest.mark.skipif(why_no_chromium() is not None, reason=str(why_no_chromium()))

LEAST_CONTRAST = 4.5  # WCAG 2 AA, for text
FAINT = """
(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.startsWith('rgb')) return null;  // a mixed one
      const found = channels(colour);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    const paper = own && element.checkVisibility() ? behind(element) : null;
    if (!paper) continue;
    const [low, high] = [luminance(channels(getComputedStyle(element).color)), luminance(paper)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < LEAST) faint.push(`${element.tagName} ${element.textContent.trim().slice(0, 40)}: ${contrast}`);
  }
  return faint;
})()
""".replace("LEAST", str(LEAST_CONTRAST))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory, report: RunReport, rejected: RunReport, on_gpu: RunReport
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    nights = [
        night_from(shown.model_dump_json(), f"2026111{day}T020000-aaaaaaaa", day)
        for day, shown in enumerate((report, rejected))
    ]
    texts = {
        "rejected": as_html(rejected),
        "on a gpu": as_html(on_gpu),
        "history": history_as_html("birds", [*nights, night_from(None, "20261112T020000-bbbbbbbb")]),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["rejected", "on a gpu", "history"])
def test_a_page_can_be_read(browser: Chromium, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    """It asks for nothing but itself, complains of nothing, is as wide as its window, and has no faint text."""
    browser.open(pages[name], width=width, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert [url for url in browser.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.evaluate(FAINT) == []


def test_the_check_itself_can_fail(browser: Chromium, tmp_path: Path) -> None:
    """A page that does all of it wrong is caught in each point."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><p style="width: 900px; color: #ccc">faint</p>'
        '<img src="missing.png"><script>console.error("no")</script>'
    )
    browser.open(page, width=390, scheme="light")
    assert any(url.endswith("missing.png") for url in browser.requests)
    assert any("no" in text for text in browser.complaints)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert len(browser.evaluate(FAINT)) == 1
