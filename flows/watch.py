"""Has every model had a good run lately? The flow that asks this every day, and fails if not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger

from tasks.contracts.errors import ReleaseError
from tasks.contracts.settings import Settings
from tasks.stores.base import open_store
from tasks.stores.registry import last_good_run


@flow(name="watch", flow_run_name="watch over releases")
def watch(models: tuple[str, ...] = (), idle_days: float = 7) -> None:
    """Fail, and so raise the alarm, if a model's last good run is too old: a release, or one that found it unchanged.

    Args:
        models: Names, as in specs.
        idle_days: How old the last good run may be.

    Raises:
        ReleaseError: naming each such model, and since when.
    """
    store, oldest, idle = open_store(Settings().store), datetime.now(UTC) - timedelta(days=idle_days), []
    for model in models:
        last = last_good_run(store, model)
        get_run_logger().info("%s: last good run %s", model, "never" if last is None else f"{last:%Y-%m-%d %H:%M} UTC")
        if last is None or last < oldest:
            idle.append(f"{model} (last: {'never' if last is None else f'{last:%Y-%m-%d}'})")
    if idle:
        raise ReleaseError(
            f"No good run for {idle_days:g} days: {', '.join(idle)}.",
            remedy="See the failed runs tagged model:NAME, and `requant history NAME`.",
        )
