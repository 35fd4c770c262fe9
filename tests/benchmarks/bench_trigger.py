"""From the event `model.retrained` to the first step running: a real server with SQLite, and an idle process worker.

    python tests/benchmarks/bench_trigger.py --rounds 5

Each announcement is of weights that are not there, so that the run ends soon after its first step. A round begins when
the worker is idle: not before the run of `announcements` has ended, which each event starts as well.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from tests.flows.conftest import NETWORKS, PLAIN, Place
from tests.flows.production import Production, production, wait_for
from tests.flows.test_announce import event

STAGES = ("event to run", "to flow running", "to first step running")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "networks.py").write_text(NETWORKS)
        place = Place(folder, folder / "store", folder / "scratch", folder / "home")
        with production(place, folder) as fleet:
            fleet.deploy(PLAIN)
            seconds = [times(fleet) for _ in range(rounds)]
    for stage, values in zip(STAGES, zip(*seconds, strict=True), strict=True):
        print(f"{stage:<22} median {median(values):5.1f} s  largest {max(values):5.1f} s")


def times(fleet: Production) -> tuple[float, float, float]:
    """Seconds since the event, of one announcement; they end with the run."""
    event_id = str(uuid4())
    (sent,) = event("plain", {"weights": "absent.safetensors"}, event_id)
    fleet.post("/events", [sent])

    def run_of_event() -> dict[str, Any] | None:
        found = (run for run in fleet.runs("retrain") if run["parameters"]["announcement"]["id"] == event_id)
        return next(found, None)

    run = fleet.ended(wait_for(run_of_event, "the run")["id"])
    steps = {"flow_runs": {"id": {"any_": [run["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    first = wait_for(lambda: fleet.post("/task_runs/filter", steps), "its first step")[0]
    checks = {
        "deployments": {"name": {"any_": ["announcements"]}},
        "flow_runs": {"expected_start_time": {"after_": run["start_time"]}},
    }
    check = wait_for(lambda: fleet.post("/flow_runs/filter", checks), "the run of announcements")[0]
    fleet.ended(check["id"])
    start = datetime.fromisoformat(sent["occurred"])
    moments = (run["created"], run["start_time"], first["start_time"])
    created, running, stepping = ((datetime.fromisoformat(one) - start).total_seconds() for one in moments)
    return created, running, stepping


if __name__ == "__main__":
    main()
