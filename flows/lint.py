"""`requant lint`: the rules of a target over any ONNX file, without Prefect."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tasks.contracts.errors import DataError
from tasks.contracts.spec import SchemeName
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.index import read_onnx
from tasks.graph.lint import SHOWN, Finding, lint
from tasks.graph.rules import Severity
from tasks.graph.trial import Feed, trial

WORDS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}


def lint_file(path: Path, target: SchemeName, data: Path | None = None) -> tuple[Finding, ...]:
    """All findings. A graph without errors is also run on the CPU, on the images in `data` or on noise.

    Args:
        data: a .npy file of preprocessed images, float32 [N, C, H, W].

    Raises:
        RequantError: if a file cannot be read, or the images do not fit the graph.
    """
    model = read_onnx(path)
    images_NCHW = None if data is None else _images(data)
    findings = lint(model, target)
    if any(finding.severity == "error" for finding in findings):
        return findings
    with TemporaryDirectory() as work:
        return findings + trial(model, _run, Path(work), images_NCHW)


def lines_of(findings: Iterable[Finding], title: str) -> Iterator[str]:
    """For a terminal: how many of each severity; then each rule that is broken, with what was found at which nodes."""
    rows: dict[Severity, dict[tuple[str, str], list[Finding]]] = {severity: defaultdict(list) for severity in WORDS}
    for finding in findings:
        rows[finding.severity][finding.rule, finding.remedy].append(finding)
    counts = {severity: sum(map(len, rules.values())) for severity, rules in rows.items()}
    yield f"{title}: " + ", ".join(
        f"{count} {WORDS[severity]}{'s' * (count != 1)}" for severity, count in counts.items()
    )
    for severity, rules in rows.items():
        for (rule, remedy), broken in rules.items():
            yield f"{severity}  {rule}: {remedy}"
            nodes: dict[str, list[str]] = defaultdict(list)
            for finding in broken:
                nodes[finding.found].append(finding.node)
            yield from (f"    {_listed(names)}: {found}" for found, names in list(nodes.items())[:SHOWN])
            if len(nodes) > SHOWN:
                yield f"    and {sum(map(len, list(nodes.values())[SHOWN:]))} more"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _images(path: Path) -> np.ndarray:
    try:
        images_NCHW = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no array of numbers"
        raise DataError(
            f"{path} cannot be read: {reason}.", remedy="Name a .npy file of preprocessed images."
        ) from error
    if not isinstance(images_NCHW, np.ndarray):
        images_NCHW.close()
        raise DataError(f"{path} holds several arrays.", remedy="Name a .npy file with one.")
    return images_NCHW


def _run(path: Path, feeds: Iterable[Feed]) -> Iterator[Feed]:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        yield from map(engine.run, feeds)
