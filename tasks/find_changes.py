"""Steps: what has changed since the last run that passed, and a note of what this one was decided by.

Nothing heavier than a list of files is loaded for it, so that a night with no change is over in seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import ValidationError

from tasks.contracts.announcement import News
from tasks.contracts.errors import ReleaseError, RequantError, TransientStoreError
from tasks.contracts.records import Inputs, Settled
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.data.state import data_state
from tasks.engines.hardware import hardware
from tasks.models.origin import architecture_digest, weights_state
from tasks.report.content import RunReport, Trigger
from tasks.step import GPU_RUNTIMES, LIBRARIES, artifact_key, disk_errors, run_prefix, step, the_store
from tasks.stores.base import Store
from tasks.stores.registry import champion, read_release, settled_key
from tasks.stores.signing import keys_from
from tasks.stores.steps import JSON, code_digest, installed_versions, refs_in

JUDGES = ("great_expectations", "pandas", "scikit-learn")  # of the data contract
NVIDIA = Path("/proc/driver/nvidia")
_SHOWN = 8  # digits of a digest


@dataclass(frozen=True)
class Changes:
    """What has changed since the last run that passed."""

    reason: str  # in words, for people
    spec: RunSpec  # with the weights and data of a retraining
    inputs: Inputs | None = None  # None if they cannot be told; the step that needs what is missing says so
    last: Settled | None = None
    report: RunReport | None = None  # of the last run, if nothing has changed
    news: News | None = None  # of that retraining
    replaced: str = ""  # digest of the spec's own data and weights


@step("find changes")
def find_changes(spec: RunSpec, trigger: Trigger = "by hand", news: News | None = None) -> Changes:
    """Compare all that decides the run with what decided the last one of this model that passed.

    Nothing has changed only if the champion is as that run left it, trusted, and all that both refer to still held.
    A night keeps the retraining that the last such run took in, until somebody changes the spec's own weights or data.

    Args:
        spec: As it was deployed or given.
        trigger: What starts the run.
        news: A retraining that this run is to take in.
    """
    store, name, logger = the_store(), spec.name, get_run_logger()
    with disk_errors():
        last = _last(store, name) if trigger == "nightly" else None
        own = _own(spec) if news or (last and last.news) else ""
        if last is not None and last.replaced == own:
            news = last.news
        if news is not None:
            logger.info("weights %s, as announced, in place of %s", news.weights, spec.model.weights)
            spec = news.applied_to(spec)
        changes = replace(_changes(spec, store), news=news, replaced=own)
        if changes.report is not None and changes.last is not None:
            taken = {} if news is None else {"news": news, "replaced": own}
            _note(store, name, changes.last.model_copy(update=taken))  # its age says when all was last well
    logger.info("%s", changes.reason)
    if changes.inputs is not None and changes.last is not None:
        before = dict(changes.last.inputs)
        rows = [
            {"decided by": what, "now": now, f"run {changes.last.run}": before[what], "same": now == before[what]}
            for what, now in changes.inputs
        ]
        create_table_artifact(rows, key=artifact_key("inputs", name), description=changes.reason)
    return changes


@step("note what decided")
def note_inputs(changes: Changes, report: RunReport) -> None:
    """For the next run to compare with. Only of a run that passed, after all else."""
    store, name = the_store(), report.spec.name
    number = champion(store, name).release
    if changes.inputs is not None and number is not None:
        with disk_errors():
            _note(store, name, Settled(
                run=report.run_id, inputs=changes.inputs, champion=number, news=changes.news, replaced=changes.replaced,
            ))  # fmt: skip


def is_unchanged(spec: RunSpec) -> bool:
    """The same outside of a run. Trouble counts as a change: the run itself says what it is."""
    try:
        return _changes(spec, the_store()).report is not None
    except (RequantError, OSError):
        return False


def unchanged(changes: Changes) -> State[RunReport]:
    """How a run ends in which there is nothing to do: the UI's lists show its name, its page the reason."""
    return Completed(name="Unchanged", message=changes.reason, data=changes.report)


