"""The run in one picture, and the training curve: matplotlib without a screen and without global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from math import isfinite, nan
from typing import Literal

import matplotlib as mpl
import matplotlib.dates as mdates
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from tasks.contracts.records import Accuracy, Latency, LayerError, LayerPrecision
from tasks.report.content import RunReport, noisiest_first, number
from tasks.report.gpu import PRECISIONS, baseline_text, memory_name
from tasks.report.history import Night

MIB = 2**20
NUM_NAMED = 3
BAR = 0.36
SMALL = 8.5
NARROWEST_PERCENT = 6  # share that a number fits into
ROOM_FOR_NUMBERS = 1.18  # above the tallest bar


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of Okabe and Ito, which people with any colour vision tell apart, on paper or on a dark page."""

    paper: str
    ink: str
    line: str
    of_float: str
    of_int8: str
    of_half: str
    alarm: str


LIGHT = Palette(paper="#ffffff", ink="#1f2933", line="#d9dee4", of_float="#8794a1", of_int8="#0072b2",
                of_half="#009e73", alarm="#d55e00")  # fmt: skip
DARK = Palette(paper="#171c22", ink="#dfe5ec", line="#36404b", of_float="#8c98a5", of_int8="#56b4e9",
               of_half="#00b383", alarm="#e69f00")  # fmt: skip


def summary_figure(report: RunReport, palette: Palette = LIGHT) -> Figure:
    """Accuracy, size, latency and the noise of every layer, float against INT8."""
    figure = _figure(palette, width=11, height=6.8)
    grid = figure.add_gridspec(2, 3, height_ratios=[1.15, 1])
    _draw_accuracy(figure.add_subplot(grid[0, 0]), report.float_accuracy, report.engine_accuracy, palette)
    _draw_size(figure.add_subplot(grid[0, 1]), report, palette)
    _draw_latency(figure.add_subplot(grid[0, 2]), report.latencies, palette)
    _draw_layers(figure.add_subplot(grid[1, :]), report.parity.layers, palette)
    _finish(figure, palette)
    return figure


def training_figure(report: RunReport, palette: Palette = LIGHT) -> Figure:
    """Loss and selection accuracy of every epoch of training."""
    figure = _figure(palette, width=11, height=3.2)
    epochs = [epoch.epoch for epoch in report.quantized.epochs]
    losses, scores = figure.subplots(1, 2)
    losses.plot(epochs, [epoch.loss for epoch in report.quantized.epochs], "o-", color=palette.of_int8)
    _title(losses, "Training loss", palette)
    scores.plot(epochs, [epoch.selection_top1 for epoch in report.quantized.epochs], "o-", color=palette.of_int8)
    _title(scores, "Top-1 on the selection images (%)", palette)
    for axes in (losses, scores):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, palette)
    return figure


