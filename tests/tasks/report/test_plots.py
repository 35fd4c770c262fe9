from __future__ import annotations

import io
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from tasks.contracts.records import LayerError
from tasks.report.content import RunReport
from tasks.report.plots import DARK, LIGHT, Palette, audit_figure, image_of, summary_figure, training_figure


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_picture_has_four_parts_that_name_their_units(report: RunReport) -> None:
    """Accuracy, size, latency and layers."""
    titles = [axes.get_title(loc="left") for axes in summary_figure(report).axes]
    assert titles == [
        "Accuracy (%) on 3,900 images",
        "Size (MiB)",
        "Latency per image (ms), median",
        "Signal over quantization noise (dB)",
    ]


def test_the_noisiest_layers_are_named(report: RunReport) -> None:
    """With their place in the graph, the worst first."""
    layers = summary_figure(report).axes[3]
    worst = sorted(report.parity.layers, key=lambda layer: layer.sqnr_db)[:3]
    text = layers.get_xlabel()
    assert [text.index(layer.layer) for layer in worst] == sorted(text.index(layer.layer) for layer in worst)
    assert sum(bool(bar.get_hatch()) for bar in layers.patches) == 3
    assert len(layers.patches) == len(report.parity.layers)


def test_svg_and_png_are_images_and_repeat_exactly(report: RunReport) -> None:
    """The same report gives the same bytes, as artifacts named by content need."""
    svg = image_of(summary_figure(report), "svg")
    assert svg == image_of(summary_figure(report), "svg")
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    png = image_of(summary_figure(report), "png")
    assert png == image_of(summary_figure(report), "png")
    assert Image.open(io.BytesIO(png)).size == (1650, 1020)


def test_training_is_drawn_per_epoch(rejected: RunReport) -> None:
    """Loss falls, accuracy rises."""
    losses, scores = training_figure(rejected).axes
    assert np.asarray(losses.lines[0].get_xdata()).tolist() == list(range(1, 9))
    assert np.asarray(scores.lines[0].get_ydata())[-1] == 90.75
    assert image_of(training_figure(rejected), "svg").startswith(b"<?xml")


@pytest.mark.parametrize("ratios", [[], [math.nan, math.inf], [-3.0, 0.0, math.nan, 12.0]], ids=str)
def test_layers_without_a_finite_ratio_do_not_spoil_the_picture(report: RunReport, ratios: list[float]) -> None:
    """Nothing to draw is drawn as nothing."""
    layers = tuple(LayerError(layer=f"l{i}", op_type="Conv", max_steps=0, sqnr_db=db) for i, db in enumerate(ratios))
    odd = report.model_copy(update={"parity": report.parity.model_copy(update={"layers": layers})})
    figure = summary_figure(odd)
    assert len(figure.axes[3].patches) == sum(math.isfinite(db) for db in ratios)
    assert image_of(figure, "png")


def test_precisions_are_stacked(on_gpu: RunReport) -> None:
    """What the graph asks for above what the engine runs; the engine's shares fill its bar."""
    (axes,) = audit_figure(on_gpu).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["graph", "engine"]
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    asked, runs = bars[::2], bars[1::2]
    compression = on_gpu.export.compression
    assert [bar.get_width() for bar in asked] == [100 * compression.int8_macs / compression.macs, 0, 0, 0]
    assert sum(bar.get_width() for bar in runs) == pytest.approx(100)
    assert all(bar.get_width() > 0 for bar in runs)
    assert [bar.get_x() for bar in runs[1:]] == pytest.approx([bar.get_x() + bar.get_width() for bar in runs[:-1]])
    assert image_of(audit_figure(on_gpu, DARK), "svg").startswith(b"<?xml")


def test_a_speedup_over_half_precision_says_so(on_gpu: RunReport) -> None:
    """Its bars are of the FP16 engine."""
    labels = [label.get_text() for label in summary_figure(on_gpu).axes[2].get_xticklabels()]
    assert labels[0] == "batch 1\nspeedup 0.97\nover FP16"


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read(palette: Palette) -> None:
    """WCAG: 7 to 1 for text, 3 to 1 for what must be told from the paper."""
    assert contrast(palette.ink, palette.paper) > 7
    for colour in (palette.of_float, palette.of_int8, palette.of_half, palette.alarm):
        assert contrast(colour, palette.paper) > 3