def inputs_of(spec: RunSpec) -> Inputs:
    """All that decides a run.

    Raises:
        RequantError: if something that the spec names is not there.
    """
    code = [code_digest("flows.requantize"), architecture_digest(spec.model.architecture)]
    return Inputs(
        data=data_state(spec.data),
        weights="none" if spec.model.weights is None else weights_state(spec.model.weights),
        code=_digest(code),
        runtime=_digest([*_machine(), installed_versions(*LIBRARIES, *GPU_RUNTIMES, *JUDGES)]),
        spec=_digest(spec.model_dump(mode="json")),
    )


def _changes(spec: RunSpec, store: Store) -> Changes:
    try:
        inputs = inputs_of(spec)
    except TransientStoreError:
        raise
    except (RequantError, OSError):
        return Changes("what decides this run cannot be told beforehand", spec)
    last = _last(store, spec.name)
    if last is None:
        return Changes(f"no run of {spec.name} has passed yet", spec, inputs)
    since, before = f"since run {last.run}", dict(last.inputs)
    changed = [
        f"{what} ({before[what][:_SHOWN]} \N{RIGHTWARDS ARROW} {now[:_SHOWN]})"
        for what, now in inputs
        if now != before[what]
    ]
    if changed:
        return Changes(f"changed {since}: {', '.join(changed)}", spec, inputs, last)
    if Settings().redo:
        return Changes(f"nothing changed {since}, but REQUANT_REDO asks for all steps again", spec, inputs, last)
    if _is_partly_elsewhere(spec):
        return Changes(f"nothing changed {since} here; other machines are asked by their steps", spec, inputs, last)
    report, missing = _report(store, spec.name, last)
    if report is None:
        return Changes(f"nothing changed {since}, but {missing}", spec, inputs, last)
    same = ", ".join(f"{what} {digest[:_SHOWN]}" for what, digest in inputs)
    kept = f"release {last.champion} stays champion"
    return Changes(f"nothing changed {since}: {same} are the same; {kept}", spec, inputs, last, report)


def _report(store: Store, name: str, last: Settled) -> tuple[RunReport | None, str]:
    """The last run's report, or what is not as that run left it."""
    now = champion(store, name).release
    if now != last.champion:
        return None, f"release {now} is champion, where the run left {last.champion}"
    try:
        release = read_release(store, name, last.champion, keys_from(Settings())).release
    except ReleaseError as error:
        return None, error.problem
    text = store.read_text(f"{run_prefix(name, last.run)}/record.json")
    try:
        report = RunReport.model_validate_json(text or "")
    except ValidationError:
        return None, "its record is gone or of another version"
    for ref in (*refs_in(report), *refs_in(release)):
        if not store.renew(ref):  # what is used counts as new, so that nobody collects it
            return None, f"{ref.key} is no longer held in full"
    return report, ""


def _own(spec: RunSpec) -> str:
    """Digest of the spec's own data and weights; what cannot be read is as good as any other that cannot."""
    try:
        weights = spec.model.weights
        return _digest([data_state(spec.data), None if weights is None else weights_state(weights)])
    except TransientStoreError:
        raise
    except (RequantError, OSError):
        return ""


def _note(store: Store, name: str, note: Settled) -> None:
    store.write_text(settled_key(name), note.model_dump_json(indent=1))


def _last(store: Store, name: str) -> Settled | None:
    try:
        return Settled.model_validate_json(store.read_text(settled_key(name)) or "")
    except ValidationError:
        return None  # none yet, or written by other code


def _machine() -> Iterator[JSON]:
    """Device and hardware, as far as PyTorch is not needed to tell them."""
    yield Settings().device
    yield hardware()
    yield os.environ.get("CUDA_VISIBLE_DEVICES")
    for path in sorted([NVIDIA / "version", *NVIDIA.glob("gpus/*/information")]):
        if path.exists():
            yield path.read_text(encoding="utf-8")


def _is_partly_elsewhere(spec: RunSpec) -> bool:
    """Whether another machine, whose libraries and hardware are not known here, does some of the steps."""
    settings = Settings()
    trains_elsewhere = settings.train_on is not None and spec.quant.method == "qat"
    return spec.target.runtime in settings.build_on or trains_elsewhere


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
