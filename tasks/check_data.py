"""Step: the data contract, before anything that costs time."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from tasks.contracts.records import DataCheck
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.data import contract
from tasks.data.contract import check_contract, digest_of, last_accepted, rejection, take_manifest, thumbnails
from tasks.data.preprocess import resolve_preprocess
from tasks.models.architectures import find_architecture
from tasks.report.html import check_as_html
from tasks.report.markdown import check_as_markdown
from tasks.step import Progress, artifact_key, disk_errors, remember, run_id, run_prefix, step, the_images, the_store
from tasks.stores.base import Store
from tasks.stores.steps import JSON, library_versions


@step("check data")
def check_data(spec: RunSpec) -> DataCheck:
    """Every image measured, and the whole judged. What breaks a critical rule ends the run here.

    Raises:
        DataRejected: after the report is stored and shown.
    """
    find_architecture(spec.model.architecture)  # a misspelt name should not wait for the images
    preprocess = resolve_preprocess(spec.model, spec.data)
    frame = take_manifest(spec.data, Settings().scratch, Progress("reading images"))
    past, digest = last_accepted(the_store(), spec.name), digest_of(frame)
    if past is not None and past.digest == digest:
        past = None  # nothing has changed, so nothing can have drifted

    def compute(store: Store, work: Path) -> DataCheck:
        return check_contract(
            spec, frame, lambda: the_images(spec, progress=Progress("decoding images")), past, store, work
        )

    inputs: dict[str, JSON] = {
        "manifest": digest,
        "data": spec.data.model_dump(mode="json"),
        "preprocess": preprocess.model_dump(mode="json"),
        "class_names": spec.model.class_names,
        "seed": spec.seed,
        "past": None if past is None else past.manifest.sha256,
        "judge": library_versions("great_expectations", "pandas"),
    }
    check = remember("check_data", contract.__name__, inputs, DataCheck, compute)
    _show(spec, check)
    if check.breaches:
        raise rejection(check)
    return check


def _show(spec: RunSpec, check: DataCheck) -> None:
    store, logger = the_store(), get_run_logger()
    pictures = thumbnails(spec.data, check.findings)
    key = f"{run_prefix(spec.name, run_id())}/data.html"
    with disk_errors():
        store.write_text(key, check_as_html(spec.name, check, pictures))
    text = check_as_markdown(spec.name, check, pictures)
    create_markdown_artifact(text, key=artifact_key("data", spec.name), description=f"{store}/{key}")
    for finding in check.warnings:
        logger.warning("data: %s is %s, not %s. %s", finding.rule, finding.observed, finding.limit, finding.remedy)
    logger.info("data report: %s/%s", store, key)
