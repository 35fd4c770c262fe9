"""`requant run-all`: every model of a fleet, on the workers of a server or one after the other in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated
from uuid import UUID

from prefect import flow, get_run_logger, runtime, tags
from prefect.artifacts import create_table_artifact
from pydantic import Field

from tasks.contracts.errors import RequantError, SpecError
from tasks.contracts.spec import RunSpec
from tasks.report.history import COLUMNS, NO_RECORD, Night, aligned, cells, nights_of
from tasks.run_models import Ended, message_of, run_models
from tasks.step import the_store
from tasks.stores.base import Store

_RECENT = 20  # runs of a model among which its own is looked for


def run_name() -> str:
    """Such as `12 models`."""
    return f"{len(runtime.flow_run.parameters['specs'])} models"


@flow(name="requantize-many", flow_run_name=run_name)
def requantize_many(
    specs: tuple[RunSpec, ...], at_once: Annotated[int, Field(ge=1)] = 2, on_workers: bool = True
) -> dict[str, Night]:
    """Re-quantize several models. One that fails does not stop the others, and fails this run in the end.

    Args:
        specs: What to produce.
        at_once: How many run at the same time, on workers.
        on_workers: Whether each is a run of its deployment `by-hand-NAME`; otherwise they run here in turn.

    Raises:
        RequantError: naming the models that failed, and why.
    """
    names = [spec.name for spec in specs]
    if len({*names}) < len(names):
        raise SpecError("Two specs have one name.", remedy="Give each its own.")
    ended = run_models(specs, at_once) if on_workers else _one_by_one(specs)
    store = the_store()
    nights = {name: _night(store, name, end) for name, end in ended.items()}
    _show(nights)
    failed = [name for name, end in ended.items() if not end.passed]
    if failed:
        why = "; ".join(f"{name} ({_short(nights[name].outcome)})" for name in failed)
        raise RequantError(f"{len(failed)} of {len(specs)} models failed: {why}.", remedy="The others are done.")
    return nights


def _one_by_one(specs: Sequence[RunSpec]) -> dict[str, Ended]:
    from flows.requantize import requantize  # takes seconds to load, and workers have their own

    ended = {}
    for spec in specs:
        with tags(f"model:{spec.name}", f"runtime:{spec.target.runtime}"):
            state = requantize(spec, return_state=True)
        plain = state.is_completed() and state.name == "Completed"
        message = "" if plain else message_of(state)
        ended[spec.name] = Ended(flow_run=state.state_details.flow_run_id, passed=state.is_completed(), message=message)
    return ended


def _night(store: Store, name: str, end: Ended) -> Night:
    """By the run's record; where it left none, by how it ended."""
    said = {"passed": end.passed, **({"outcome": end.message} if end.message else {})}
    found = (night for night in nights_of(store, name, _RECENT) if _is_of(night.run, end.flow_run))
    night = next(found, None)
    if night is None:
        return Night(run="", started=None, outcome=end.message or NO_RECORD, passed=end.passed)
    # A record tells better than a message what was rejected, but not why a passed engine was not released.
    return night if night.outcome.startswith("rejected") else night.model_copy(update=said)


def _is_of(run: str, flow_run: UUID | None) -> bool:
    return flow_run is not None and run.endswith(f"-{str(flow_run)[:8]}")


def _show(nights: Mapping[str, Night]) -> None:
    rows = [("model", *COLUMNS), *((name, *cells(night)) for name, night in nights.items())]
    create_table_artifact(
        [dict(zip(rows[0], row, strict=True)) for row in rows[1:]], key="fleet", description="What came of each model"
    )
    for line in aligned(rows, numbers=slice(3, 8)):
        get_run_logger().info("%s", line)


def _short(text: str) -> str:
    return text if len(text) < 80 else f"{text[:77]}..."
