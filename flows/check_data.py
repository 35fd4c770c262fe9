"""`requant check-data`: the data contract by itself, without Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tasks.contracts.errors import StoreError
from tasks.contracts.records import DataCheck
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.data.contract import check_contract, last_accepted, take_manifest, thumbnails
from tasks.data.images import prepare_images
from tasks.data.preprocess import resolve_preprocess
from tasks.data.sources import SHOWN
from tasks.data.view import check_view
from tasks.models.architectures import build_model, num_outputs
from tasks.models.weights import load_weights
from tasks.report.content import broken_first, check_headline
from tasks.report.html import check_as_html
from tasks.stores.base import open_store
from tasks.stores.workspace import workspace


def check_and_report(spec: RunSpec, page: Path | None) -> tuple[DataCheck, str]:
    """Judge the data of `spec`; also where the page is: `page`, or a place in the store.

    Raises:
        RequantError: if the data cannot be judged, or the page cannot be written.
    """
    settings = Settings()
    store, scratch = open_store(settings.store), settings.scratch
    resolve_preprocess(spec.model, spec.data)  # what it lacks should not wait for the images
    with workspace(scratch) as work:
        with _bar("reading images") as progress:
            frame = take_manifest(spec.data, scratch, progress)
        with _bar("decoding images") as progress:
            check = check_contract(
                spec,
                frame,
                lambda: prepare_images(spec.model, spec.data, spec.seed, scratch, progress),
                last_accepted(store, spec.name),
                store,
                work,
            )
        if spec.model.weights is not None and not check.breaches:  # without weights its rules are not judged
            images = prepare_images(spec.model, spec.data, spec.seed, scratch)
            network = build_model(spec.model, num_outputs(spec.model, images.class_names))
            load_weights(network, spec.model.weights, spec.model.architecture)
            with _bar("looking at them through the float model") as progress:
                findings, _ = check_view(network.eval(), images, spec, progress)
            check = check.model_copy(update={"findings": check.findings + findings})
    text = check_as_html(spec.name, check, thumbnails(spec.data, check.findings))
    if page is None:
        key = f"models/{spec.name}/data.html"
        store.write_text(key, text)
        return check, f"{store}/{key}"
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{page} cannot be written: {error.strerror}.", remedy="Name another --report.") from error
    return check, str(page)


def lines_of(check: DataCheck) -> Iterator[str]:
    """For a terminal or a log: what is broken, with its first offenders, then what is kept."""
    yield f"{check_headline(check.findings)} ({check.num_images:,} images of {check.source})."
    for finding in broken_first(check.findings):
        if finding.passed:
            continue
        yield f"{finding.severity}  {finding.rule}: {finding.says}"
        yield f"    found {finding.observed}, limit {finding.limit}. {finding.remedy}"
        yield from (f"    {offender.path} ({offender.found})" for offender in finding.offenders[:SHOWN])
        if finding.num_offenders > SHOWN:
            yield f"    and {finding.num_offenders - SHOWN:,} more"
    yield "kept  " + ", ".join(finding.rule for finding in check.findings if finding.passed)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