def history_figure(nights: Sequence[Night], palette: Palette = LIGHT) -> Figure:
    """Accuracy, size and latency of every run over time. Crosses are rejected runs, dotted lines have no result."""
    figure = _figure(palette, width=11, height=7.2)
    accuracy, size, latency = figure.subplots(3, 1, sharex=True, height_ratios=[1.4, 1, 1])
    nights = [night for night in nights if night.started is not None]
    drawn = [night for night in nights if night.int8_top1 is not None]
    times = [_time(night) for night in drawn]
    accuracy.plot(times, [night.float_top1 for night in drawn], "-", color=palette.of_float, label="float")
    _draw_nights(accuracy, drawn, [night.int8_top1 or 0 for night in drawn], "INT8", palette)
    for night in drawn:
        if night.release is not None:
            accuracy.annotate(str(night.release), (_time(night), night.int8_top1 or 0), (0, -13),
                              textcoords="offset points", ha="center", fontsize=SMALL, color=palette.ink)  # fmt: skip
    _draw_nights(size, drawn, [(night.size_bytes or 0) / MIB for night in drawn], "INT8", palette)
    scores = [score for night in drawn for score in (night.float_top1 or 0, night.int8_top1 or 0)]
    if scores:
        margin = max(0.15 * (max(scores) - min(scores)), 0.3)  # one value alone would get 5 percent on both sides
        accuracy.set_ylim(min(scores) - 1.5 * margin, min(max(scores) + margin, 100.3))
    kinds = sorted({(night.runtime, night.batch_size or 0) for night in drawn})
    for (runtime, batch), style in zip(kinds, cycle(("-", "--", ":"))):
        some = [night for night in drawn if (night.runtime, night.batch_size or 0) == (runtime, batch)]
        timed = [night.latency_ms if night.latency_ms is not None else nan for night in some]
        _draw_nights(latency, some, timed, f"{runtime}, batch {batch}", palette, style)
    for axes, values in (
        (size, [night.size_bytes / MIB for night in drawn if night.size_bytes]),
        (latency, [night.latency_ms for night in drawn if night.latency_ms]),
    ):
        axes.set_ylim(0, ROOM_FOR_NUMBERS * max(values, default=1.0))
    for axes, title in (
        (accuracy, "Top-1 (%); numbers are releases, crosses were rejected"),
        (size, "Size of the engine (MiB)"),
        (latency, "Latency (ms), median"),
    ):
        _title(axes, title, palette)
        for night in nights:
            if night.int8_top1 is None:
                axes.axvline(_time(night), color=palette.alarm, linewidth=0.9, linestyle=":")
    for axes in (accuracy, latency) if drawn else ():
        axes.legend(frameon=False, labelcolor=palette.ink, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    _span_time(latency, nights)
    _finish(figure, palette)
    return figure


def audit_figure(report: RunReport, palette: Palette = LIGHT) -> Figure:
    """Multiply-accumulates by precision: as the graph asks for them, and as the engine runs them."""
    audit, asked = report.engine.audit, report.export.compression
    assert audit is not None
    figure = _figure(palette, width=11, height=2.4)
    axes = figure.add_subplot()
    wanted: dict[LayerPrecision, int] = {"int8": asked.int8_macs}
    bars = {"graph": wanted, "engine": audit.macs}
    colours = {
        "int8": palette.of_int8,
        "float16": palette.of_half,
        "float32": palette.of_float,
        "unknown": palette.alarm,
    }
    left = [0.0, 0.0]
    for kind, name in PRECISIONS.items():
        shares = [100 * macs.get(kind, 0) / max(asked.macs, 1) for macs in bars.values()]
        drawn = axes.barh(list(bars), shares, 0.6, left=left, color=colours[kind], label=name,
                          hatch="//" if kind == "unknown" else None, edgecolor=palette.paper, linewidth=0)  # fmt: skip
        texts = [f"{share:.1f} %" if share >= NARROWEST_PERCENT else "" for share in shares]
        axes.bar_label(drawn, texts, label_type="center", color=palette.paper, fontsize=SMALL, fontweight="bold")
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.legend(frameon=False, labelcolor=palette.ink, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    _title(axes, "Multiply-accumulates by precision (%)", palette)
    _finish(figure, palette)
    axes.grid(visible=False)
    return figure


def image_of(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """The same figure gives the same bytes. Letters in SVG are outlines, so that they look alike everywhere."""
    target = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "requant", "svg.fonttype": "path"}):
        figure.savefig(target, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return target.getvalue()


def _draw_accuracy(axes: Axes, before: Accuracy, after: Accuracy, palette: Palette) -> None:
    for accuracy, side, colour in ((before, -1, palette.of_float), (after, 1, palette.of_int8)):
        for place, score, (low, high) in (
            (0, accuracy.top1, accuracy.top1_interval),
            (1, accuracy.top5, accuracy.top5_interval),
        ):
            x = place + 0.12 * side
            axes.errorbar(x, score, [[score - low], [high - score]], fmt="o", color=colour, capsize=4, linewidth=1.8)
            axes.annotate(
                f"{score:.2f}",
                (x, score),
                (7 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                color=palette.ink,
                fontsize=SMALL,
            )
    axes.set_xticks([0, 1], ["top-1", "top-5"])
    axes.set_xlim(-0.6, 1.6)
    _title(axes, f"Accuracy (%) on {after.num_images:,} images", palette)


def _draw_size(axes: Axes, report: RunReport, palette: Palette) -> None:
    compression, memory = report.export.compression, report.memory
    pairs = [(compression.float_bytes / MIB, compression.int8_bytes / MIB), (memory.float_mib, memory.int8_mib)]
    _draw_pairs(axes, pairs, ["file", memory_name(report)], palette)
    axes.legend(frameon=False, labelcolor=palette.ink, loc="upper left")  # files are smaller than the memory they need
    _title(axes, "Size (MiB)", palette)


def _draw_latency(axes: Axes, latencies: tuple[Latency, ...], palette: Palette) -> None:
    pairs = [
        (latency.float_ms["median"] / latency.batch_size, latency.int8_ms["median"] / latency.batch_size)
        for latency in latencies
    ]
    names = [
        f"batch {latency.batch_size}\nspeedup {number(latency.speedup)}"
        + (f"\n{baseline_text(latency)}" if baseline_text(latency) else "")
        for latency in latencies
    ]
    _draw_pairs(axes, pairs, names, palette)
    _title(axes, "Latency per image (ms), median", palette)


def _draw_pairs(axes: Axes, pairs: list[tuple[float, float]], names: list[str], palette: Palette) -> None:
    """Bars of float and INT8 side by side, with their values above."""
    places = range(len(pairs))
    for side, colour, label in ((0, palette.of_float, "float"), (1, palette.of_int8, "INT8")):
        bars = axes.bar([place + (side - 0.5) * BAR for place in places], [pair[side] for pair in pairs], BAR * 0.94,
                        color=colour, label=label)  # fmt: skip
        axes.bar_label(bars, [f"{pair[side]:.3g}" for pair in pairs], padding=2, color=palette.ink, fontsize=SMALL)
    axes.set_xticks(places, names, fontsize=SMALL)
    axes.set_ylim(0, max(max(pair) for pair in pairs) * ROOM_FOR_NUMBERS)


def _draw_layers(axes: Axes, layers: tuple[LayerError, ...], palette: Palette) -> None:
    """In the graph's order; the noisiest are hatched and named. A layer without a finite ratio has no bar."""
    places = {layer.layer: place for place, layer in enumerate(layers, 1)}
    drawn = noisiest_first(tuple(layer for layer in layers if isfinite(layer.sqnr_db)))
    for some, colour, hatch in ((drawn[:NUM_NAMED], palette.alarm, "///"), (drawn[NUM_NAMED:], palette.of_int8, None)):
        axes.bar(
            [places[layer.layer] for layer in some],
            [layer.sqnr_db for layer in some],
            0.7,
            color=colour,
            hatch=hatch,
            edgecolor=palette.paper,
            linewidth=0,
        )
    names = [f"no. {places[layer.layer]}: {layer.layer} ({layer.sqnr_db:.1f} dB)" for layer in drawn[:NUM_NAMED]]
    axes.set_xlim(0.3, max(len(layers), 1) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    noisiest = "\nhatched, the noisiest:  " + "   ".join(names) if names else ""
    axes.set_xlabel(f"layer, in the order of the graph{noisiest}")
    _title(axes, "Signal over quantization noise (dB)", palette)


def _draw_nights(
    axes: Axes, nights: Sequence[Night], values: Sequence[float], label: str, palette: Palette, style: str = "-"
) -> None:
    times = [_time(night) for night in nights]
    axes.plot(times, values, style, marker="o", markersize=4, color=palette.of_int8, label=label)
    rejected = [(time, value) for time, value, night in zip(times, values, nights, strict=True) if not night.passed]
    if rejected:
        axes.plot(*zip(*rejected, strict=True), "X", markersize=9, color=palette.alarm)


def _time(night: Night) -> float:
    assert night.started is not None
    return float(mdates.date2num(night.started))  # type: ignore[no-untyped-call]


def _span_time(axes: Axes, nights: Sequence[Night]) -> None:
    """From the first to the last, with room at both ends: matplotlib gives a single run four years."""
    times = [_time(night) for night in nights]
    if times:
        margin = max(0.03 * (max(times) - min(times)), 0.02)
        axes.set_xlim(min(times) - margin, max(times) + margin)
    locator = mdates.AutoDateLocator()  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.set_xlabel("started, UTC")


def _title(axes: Axes, text: str, palette: Palette) -> None:
    axes.set_title(text, loc="left", color=palette.ink, fontsize=10.5, fontweight="bold")


def _figure(palette: Palette, *, width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), layout=layout, facecolor=palette.paper)
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, palette: Palette) -> None:
    """Quiet axes: a few horizontal lines, no box."""
    for axes in figure.axes:
        axes.set_facecolor(palette.paper)
        axes.tick_params(colors=palette.ink, length=0)
        axes.xaxis.label.set_color(palette.ink)
        axes.grid(axis="y", color=palette.line, linewidth=0.8)
        axes.set_axisbelow(True)
        for edge, spine in axes.spines.items():
            spine.set_visible(edge == "bottom")
            spine.set_color(palette.line)
